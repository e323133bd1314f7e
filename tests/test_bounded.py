"""Eviction while decoding: never more than budget + slack, in the same buffers, the choice that a definition makes."""

import pytest
import torch
from transformers import DynamicCache

import pyramidkv
from families import model, padded_batch
from pyramidkv import CompressionConfig, ConfigError, PyramidKVCache
from pyramidkv.packed import PackedStorage
from pyramidkv.plan import Plan, decoding_limits
from pyramidkv.ring import SPARE, QueryRing
from pyramidkv.shape import cache_shape
from reference import NAME as REFERENCE
from reference import Reference

NEOX, LLAMA, GEMMA = "gpt_neox-2-2-80", "llama-4-2-32", "gemma3-4-2-32"
METHODS = [name for name in pyramidkv.methods() if name != "full"]


def cache_for(plain, **options):
    plain.set_attn_implementation("pyramidkv")
    return PyramidKVCache(plain.config, **{"window": 4, "recent": 4, "slack": 6, "room": 1, **options})


@torch.no_grad()
def run(plain, cache, lengths, steps, check=lambda: None):
    """A padded prompt, then single tokens; the logits of these (B, steps, V)."""
    ids, mask, positions = padded_batch(lengths)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    new = padded_batch((60,) * len(lengths), seed=7)[0]
    out = []
    for i in range(steps):
        at = torch.tensor(lengths)[:, None] + i
        out.append(plain(new[:, i : i + 1], position_ids=at, past_key_values=cache).logits)
        check()
    return torch.cat(out, 1)


def kept(layer, row=0, head=0):
    return [p for p in layer.storage.positions[row, head, : layer.storage.length].tolist() if p >= 0]


AMOUNTS = [{"budget": 12}, {"keep": 0.3}, {"share": 0.5}, {"bytes": "140kB"}]


@pytest.mark.parametrize(("method", "amount"), [(m, AMOUNTS[i % 4]) for i, m in enumerate(METHODS)], ids=str)
def test_no_layer_ever_holds_more_than_its_budget_and_the_slack(method, amount):
    plain = model(LLAMA)
    lengths = (50, 9, 31)
    cache = cache_for(plain, method=method, heads="uniform", **amount)
    buffers, most = {}, 0

    def check():
        nonlocal most
        for layer in cache.layers:
            allowed = decoding_limits(cache.plan, layer.rank, layer.counts, layer.prompts, itemsize=4)
            for row, limit in enumerate(allowed):
                assert layer.held[row] <= limit + 6
                for head in range(2):
                    have = kept(layer, row, head)
                    assert len(have) == layer.held[row]
                    assert have == sorted(set(have))
                    assert have[-4:] == list(range(layer.counts[row] - 4, layer.counts[row]))
            if not isinstance(layer.storage, PackedStorage) and layer.counts[0] > 60:
                addresses = [t.data_ptr() for t in layer.storage.buffers()]
                assert buffers.setdefault(layer.layer, addresses) == addresses, "the buffers have moved"
            most = max(most, max(layer.held))

    run(plain, cache, lengths, 60, check)
    assert cache.get_seq_length() == 110
    assert most < 110
    assert cache.report().evicted


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
def test_heads_of_unequal_numbers_stay_bounded_together(bits):
    plain = model(LLAMA)
    cache = cache_for(plain, method="rms", heads="adaptive", budget=80, bits=bits, slack=10)
    ids = padded_batch((240,))[0]
    plain(ids[:, :200], past_key_values=cache)
    for i in range(200, 240):
        assert plain(ids[:, i : i + 1], past_key_values=cache).logits.isfinite().all()
        for layer in cache.layers:
            assert layer.held[0] <= 90
            assert sum(len(kept(layer, head=head)) for head in range(2)) <= 2 * 90
            for head in range(2):
                assert kept(layer, head=head)[-4:] == list(range(i - 3, i + 1))


@torch.no_grad()
@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_a_prompt_with_nothing_to_pack_is_packed_when_it_has_grown(heads):
    plain = model(LLAMA)
    cache = cache_for(plain, method="rms", heads=heads, budget=80, bits=4)
    ids = padded_batch((110,))[0]
    plain(ids[:, :3], past_key_values=cache)
    for i in range(3, 110):
        plain(ids[:, i : i + 1], past_key_values=cache)
        for layer in cache.layers:
            assert isinstance(layer.storage, PackedStorage) == (layer.settled > 3)
            each = [len(kept(layer, head=head)) for head in range(2)]
            newest = i + 1 - max(layer.settled, 3)  # since the last eviction
            assert sum(each) == 2 * (i + 1) if layer.settled <= 3 else 72 <= sum(each) - 2 * newest <= 2 * 80
    assert cache.report().evicted


