"""A prompt in chunks: against the plain model, against forwards by hand, and never more slots than budget + chunk."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import pyramidkv
from families import model, padded_batch
from pyramidkv import ConfigError, PyramidKVCache
from pyramidkv.chunks import even_sizes
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.models.source import load_model
from pyramidkv.scorers import EchoScorer

NEOX, LLAMA, GEMMA = "gpt_neox-2-2-80", "llama-4-2-32", "gemma3-4-2-32"
LENGTHS = (90, 31, 66)


def cache_for(plain, **options):
    plain.set_attn_implementation("pyramidkv")
    return PyramidKVCache(plain.config, **{"window": 4, **options})


@pytest.mark.parametrize("name", [NEOX, LLAMA, GEMMA])
def test_when_nothing_is_evicted_the_logits_are_the_plain_models(name):
    plain = model(name)
    ids, mask, positions = padded_batch(LENGTHS)
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for chunk in (90, 37, 8):
        cache = cache_for(plain, budget=300)
        got = pyramidkv.prefill(plain, ids, cache, chunk=chunk, attention_mask=mask)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert cache.get_seq_length() == 90


@torch.no_grad()
@pytest.mark.parametrize("amount", [{"budget": 14}, {"bytes": "2MB"}, {"budget": 40, "bits": 4}], ids=str)
@pytest.mark.parametrize("name", [NEOX, GEMMA])
def test_chunks_are_forwards_one_after_another(name, amount):
    plain = model(name)
    ids, mask, positions = padded_batch(LENGTHS)
    by_hand, fed = (cache_for(plain, method="snapkv", **amount) for _ in range(2))
    for part in (slice(0, 30), slice(30, 60), slice(60, 90)):
        inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        expected = plain(ids[:, part], past_key_values=by_hand, **inputs).logits[:, -1]
    got = pyramidkv.prefill(plain, ids, fed, chunk=32, attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert str(fed.report()) == str(by_hand.report())


@pytest.mark.parametrize("amount", [{"keep": 0.25}, {"share": 0.5}], ids=str)
def test_a_share_is_that_of_the_whole_prompt_from_the_first_chunk_on(amount, monkeypatch):
    plain = model(LLAMA)
    ids, mask, _ = padded_batch((120, 80, 40))
    cache = cache_for(plain, method="snapkv", room=1, **amount)
    held = []
    evict = PyramidKVLayer._evict
    monkeypatch.setattr(PyramidKVLayer, "_evict", lambda layer, *a: (evict(layer, *a), held.append(layer.held))[0])
    pyramidkv.prefill(plain, ids, cache, chunk=30, attention_mask=mask)
    final = [cache.plan.budgets(n, batch=3, itemsize=4)[0] for n in (120, 80, 40)]
    for seen, rows in zip((30, 60, 90, 120), held[::3], strict=True):
        assert rows == [min(max(seen - pad, 0), limit) for pad, limit in zip((0, 40, 80), final, strict=True)]
    one_shot = cache_for(plain, method="snapkv", room=1, **amount)
    pyramidkv.prefill(plain, ids, one_shot, chunk=120, attention_mask=mask)
    assert cache.report().kv_bytes == one_shot.report().kv_bytes


@pytest.mark.parametrize("bits", [16, 4])
def test_no_forward_sees_more_than_budget_and_chunk(bits, monkeypatch):
    plain = model(LLAMA)
    ids = padded_batch((480,))[0]
    most = []
    attend = PyramidKVLayer.attend

    def watched(layer, query, key, *rest):
        most.append(key.shape[2])
        return attend(layer, query, key, *rest)

    monkeypatch.setattr(PyramidKVLayer, "attend", watched)
    pyramidkv.prefill(plain, ids, cache_for(plain, method="rms", budget=40, recent=8, bits=bits), chunk=40)
    assert max(most) <= 40 + 40 + (64 if bits < 16 else 0)  # packing rounds up to pages


@pytest.mark.parametrize("name", [LLAMA, GEMMA])
def test_a_session_feeds_chunks_and_generate_goes_on(name):
    plain = model(name)
    ids, mask, positions = padded_batch(LENGTHS)
    arguments = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pyramidkv.compress(plain, keep=0.4, window=4) as session:
        cache = session.prefill(**arguments, chunk=30)
        assert cache.get_seq_length() == 89
        out = plain.generate(**arguments, past_key_values=cache, **options)
        assert session.cache is cache
        assert session.report().evicted
        alone = session.prefill(ids[:1, -1:], chunk=30)
        assert alone.get_seq_length() == 0
    by_hand = cache_for(plain, keep=0.4)
    pyramidkv.prefill(plain, ids[:, :-1], by_hand, chunk=30, attention_mask=mask[:, :-1])
    expected = []
    token, at = ids[:, -1:], positions[:, -1:]
    with torch.no_grad():
        for _ in range(6):
            token = plain(token, position_ids=at, past_key_values=by_hand).logits[:, -1].argmax(-1, keepdim=True)
            expected.append(token)
            at = at + 1
    assert torch.equal(out[:, 90:], torch.cat(expected, 1))


@pytest.mark.parametrize("name", [NEOX, LLAMA, GEMMA])
def test_what_nobody_reads_of_the_last_layer_is_not_computed(name, monkeypatch):
    plain = model(name)
    ids, mask, _ = padded_batch(LENGTHS)
    last = plain.get_submodule([n for n, _ in plain.named_modules() if n.endswith("mlp")][-1])
    seen = []
    hook = last.register_forward_hook(lambda module, given, out: seen.append(out is given[0]))
    try:
        pyramidkv.prefill(plain, ids, cache_for(plain, budget=20), chunk=37, attention_mask=mask)
        assert seen == [True, True, False]
        with pytest.raises(RuntimeError, match="no more"), monkeypatch.context() as broken:
            broken.setattr(PyramidKVLayer, "_evict", lambda *_: (_ for _ in ()).throw(RuntimeError("no more")))
            pyramidkv.prefill(plain, ids, cache_for(plain, budget=20), chunk=37, attention_mask=mask)
        plain.set_attn_implementation("sdpa")
        seen.clear()
        with pyramidkv.compress(plain, keep=0.4, window=4) as session:
            cache = session.prefill(ids, chunk=37, attention_mask=mask)
            assert seen == [True, True, True]
            plain.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, pad_token_id=0)
            assert not any(seen[3:])
            assert not any(getattr(layer, "unread", False) for layer in cache.layers)
    finally:
        hook.remove()


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 5), (5, 5), (6, 5), (4099, 1024), (4096, 1024)])
def test_chunks_are_even(tokens, chunk):
    sizes = even_sizes(tokens, chunk)
    assert sum(sizes) == tokens
    assert len(sizes) == -(-tokens // chunk)
    assert max(sizes) <= chunk
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("chunk", [2048, 2100, 4096, 5000])
@pytest.mark.parametrize("tokens", [1, 255, 2048, 2049, 4097, 8191, 32767, 131071, 131072])
def test_large_chunks_are_even_but_for_steps_that_recur(tokens, chunk):
    sizes = even_sizes(tokens, chunk)
    assert sum(sizes) == tokens
    assert len(sizes) == -(-tokens // (chunk // 256 * 256))
    assert min(sizes) > 0
    assert max(sizes) <= chunk
    assert max(sizes) - min(sizes) < 512
    assert all(size % 256 == 0 for size in sizes[1:])
    assert len(set(sizes[1:])) <= 2


IDS = padded_batch((40,))[0]
BAD = [
    ({"chunk": 0}, {}, "chunk=0: must be a whole number of tokens, at least 1"),
    ({"chunk": 2.5}, {}, r"chunk=2\.5: must be a whole number"),
    ({"chunk": 8}, {"window": 9}, r"chunk=8: must be at least 10 tokens \(window=9\)"),
    ({"chunk": 20}, {"window": None, "budget": 64}, r"chunk=20: must be at least 33 tokens \(the 32 newest"),
    ({"chunk": 20, "attention_mask": torch.ones(1, 39)}, {}, r"attention_mask has shape \(1, 39\): .*\(1, 40\)"),
    ({"chunk": 20, "input_ids": IDS[0]}, {}, r"input_ids has shape \(40,\): it must be \(batch, tokens\)"),
    ({"chunk": 20, "input_ids": IDS[:, :0]}, {}, r"input_ids has shape \(1, 0\)"),
    ({"chunk": 20, "input_ids": IDS.tolist()}, {}, r"input_ids is a list: it must be a tensor, \(batch, tokens\)"),
    ({"chunk": 20, "input_ids": IDS.float()}, {}, r"input_ids has dtype torch.float32: tokens are integers"),
    ({"chunk": 20, "attention_mask": [1] * 40}, {}, r"attention_mask is a list: it must be a tensor"),
    ({"chunk": 95}, {"method": "auto", "window": None, "budget": 96}, r"least 96 tokens \(the 32 newest, .* 64 more\)"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input(arguments, options, message):
    plain = model(LLAMA)
    cache = cache_for(plain, **{"budget": 14, **options})
    with pytest.raises(ConfigError, match=message):
        pyramidkv.prefill(plain, **{"input_ids": IDS, "cache": cache, **arguments})
    assert cache.get_seq_length() == 0
    plain.set_attn_implementation("sdpa")
    with pyramidkv.compress(plain, **{"budget": 14, "window": 4, **options}) as session:
        held = session.prefill(padded_batch((100,))[0], chunk=100)
        with pytest.raises(ConfigError, match=message):
            session.prefill(**{"input_ids": IDS, **arguments})
        assert session.cache is held  # and not let go for nothing
        assert held.get_seq_length() == 99


def test_a_chunk_may_be_smaller_than_a_methods_own_wide_window():
    plain = model(LLAMA)
    cache = cache_for(plain, method="rms", budget=34, window=None)
    pyramidkv.prefill(plain, padded_batch((90,))[0], cache, chunk=40)
    assert cache.report().evicted


def test_a_cache_that_has_seen_tokens_and_a_closed_session():
    plain = model(LLAMA)
    cache = cache_for(plain, budget=14)
    pyramidkv.prefill(plain, IDS, cache, chunk=20)
    with pytest.raises(ConfigError, match="cache has seen 40 tokens"):
        pyramidkv.prefill(plain, IDS, cache, chunk=20)
    plain = model(LLAMA)
    with pytest.raises(ConfigError, match="session: is closed"):
        pyramidkv.compress(plain, budget=14, window=4).prefill(IDS, chunk=20)


def test_chunks_of_generate_itself():
    """`generate(prefill_chunk_size=...)` evicts after each chunk, by a share of what has been seen so far."""
    plain = model(LLAMA)
    ids = padded_batch((90,))[0]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pyramidkv.compress(plain, method="snapkv", keep=0.5, window=4) as session:
        plain.generate(ids, prefill_chunk_size=30, **options)
        assert {layer.kept_tokens for layer in session.report().layers} == {45 + 1}


def asked(plain, how):
    """Arguments by which `generate()` is asked for chunks of 20 tokens, in each of the ways it knows."""
    made = transformers.GenerationConfig(prefill_chunk_size=20, max_new_tokens=2)
    if how == "the model's own":
        plain.generation_config.prefill_chunk_size = 20
    positional = (made,) if how == "positional" else ()
    named = {"option": {"prefill_chunk_size": 20}, "config": {"generation_config": made}}.get(how, {})
    return positional, {"max_new_tokens": 2, **named}


@pytest.mark.parametrize("how", ["option", "config", "positional", "the model's own"])
def test_generate_in_a_session_refuses_chunks_that_are_too_small_before_the_model_runs(how):
    plain = model(LLAMA)
    forwards = []
    plain.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    positional, named = asked(plain, how)
    with pytest.raises(ConfigError) as caught, pyramidkv.compress(plain, method="snapkv", keep=0.5, window=24):
        plain.generate(IDS, *positional, **named)
    assert str(caught.value) == "prefill_chunk_size=20: must be at least 25 tokens (window=24)"
    assert not forwards


@pytest.mark.parametrize("how", ["option", "config", "positional", "the model's own"])
def test_generate_in_a_session_takes_chunks_that_are_large_enough(how):
    plain = model(LLAMA)
    positional, named = asked(plain, how)
    with pyramidkv.compress(plain, method="snapkv", keep=0.5, window=4) as session:
        plain.generate(IDS, *positional, **named)
    assert session.report().evicted
    assert "generate" not in vars(plain)


def test_what_decides_how_large_a_chunk_of_generate_must_be():
    plain = model(LLAMA)
    plain.generation_config.prefill_chunk_size = 20
    with pyramidkv.compress(plain, method="snapkv", keep=0.5, window=24) as session:
        plain.generate(IDS, prefill_chunk_size=None, max_new_tokens=2)  # what is said last holds: no chunks
        other = PyramidKVCache(plain.config, method="snapkv", keep=0.5, window=4)
        plain.generate(IDS, past_key_values=other, max_new_tokens=2)  # the cache's own settings hold
        assert session.cache is other
        for size in (0, 2.5):
            with pytest.raises(ConfigError, match=f"prefill_chunk_size={size}: must be a whole number"):
                plain.generate(IDS, prefill_chunk_size=size)
    plain.generate(IDS, max_new_tokens=2)  # the session is closed: the model's own affair


def test_a_replaced_class_refuses_chunks_that_are_too_small_from_the_first_call_on():
    pyramidkv.replace_llama("snapkv", keep=0.5, window=24)
    try:
        plain = model(LLAMA)
        for _ in range(2):
            with pytest.raises(ConfigError, match="prefill_chunk_size=20: must be at least 25"):
                plain.generate(IDS, prefill_chunk_size=20)
        assert plain.generate(IDS, prefill_chunk_size=25, max_new_tokens=2).shape == (1, 42)
    finally:
        pyramidkv.replace_llama("fullkv")
    assert "generate" not in vars(transformers.LlamaForCausalLM)
    assert plain.generate(IDS, prefill_chunk_size=20, max_new_tokens=2).shape == (1, 42)


def test_the_snippets_of_the_documentation_run(monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "long.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 2
    loaded = load_model("neox-16m")
    inputs = dict(loaded.tokenizer("The for statement is used to loop. " * 60, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    names = {"pyramidkv": pyramidkv, "model": loaded.model, "inputs": inputs}
    for snippet in snippets:
        exec(compile(snippet.replace("100_000", "4"), "docs/long.md", "exec"), names)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "echo"}, {"method": "auto"}, {"method": "echo", "bits": 8}], ids=str)
def test_what_asked_for_a_key_when_it_was_new_counts_in_later_chunks(options, monkeypatch):
    """Each stored slot has what its own chunk's queries said of it, to half precision, and is judged by it again."""
    plain = model(NEOX)
    said = {}  # by layer, row, head and position
    score = EchoScorer.score
    band = pyramidkv.scorers.band_scores

    def watched(scorer, seen):
        new = seen.query.shape[2]
        fresh = []
        monkeypatch.setattr(pyramidkv.scorers, "band_scores", lambda *a: fresh.append(band(*a)) or fresh[0])
        older = seen.positions[:, :, :-new]
        for row, head, slot in (older >= 0).nonzero().tolist() if seen.lasting is not None else ():
            before = said[seen.layer, row, head, int(older[row, head, slot])]
            assert float(seen.lasting[row, head, slot]) == pytest.approx(before, rel=2e-3, abs=1e-6)
        out = score(scorer, seen)
        newest = seen.positions[:, :, -new:]
        for row, head, slot in (newest >= 0).nonzero().tolist():
            said[seen.layer, row, head, int(newest[row, head, slot])] = float(fresh[0][row, head, slot])
        if seen.lasting is not None:
            assert torch.equal(out, torch.cat([seen.lasting[:, :, :-new].float(), fresh[0]], 2))
        carried.append(seen.lasting is not None and bool((seen.lasting[:, :, :-new] > 0).any()))
        return out

    monkeypatch.setattr(EchoScorer, "score", watched)
    carried = []
    ids, mask, _ = padded_batch((400, 150, 390))
    cache = cache_for(plain, **{"window": 16, "recent": 4, "budget": 150, **options})
    pyramidkv.prefill(plain, ids, cache, chunk=100, attention_mask=mask)
    layers = len(cache.layers)
    assert carried == [False] * layers + [True] * 3 * layers
    assert all(layer.lasting is None for layer in cache.layers), "of a whole prompt nothing is kept"
    carried.clear()
    whole = cache_for(plain, **{"window": 16, "recent": 4, "budget": 150, **options})
    pyramidkv.prefill(plain, ids, whole, chunk=400, attention_mask=mask)
    assert not any(carried)


@torch.no_grad()
def test_tokens_one_by_one_or_taken_back_in_the_middle_of_a_prompt():
    """What was said of keys is not put to others: it begins anew."""
    plain = model(NEOX)
    ids = padded_batch((200,))[0]
    for taken in (False, True):
        cache = cache_for(plain, method="echo", window=16, recent=4, budget=120)
        cache.expect_prompt([300])
        plain(ids[:, :100], past_key_values=cache)
        assert cache.layers[0].lasting is not None
        plain(ids[:, 100:101], past_key_values=cache)
        if taken:
            cache.crop(-1)
            assert cache.layers[0].lasting is None
        else:
            assert not cache.layers[0]._lasting(torch.zeros(1, 2, 111), 10).any()
        assert plain(ids[:, 101:], past_key_values=cache).logits.isfinite().all()
        assert cache.layers[0].lasting.shape[2] == cache.layers[0].storage.length
