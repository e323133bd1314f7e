"""A benchmark shared by several processes: the records of one process, written once."""

import json
from dataclasses import replace

import pytest

from families import model
from pyramidkv import CompressionConfig, ConfigError, PyramidKVError, models
from pyramidkv.evaluate import bench, schema
from pyramidkv.evaluate.ranks import Ranks, from_environment, joined, merge
from pyramidkv.evaluate.schema import Compression, Perplexity, Recall
from ranks import torchrun

KEPT = Compression("full", "", 1.0, 8, 8)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_merged_records_are_those_of_one_process(count):
    nll, right, asked = (0.5, 1.5, 2.5, 3.5, 4.5), (1, 0, 2, 1, 0), (2, 1, 2, 3, 1)
    kept = [replace(KEPT, kv_bytes=n) for n in range(5)]  # a record shows what the last piece kept
    perplexity, recall = [], []
    for rank in range(count):
        ranks = Ranks(rank, count)
        mine = ranks.mine(kept)
        if not mine:
            perplexity.append([])
            recall.append([])
            continue
        perplexity.append([Perplexity("m", "c", "0", 8, 4, mine[-1], tuple(ranks.mine(nll)))] * 2)
        recall.append([Recall("m", "kv", 8, False, mine[-1], tuple(ranks.mine(right)), tuple(ranks.mine(asked)))])
    assert merge(perplexity) == [Perplexity("m", "c", "0", 8, 4, kept[-1], nll)] * 2
    assert merge(recall) == [Recall("m", "kv", 8, False, kept[-1], right, asked)]


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() == Ranks(0, 1)
    with joined("cuda:7") as ranks:
        assert ranks.first
        assert ranks.gather("a") == ["a"]
        assert ranks.same("this", 3) == 3


@pytest.mark.parametrize("set_to", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "many"}])
def test_half_a_launcher_is_an_error(monkeypatch, set_to):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        from_environment()


def test_one_gpu_for_all_processes_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"device='cuda:0': 2 processes would share it"), joined("cuda:0"):
        pass


def test_ranks_that_differ_are_an_error(monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda _, value: [value, "other"])
    with pytest.raises(PyramidKVError, match="corpora: rank 0 has 'mine' and rank 1 has 'other'"):
        Ranks(0, 2).same("corpora", "mine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny untrained GPT-NeoX with the shipped tokenizer."""
    path = tmp_path_factory.mktemp("model")
    made = model("gpt_neox-2-2-32")
    made.resize_token_embeddings(3072)
    made.save_pretrained(path)
    models.load()[1].save_pretrained(path)
    return path


@pytest.mark.slow
def test_two_processes_write_what_one_does(folder, tmp_path):
    settings = bench.Settings(
        configs=(CompressionConfig(keep=0.5, window=8),),
        model=str(folder),
        metrics=("perplexity", "recall"),
        corpora=("python-reference",),
        context=160,
        target=20,
        chunks=5,
        recall_context=(300,),
        recall_examples=3,
    )
    alone = schema.read(bench.run(settings, tmp_path / "alone"))
    common = ["--model", folder, "--keep", 0.5, "--window", 8, "--context", 160, "--target", 20, "--chunks", 5]
    common += ["--recall-context", 300, "--recall-examples", 3, "--metric", "perplexity", "--metric", "recall"]
    common += ["--corpus", "python-reference", "--json", "--out", tmp_path / "shared"]
    done = torchrun("-m", "pyramidkv", "bench", *common)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0] == str(tmp_path / "shared" / "results.jsonl")  # printed once
    shared = schema.read(tmp_path / "shared" / "results.jsonl")

    def shown(records):  # the command measures "auto" as well
        kept = [r for r in records[1:] if getattr(r, "compression", KEPT).method in ("full", "pyramidkv")]
        return [schema.to_json(r) for r in kept]

    assert shown(shared) == shown(alone)
    assert len(schema.pick(shared, schema.Perplexity)[0].chunk_nll) == 5
    assert shared[0].command.startswith("torchrun --nproc-per-node 2 -m pyramidkv bench ")
    again = torchrun("-m", "pyramidkv", "bench", *common, "--resume")
    assert again.returncode == 0, again.stderr
    assert schema.read(tmp_path / "shared" / "results.jsonl") == shared
    refused = torchrun("-m", "pyramidkv", "bench", *common)
    assert refused.returncode != 0
    assert "is there; --resume goes on with it" in refused.stderr