@torch.no_grad()
@pytest.mark.parametrize("name", [NEOX, LLAMA, "mistral-4-1-128", GEMMA])
def test_decoding_equals_the_masked_reference(name):
    """Everything is kept and evicted keys are masked, in float64 loops; a padded batch against its rows alone."""
    plain = model(name)
    lengths, steps = (61, 40, 23), 22
    settings = {"budget": 14, "window": 5, "recent": 8, "beta": 3.0, "slack": 7}
    cache = cache_for(plain, method="pyramidkv", **settings)
    got = run(plain, cache, lengths, steps)
    ids, _, _ = padded_batch(lengths)
    new = padded_batch((60,) * 3, seed=7)[0]
    for row, length in enumerate(lengths):
        Reference(list(cache_shape(plain.config).compressed), **settings)
        plain.set_attn_implementation(REFERENCE)
        past = DynamicCache()
        plain(ids[row : row + 1, 61 - length :], past_key_values=past)
        for i in range(steps):
            expected = plain(new[row : row + 1, i : i + 1], past_key_values=past).logits[0, 0]
            torch.testing.assert_close(got[row, i], expected, rtol=5e-4, atol=5e-4)
    assert cache.report().evicted


@pytest.mark.parametrize(("method", "bits"), [("rms", 16), ("rms", 4), ("h2o", 16), ("random", 16)])
def test_rows_of_a_batch_are_what_they_are_alone(method, bits):
    plain = model(LLAMA)
    lengths, options = (50, 40, 45), {"method": method, "budget": 24, "bits": bits}
    many = cache_for(plain, **options)
    together = run(plain, many, lengths, 30)
    for row, length in enumerate(lengths):
        alone = cache_for(plain, **options)
        ids, _, _ = padded_batch(lengths)
        new = padded_batch((60,) * 3, seed=7)[0][row : row + 1]
        with torch.no_grad():
            plain(ids[row : row + 1, 50 - length :], past_key_values=alone)
            out = torch.cat([plain(new[:, i : i + 1], past_key_values=alone).logits for i in range(30)], 1)
        torch.testing.assert_close(together[row : row + 1], out, rtol=1e-3, atol=1e-3)
        for a, b in zip(many.layers, alone.layers, strict=True):
            assert kept(a, row) == kept(b)


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"bits": 8}, {"kv_dtype": "float16"}], ids=str)
def test_saved_forked_cropped_and_moved_in_the_middle(kind, tmp_path):
    plain = model(NEOX)
    options = {"method": "rms", "budget": 20, **kind}
    plain_run = cache_for(plain, **options)
    expected = run(plain, plain_run, (50, 50), 40)
    cache = cache_for(plain, **options)
    run(plain, cache, (50, 50), 25)
    new = padded_batch((60, 60), seed=7)[0]
    plain(new[:, :1], past_key_values=cache)  # one that is taken back
    cache.crop(-1)
    cache.save(tmp_path / "a")
    moved = cache.fork()
    moved.reorder_cache(torch.tensor([1, 0]))
    loaded = PyramidKVCache.load(tmp_path / "a", plain.config)
    for other, rows in ((loaded, [0, 1]), (cache.fork(), [0, 1]), (moved, [1, 0]), (cache, [0, 1])):
        out = torch.cat([plain(new[rows, i : i + 1], past_key_values=other).logits for i in range(25, 40)], 1)
        torch.testing.assert_close(out, expected[rows, 25:], rtol=1e-4, atol=1e-4)


def test_plain_generate_stays_bounded_and_equals_itself():
    plain = model(GEMMA)
    ids, mask, _ = padded_batch((50, 31))
    out = []
    for assisted in ({}, {"num_beams": 2}):
        for _ in range(2):
            with pyramidkv.compress(plain, budget=16, window=4, slack=8) as session:
                made = plain.generate(
                    ids, attention_mask=mask, max_new_tokens=50, do_sample=False, pad_token_id=0, **assisted
                )
            out.append(made)
            report = session.report()
            assert max(layer.kept_tokens for layer in report.layers if layer.compressed) <= 16 * 2 + 8
        assert torch.equal(out[-1], out[-2])


