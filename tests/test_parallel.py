"""Tensor parallelism on two CPU processes (gloo), with transformers' own plan: the same choice and tokens as on one."""

import json
import time

import pytest
import torch

import pyramidkv
from families import model, padded_batch
from pyramidkv.parallel import check_heads, first_head
from ranks import torchrun

# "random" needs to know which heads of the model a rank has; "auto" packs; a share and bytes count the whole model.
CASES = (
    {"keep": 0.4, "window": 4},
    {"method": "h2o", "share": 0.4, "window": 4},
    {"method": "random", "keep": 0.4, "window": 4},
    {"method": "auto", "share": 0.3, "window": 8},
    {"method": "snapkv", "bytes": "300kB", "window": 4, "room": 16},
)


def prepared(folder, names):
    """Random models and a padded batch saved to `folder`; (models, ids, mask)."""
    models = {name: model(name, vocab=102) for name in names}  # transformers 5.17 wants it to divide by the ranks
    for name, made in models.items():
        made.save_pretrained(folder / name)
    ids, mask, _ = padded_batch((60, 33, 47))
    torch.save((ids, mask), folder / "batch.pt")
    (folder / "cases.json").write_text(json.dumps(CASES))
    return models, ids, mask


def alone(made, ids, mask, options):
    """The same in this process: tokens, positions of every layer, report."""
    with pyramidkv.compress(made, **options) as session:
        out = made.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
    layers = [layer for layer in out.past_key_values.layers if hasattr(layer, "storage")]
    positions = [layer.storage.positions[:, :, : layer.storage.length] for layer in layers]
    return out.sequences, positions, session.report()


@pytest.mark.slow
def test_two_ranks_keep_and_generate_what_one_process_does(tmp_path):
    names = ("gpt_neox-2-2-80", "llama-4-2-32", "mistral-2-2-32", "qwen2-4-2-64", "qwen3-4-2-32", "gemma3-4-2-32")
    models, ids, mask = prepared(tmp_path, names)
    done = torchrun("tensor_parallel_job.py", "runs", tmp_path, *names)
    assert done.returncode == 0, done.stderr
    for name in names:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
        for number, options in enumerate(CASES):
            tokens, positions, usage = alone(models[name], ids, mask, options)
            assert usage.shrunk, (name, options)
            got = [results[number] for results in ranks]
            for one in got:
                assert torch.equal(one["tokens"], tokens), (name, options)
            for layer, whole in enumerate(positions):
                halves = torch.cat([one["positions"][layer] for one in got], dim=1)
                assert torch.equal(halves, whole), (name, options, layer)
            for one in got:  # a report is of its rank: half of the bytes, but for a few that are not of a head
                assert [u.kept_tokens for u in one["report"].layers] == [u.kept_tokens for u in usage.layers]
                assert one["report"].full_kv_bytes * 2 == usage.full_kv_bytes
                of_rows = 4 * len(ids) * len(usage.layers) if options.get("method") == "auto" else 0
                assert usage.kv_bytes <= one["report"].kv_bytes * 2 <= usage.kv_bytes + of_rows


@pytest.mark.slow
def test_phi3_has_all_heads_on_every_rank(tmp_path):
    """transformers gathers its fused projection before the attention: right, but no memory is saved."""
    models, ids, mask = prepared(tmp_path, ["phi3-4-2-32"])
    done = torchrun("tensor_parallel_job.py", "runs", tmp_path, "phi3-4-2-32")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        results = torch.load(tmp_path / f"phi3-4-2-32-{rank}.pt", weights_only=False)
        for options, one in zip(CASES, results, strict=True):
            tokens, _, usage = alone(models["phi3-4-2-32"], ids, mask, options)
            assert torch.equal(one["tokens"], tokens)
            assert one["report"] == usage


@pytest.mark.slow
def test_fewer_heads_than_ranks_is_an_error_that_says_so(tmp_path):
    prepared(tmp_path, ["mistral-4-1-128"])
    done = torchrun("tensor_parallel_job.py", "heads", tmp_path, "mistral-4-1-128")
    for rank in (0, 1):
        assert f"rank {rank}: model: its 1 KV heads can't be split evenly over 2 ranks" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    prepared(tmp_path, ["llama-4-2-32"])
    began = time.monotonic()
    done = torchrun("tensor_parallel_job.py", "dies", tmp_path, "llama-4-2-32", timeout=120)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert not list(tmp_path.glob("*-[01].pt")), "a rank went on without the other"
    assert time.monotonic() - began < 120


def test_the_first_head_of_a_rank(monkeypatch):
    assert first_head(8, 8) == 0
    with pytest.raises(pyramidkv.ConfigError, match="says 8 KV heads, and the new keys have 4"):
        first_head(8, 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, expected in enumerate((0, 2, 4, 6, 0, 2, 4, 6)):  # two groups of four ranks
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert first_head(8, 2) == expected
    with pytest.raises(pyramidkv.ConfigError, match="says 8 KV heads, and the new keys have 3"):
        first_head(8, 3)


def test_heads_are_checked_where_they_are_split():
    made = model("llama-4-2-32")
    for ranks in (None, 1, 2):
        made._tp_size = ranks
        check_heads(made)
    made._tp_size = 4
    with pytest.raises(pyramidkv.ConfigError, match="its 2 KV heads can't be split evenly over 4 ranks"):
        check_heads(made)
    whole = model("phi3-4-2-32")
    whole._tp_size = 4
    check_heads(whole)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_two_cpu_ranks(tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="the script needs transformers 5.17")
    out = tmp_path / "parallel.json"
    shapes = ("--device", "cpu", "--shape", "tiny-llama", "tiny-neox", "--new", 12, "--repeats", 1, "--out", out)
    done = torchrun("../benchmarks/parallel_gpu.py", *shapes)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert not [row for row in report["rows"] if "error" in row]
    assert len(report["agreement"]) == 4
    for row in report["agreement"]:
        assert row["equal_before_the_first_difference"] == [12], row
    for row in report["rows"]:
        assert row.get("tokens_equal_on_all_ranks", True)
        assert len(row["kv_bytes_per_rank"]) == row["ranks"]
