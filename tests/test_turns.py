"""Several turns: a cache that was saved, loaded, forked, extended or cropped against one that never was."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyramidkv
from families import config, model, padded_batch
from pyramidkv import ConfigError, DataError, PyramidKVCache, UnsupportedError, saved
from pyramidkv.models.source import load_model

NEOX, LLAMA, GEMMA = "gpt_neox-2-2-80", "llama-4-2-32", "gemma3-4-2-32"
KINDS = {
    "plain": {"method": "pyramidkv", "keep": 0.4, "window": 4, "room": 3},
    "8 bits": {"method": "rms", "keep": 0.9, "window": 32, "recent": 4, "bits": 8},
    "4 bits": {"method": "auto", "keep": 0.9, "window": 32, "recent": 4, "room": 2},
    "float16": {"method": "snapkv", "keep": 0.4, "window": 4, "kv_dtype": "float16"},
    "whole": {"method": "snapkv", "budget": 300, "window": 4},
}
RECORDS = hasattr(transformers.Cache, "activate_past_recording")  # transformers 5.20 or newer


def filled(plain, kind="plain", lengths=(90,), steps=0):
    """A cache that has seen a prompt and `steps` single tokens."""
    plain.set_attn_implementation("pyramidkv")
    cache = PyramidKVCache(plain.config, **KINDS[kind])
    ids, mask, positions = padded_batch(lengths)
    with torch.no_grad():
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    decode(plain, cache, steps, lengths)
    return cache


@torch.no_grad()
def decode(plain, cache, steps, lengths, seed=7):
    ids = padded_batch((max(steps, 1),) * len(lengths), seed=seed)[0]
    for i in range(steps):
        at = torch.tensor(lengths)[:, None] + i
        plain(ids[:, i : i + 1], position_ids=at, past_key_values=cache)


def compressed(cache):
    return [layer for layer in cache.report().layers if layer.compressed]


@torch.no_grad()
def go_on(plain, cache, rows=1):
    """Logits of two single tokens, a turn of several, and another single token."""
    ids = padded_batch((9,) * rows, seed=5)[0]
    parts = (slice(0, 1), slice(1, 2), slice(2, 8), slice(8, 9))
    return torch.cat([plain(ids[:, part], past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("lengths", [(90,), (90, 31, 66)], ids=["one", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NEOX, GEMMA])
def test_a_loaded_cache_goes_on_as_the_saved_one(name, kind, lengths, tmp_path):
    plain = model(name)
    cache = filled(plain, kind, lengths, steps=2)
    cache.save(tmp_path / "context.cache")
    again = PyramidKVCache.load(tmp_path / "context.cache", plain.config)
    assert again.config == cache.config
    assert compressed(again) == compressed(cache)
    assert torch.equal(go_on(plain, again, len(lengths)), go_on(plain, cache, len(lengths)))
    assert compressed(again) == compressed(cache)


def test_a_file_holds_the_slots_in_use_and_says_what_it_is(tmp_path):
    plain = model(LLAMA)
    cache = filled(plain, "whole")
    for layer in cache.layers:  # what lies in free slots is nobody's
        layer.storage.keys[:, :, layer.storage.length :] = float("nan")
    cache.save(str(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "a").values())
    assert (tmp_path / "a").stat().st_size < cache.report().full_kv_bytes * 1.1 + 4096
    with safe_open(tmp_path / "a", "pt") as file:
        facts = file.metadata()
    assert (facts["kind"], facts["format"], facts["library"]) == ("pyramidkv cache", "3", pyramidkv.__version__)
    assert json.loads(facts["config"])["budget"] == 300
    assert json.loads(facts["model"])["model_type"] == "llama"


def test_a_file_that_is_there_is_left_alone(tmp_path):
    plain = model(LLAMA)
    path = tmp_path / "a"
    path.write_text("mine")
    cache = filled(plain)
    with pytest.raises(DataError, match=r"path='.*a': is there already; .*overwrite=True"):
        cache.save(path)
    assert path.read_text() == "mine"
    cache.save(path, overwrite=True)
    assert PyramidKVCache.load(path, plain.config).get_seq_length() == 90


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    plain = model(LLAMA)
    cache = filled(plain)
    (tmp_path / "a").write_text("mine")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saved.os, "replace", interrupted)
        cache.save(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(DataError, match="is a folder"):
        cache.save(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        cache.save(tmp_path / "none" / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(ConfigError, match="has seen no tokens"):
        PyramidKVCache(plain.config, **KINDS["plain"]).save(tmp_path / "b")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file(part, tmp_path):
    plain = model(LLAMA)
    path = tmp_path / "a"
    filled(plain).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DataError, match=r"path='.*a': is truncated, or no safetensors file"):
        PyramidKVCache.load(path, plain.config)


def test_a_file_that_is_not_ours(tmp_path):
    plain = config(LLAMA)
    with pytest.raises(DataError, match="none': no such file"):
        PyramidKVCache.load(tmp_path / "none", plain)
    (tmp_path / "text").write_text("Once upon a time there was a cache. " * 9)
    with pytest.raises(DataError, match="text': is truncated, or no safetensors file"):
        PyramidKVCache.load(tmp_path / "text", plain)
    save_file({"weight": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(DataError, match="weights': is a safetensors file, but no saved pyramidkv cache"):
        PyramidKVCache.load(tmp_path / "weights", plain)


def contents(path):
    """The metadata, without checksums, and the tensors of a saved cache."""
    with safe_open(path, "pt") as file:
        return {k: v for k, v in file.metadata().items() if k not in ("tensors", "checksum")}, load_file(path)


CHANGED = [
    ({"format": "2"}, r"has format 2, written by pyramidkv .* which reads format 3: compress the context again"),
    ({"format": "4", "library": "9.0"}, r"has format 4, written by pyramidkv 9\.0; .* which reads format 3"),
    ({"config": json.dumps({"method": "magic", "budget": 64})}, "does not know: method='magic'"),
    ({"config": "{"}, "metadata are damaged"),
    ({"layers": "[]"}, "damaged"),
    ({"layers": None}, "metadata are damaged"),
]


@pytest.mark.parametrize(("change", "message"), CHANGED, ids=str)
def test_metadata_of_another_version_or_damaged(change, message, tmp_path):
    plain = model(LLAMA)
    filled(plain).save(tmp_path / "a")
    facts, tensors = contents(tmp_path / "a")
    facts = {k: v for k, v in (facts | change).items() if v is not None}
    save_file(tensors, tmp_path / "b", saved.summed(tensors, facts))
    with pytest.raises(DataError, match=message):
        PyramidKVCache.load(tmp_path / "b", plain.config)


@pytest.mark.parametrize("damage", ["missing", "narrow"])
def test_tensors_that_do_not_go_with_the_metadata(damage, tmp_path):
    plain = model(LLAMA)
    filled(plain).save(tmp_path / "a")
    facts, tensors = contents(tmp_path / "a")
    if damage == "missing":
        del tensors["1.positions"]
    else:
        tensors["1.keys"] = tensors["1.keys"][..., :16].contiguous()
    save_file(tensors, tmp_path / "b", saved.summed(tensors, facts))
    with pytest.raises(DataError, match="is damaged: layer 1"):
        PyramidKVCache.load(tmp_path / "b", plain.config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_found_and_its_tensor_named(kind, tmp_path):
    plain = model(LLAMA)
    path = tmp_path / "a"
    filled(plain, kind).save(path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    places = {n: about["data_offsets"] for n, about in json.loads(whole[8:head]).items() if n != "__metadata__"}
    for name, (start, end) in places.items():
        for at in (start, end - 1) if end > start else ():
            damaged = bytearray(whole)
            damaged[head + at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"path='.*a': is damaged: tensor '{name}' is not what was written"):
                PyramidKVCache.load(path, plain.config)


@torch.no_grad()
def test_wherever_a_file_is_changed_it_is_not_loaded_as_another_cache(tmp_path):
    """Bytes of the head, which holds names, types, shapes, places, facts and checksums."""
    plain = model(LLAMA)
    path = tmp_path / "a"
    filled(plain).save(path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in range(0, head, 11):
        damaged = bytearray(whole)
        damaged[at] ^= 1  # a digit is another digit then
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"path='.*a': "):
            PyramidKVCache.load(path, plain.config)


@pytest.mark.parametrize("change", ["lost", "added"])
def test_a_tensor_that_is_missing_or_was_never_written(change, tmp_path):
    plain = model(LLAMA)
    filled(plain).save(tmp_path / "a")
    facts, tensors = contents(tmp_path / "a")
    facts = saved.summed(tensors, facts)
    if change == "lost":
        del tensors["2.values"]
    else:
        tensors["2.start"] = torch.zeros(1, 2, dtype=torch.int32)
    save_file(tensors, tmp_path / "b", facts)
    with pytest.raises(DataError, match=r"is damaged: tensor '2.(values' is missing|start' is unknown)"):
        PyramidKVCache.load(tmp_path / "b", plain.config)


def test_a_file_of_another_model(tmp_path):
    filled(model(LLAMA)).save(tmp_path / "a")
    with pytest.raises(DataError, match="another model: model_type is llama there, and gpt_neox here"):
        PyramidKVCache.load(tmp_path / "a", config(NEOX))
    with pytest.raises(DataError, match=r"layers is 3 x \[2, 32, None, 4\] there, and 3 x \[2, 64, None, 2\] here"):
        PyramidKVCache.load(tmp_path / "a", config("llama-2-2-64"))
    other = config(LLAMA)
    other.rope_parameters = other.rope_parameters | {"rope_theta": 5e5}
    with pytest.raises(DataError, match="another model: rope_parameters"):
        PyramidKVCache.load(tmp_path / "a", other)


@pytest.mark.parametrize("device", ["nowhere", "meta:x", 2.5])
def test_a_device_that_is_not_there_and_what_is_no_config(tmp_path, device):
    filled(model(LLAMA)).save(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"device='{device}': nothing can be put there"):
        PyramidKVCache.load(tmp_path / "a", config(LLAMA), device=device)
    with pytest.raises(ConfigError, match="model_config is a NoneType"):
        PyramidKVCache.load(tmp_path / "a", None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_costs_what_the_cache_holds(kind):
    cache = filled(model(GEMMA), kind, steps=2)
    assert cache.fork().report().kv_bytes == cache.report().kv_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [LLAMA])
def test_a_turn_on_a_fork_and_on_a_loaded_cache_is_that_turn_from_scratch(name, kind, tmp_path):
    plain = model(name)
    base = filled(plain, kind)
    base.save(tmp_path / "a")
    expected = go_on(plain, filled(plain, kind))
    assert torch.equal(go_on(plain, base.fork()), expected)
    assert torch.equal(go_on(plain, PyramidKVCache.load(tmp_path / "a", plain.config)), expected)
    assert torch.equal(go_on(plain, base), expected)


@torch.no_grad()
def test_budgets_over_turns():
    """`budget` stays, `keep` counts every token seen: the two rules that docs/turns.md gives."""
    plain = model(LLAMA)
    plain.set_attn_implementation("pyramidkv")
    ids = padded_batch((120,))[0]
    for amount, expected in (({"budget": 20}, [20, 20, 20]), ({"keep": 0.5}, [20, 40, 60])):
        cache = PyramidKVCache(plain.config, method="snapkv", window=4, **amount)
        held = []
        for start in (0, 40, 80):
            plain(ids[:, start : start + 40], past_key_values=cache)
            held.append({layer.kept_tokens for layer in cache.report().layers})
        assert held == [{n} for n in expected]


@pytest.mark.parametrize("lengths", [(90,), (90, 31, 66)], ids=["one", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NEOX])
def test_a_cropped_cache_never_saw_what_was_taken_back(name, kind, lengths):
    plain = model(name)
    expected, cropped = filled(plain, kind, lengths, steps=2), filled(plain, kind, lengths, steps=2)
    decode(plain, cropped, 5, lengths, seed=9)
    cropped.crop(-3)
    cropped.crop(max(lengths) + 2)  # the length to go back to
    cropped.crop(0)
    assert cropped.get_seq_length() == expected.get_seq_length()
    assert torch.equal(go_on(plain, cropped, len(lengths)), go_on(plain, expected, len(lengths)))
    for a, b in zip(cropped.layers, expected.layers, strict=True):
        assert (a.counts, a.held, a.seen, a.settled) == (b.counts, b.held, b.seen, b.settled)


@torch.no_grad()
def test_padding_among_the_tokens_taken_back_is_taken_back_too():
    """A row that had ended is fed padding, and goes on after the crop at the position where it was."""
    plain = model(LLAMA)
    lengths = (40, 40)
    ids = padded_batch((4, 4), seed=9)[0]
    caches = [filled(plain, "plain", lengths) for _ in range(2)]
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[1, 41:] = 0
    for i in range(3):
        plain(ids[:, i : i + 1], attention_mask=mask[:, : 41 + i], past_key_values=caches[0])
    caches[0].crop(-3)
    got, expected = ([plain(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)] for cache in caches)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        assert (a.counts, a.held) == (b.counts, b.held)
        used = slice(a.storage.length)
        assert torch.equal(a.storage.positions[:, :, used], b.storage.positions[:, :, used])


def test_a_crop_over_an_eviction_says_why_and_changes_nothing():
    plain = model(GEMMA)
    cache = filled(plain, steps=2)
    with pytest.raises(UnsupportedError, match="layer 1 has a sliding window of 16 tokens"):
        cache.crop(-1)
    plain = model(LLAMA)
    cache, same = filled(plain, steps=2), filled(plain, steps=2)
    why = r"crop\(-3\) would go back to 89 tokens, but layer 0 evicted or packed when .* 90.*only the 2.*fork\(\)"
    with pytest.raises(UnsupportedError, match=why):
        cache.crop(-3)
    with pytest.raises(UnsupportedError, match=r"crop\(5\) would go back to 5 tokens"):
        cache.crop(5)
    with pytest.raises(ConfigError, match="tokens_to_remove=-93: the cache has seen 92 tokens"):
        cache.crop(-93)
    assert torch.equal(go_on(plain, cache), go_on(plain, same))


@torch.no_grad()
@pytest.mark.parametrize("name", [LLAMA, GEMMA])
def test_while_nothing_was_evicted_a_crop_goes_back_as_far_as_one_likes(name):
    plain = model(name)
    plain.set_attn_implementation("pyramidkv")
    ids = padded_batch((12,))[0]
    cut, fresh = (PyramidKVCache(plain.config, **KINDS["whole"]) for _ in range(2))
    plain(ids, past_key_values=cut)
    plain(ids[:, :2], past_key_values=cut)
    cut.crop(-9)
    plain(ids[:, :5], past_key_values=fresh)
    torch.testing.assert_close(go_on(plain, cut), go_on(plain, fresh), rtol=1e-4, atol=1e-4)
    cut.crop(-cut.get_seq_length())
    fresh.reset()
    torch.testing.assert_close(go_on(plain, cut), go_on(plain, fresh), rtol=1e-4, atol=1e-4)


def wrong_at_times(name):
    """An assistant that drafts what the model would say, but not always."""
    assistant = model(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    return assistant


def count_tokens(calls, _, args, kwargs):
    calls.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("kind", ["plain", "4 bits"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
@pytest.mark.parametrize("name", [NEOX, LLAMA, GEMMA])
def test_assisted_decoding_gives_the_tokens_of_decoding_without(name, how, kind):
    if name == GEMMA and not RECORDS:
        pytest.skip("needs transformers 5.20: older ones can't crop a sliding window")
    plain = model(name)
    options = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        options = {"assistant_model": wrong_at_times(name)}
    ids = padded_batch((10,))[0].repeat(1, 6)  # something to look up
    texts, forwards = [], []
    for more in ({}, options):
        calls = []
        hook = plain.register_forward_pre_hook(functools.partial(count_tokens, calls), with_kwargs=True)
        with pyramidkv.compress(plain, **KINDS[kind]) as session:
            out = plain.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0, **more
            )
        hook.remove()
        assert session.report().shrunk
        texts.append(out[0, ids.shape[1] :].tolist())
        forwards.append(calls)
    assert texts[0] == texts[1]
    assert forwards[0][0] == 60
    assert forwards[1][0] > 60, "no token was drafted behind the prompt"
    if len(texts[0]) == 20:
        assert max(forwards[1][1:]) > 1, "no tokens were drafted while decoding"


def test_assisted_decoding_where_it_cannot_be_exact():
    plain = model(LLAMA)
    ids = padded_batch((10,))[0].repeat(1, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    with pyramidkv.compress(plain, **KINDS["plain"]) as session:
        cache = plain.generate(ids, return_dict_in_generate=True, **options).past_key_values
        with pytest.raises(UnsupportedError, match="on a cache that has seen a prompt already"):
            plain.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
        assert session.report().evicted
    plain.set_attn_implementation("pyramidkv")
    why = "only a session knows which" if RECORDS else "what it dropped is gone"
    with pytest.raises(UnsupportedError, match=why):
        fresh = PyramidKVCache(plain.config, **KINDS["plain"])
        plain.generate(ids, past_key_values=fresh, prompt_lookup_num_tokens=3, **options)


@pytest.mark.skipif(RECORDS, reason="transformers 5.20 can crop a sliding window")
def test_assisted_decoding_of_sliding_windows_in_older_transformers():
    plain = model(GEMMA)
    ids = padded_batch((10,))[0].repeat(1, 6)
    with pytest.raises(UnsupportedError, match="sliding window"), pyramidkv.compress(plain, **KINDS["plain"]):
        plain.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert Version(transformers.__version__) < Version("5.23")


def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "turns.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 6
    loaded = load_model("neox-16m")
    document = "The for statement is used to loop. " * 12
    names = {"model": loaded.model, "tokenizer": loaded.tokenizer, "document": document}
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(compile(snippet, "docs/turns.md", "exec"), names)
    assert len(names["answers"]) == 2
    assert (tmp_path / "document.cache").is_file()