@pytest.mark.parametrize("name", [NEOX, LLAMA])
def test_assisted_decoding_is_bounded(name):
    plain = model(name)
    ids = padded_batch((10,))[0].repeat(1, 6)
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000}
    with pyramidkv.compress(plain, method="snapkv", budget=16, window=4, slack=12) as session:
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, **options)
    assert out.shape[1] == 120
    assert max(layer.kept_tokens for layer in session.report().layers) <= 16 + 12


@torch.no_grad()
def test_drafts_beyond_the_slack_evict_nothing_that_the_budget_allows():
    """Before any token was decoded there are no queries to choose by, and nothing is above its budget."""
    plain = model(LLAMA)
    cache = cache_for(plain, method="snapkv", budget=16, slack=2)
    ids = padded_batch((40,))[0]
    plain(ids, past_key_values=cache)
    before = [kept(layer) for layer in cache.layers]
    cache.expect_drafts(4)
    plain(ids[:, :4], past_key_values=cache)
    assert [kept(layer) for layer in cache.layers] == [[*had, 40, 41, 42, 43] for had in before]
    cache.crop(-3)
    plain(ids[:, 4:8], past_key_values=cache)  # no query is left to choose by: this waits
    assert [len(kept(layer)) for layer in cache.layers] == [16 + 1 + 4] * 3
    plain(ids[:, 8:12], past_key_values=cache)
    assert [len(kept(layer)) for layer in cache.layers] == [16 + 4] * 3


def test_bytes_are_those_of_the_plan_and_hold_for_ever():
    plain = model(LLAMA)
    for options in ({"method": "rms", "bytes": "120kB"}, {"method": "knorm", "share": 0.5}):
        cache = cache_for(plain, room=3, **options)
        run(plain, cache, (60, 60), 1)
        planned = Plan(cache.config, cache_shape(plain.config)).kv_bytes(60, batch=2, itemsize=4)
        assert cache.report().kv_bytes == planned
        run(plain, cache_for(plain, room=3, **options), (60, 60), 1)
        decoded = cache_for(plain, room=3, **options)
        run(plain, decoded, (60, 60), 50)
        assert decoded.report().kv_bytes == planned
        assert (decoded.layers[0].ring is None) == (options["method"] == "knorm")


def test_a_ring_of_queries():
    ring = QueryRing.allocate(torch.zeros(1, 2, 1, 3), 5, torch.float32)
    assert ring.nbytes == 4 * 2 * (5 + SPARE) * 3
    queries = torch.arange(40.0)[:, None, None, None, None].expand(-1, 1, 2, 1, 3)
    for slot in range(11, 31):
        ring.push(queries[slot], slot)
    assert ring.newest(31)[0, 0, :, 0].tolist() == [26, 27, 28, 29, 30]
    ring.drop(2)
    assert ring.newest(29)[0, 0, :, 0].tolist() == [26, 27, 28]
    ring.push(torch.cat([queries[35], queries[36]], 2), 29)
    assert ring.newest(31)[0, 0, :, 0].tolist() == [26, 27, 28, 35, 36]
    ring.drop(9)
    assert ring.newest(31).shape == (1, 2, 0, 3)
    ring.push(torch.cat(list(queries[:12]), 2), 31)  # more than it has places for
    assert ring.newest(43)[0, 0, :, 0].tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("slack", [0, -1, 2.5, True, "8"])
def test_a_slack_that_is_none(slack):
    with pytest.raises(ConfigError, match=f"slack={slack!r}: must be a whole number, at least 1"):
        CompressionConfig(budget=64, slack=slack)


def test_slack_of_the_full_cache():
    with pytest.raises(ConfigError, match="slack=8: method='full' keeps everything"):
        CompressionConfig(method="full", slack=8)


@pytest.mark.slow
def test_thousands_of_tokens_in_flat_memory():
    plain = model(LLAMA)
    plain.config.max_position_embeddings = 10**6
    cache = cache_for(plain, method="snapkv", budget=32, slack=16, room=16)
    ids = padded_batch((50,))[0]
    with torch.no_grad():
        plain(ids, past_key_values=cache)
        held, addresses = cache.report().kv_bytes, [layer.storage.keys.data_ptr() for layer in cache.layers]
        for i in range(6000):
            logits = plain(ids[:, i % 50 : i % 50 + 1], past_key_values=cache).logits
            assert max(layer.held[0] for layer in cache.layers) <= 48
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 6050
    assert cache.report().kv_bytes == held
    assert [layer.storage.keys.data_ptr() for layer in cache.layers] == addresses
