"""Layer budgets by weight, bits by layer, and both measured on a model."""

import itertools
import json

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.budget import layer_budgets
from pyramidkv.calibration import logit_noise
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.ops.quantize import PAGE, dequantize_keys, quantize_keys


def test_weights_divide_the_budget():
    def budgets(weights, total, prompt=1000, least=10):
        return layer_budgets(
            "pyramid", layers=3, total=total, prompt=prompt, window=4, least=least, beta=20, weights=weights
        )

    assert budgets((3.0, 2.0, 1.0), 600) == (300, 200, 100)
    assert budgets((0.3, 0.2, 0.1), 601) == (301, 200, 100)
    assert budgets((98.0, 1.0, 1.0), 1600) == (1000, 300, 300)  # what a layer can't use goes to the others alike
    assert budgets((1.0, 1.0, 1e-9), 600, least=50) == (275, 275, 50)


WRONG = ["", "1,,2", "1, two", (1.0, 0.0), (1.0, -1.0), (1.0, float("inf")), 3, ()]
WRONG += ["1:3", "1:", "1:8:4", "1:8.0", ((1.0, 5),), ((1.0, 8, 4),), ((0.0, 8),), ((1.0, True),)]


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_must_be_positive_numbers(wrong):
    with pytest.raises(ConfigError, match="layers="):
        pyramidkv.CompressionConfig(method="auto", share=0.5, layers=wrong)


def test_a_layer_may_have_bits_of_its_own():
    config = pyramidkv.CompressionConfig(method="auto", share=0.5, layers=" 1.5, 1: 8,0.5 ")
    assert config.layers == (1.5, (1.0, 8), 0.5) and config.weights == (1.5, 1.0, 0.5)
    assert [config.bits_of(rank) for rank in range(3)] == [4, 8, 4]
    again = pyramidkv.CompressionConfig(method="auto", share=0.5, layers=json.loads(json.dumps(config.layers)))
    assert again == config
    plain = pyramidkv.CompressionConfig(method="snapkv", keep=0.5, layers="1:8,1")
    assert plain.packs(0) and not plain.packs(1)


def goes_on_the_same_from_a_file(cache, plain, batch, path):
    """Saved and loaded, a cache has the same settings and gives the same logits for one more token."""
    ids, mask, positions = batch
    cache.save(path)
    again = pyramidkv.PyramidKVCache.load(path, plain.config)
    assert again.config == cache.config
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": positions[:, -1:] + 1}
    one, two = (plain(ids[:, -1:], past_key_values=c, **step).logits for c in (cache, again))
    assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "snapkv", "bits": 16}], ids=str)
def test_layers_in_bits_of_their_own_hold_what_all_layers_in_those_bits_would(options, tmp_path):
    """Layer by layer the codes of a cache with one precision; the bytes of the plan; decoding, and a file."""
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    bits = [(8, 2, 16, 4)[rank % 4] for rank in range(plain.config.num_hidden_layers)]
    ids, mask, positions = padded_batch((700, 450))

    def filled(**more):
        cache = pyramidkv.PyramidKVCache(plain.config, room=1, **{**options, "keep": 0.5, **more})
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return cache

    mixed = filled(layers=[(1.0, n) for n in bits])
    for rank, n in enumerate(bits):
        one, other = (cache.layers[rank].storage for cache in (mixed, filled(bits=n)))
        assert type(one) is type(other) and one.nbytes == other.nbytes
        for a, b in zip(one.view(), other.view(), strict=True):
            assert torch.equal(a, b)
    assert mixed.report().kv_bytes == mixed.plan.kv_bytes(700, batch=2, itemsize=4)
    shared = filled(keep=None, share=0.2, layers=[(1.0, n) for n in bits])
    assert 0.18 < shared.report().kv_bytes / shared.report().full_kv_bytes <= 0.2
    goes_on_the_same_from_a_file(mixed, plain, (ids, mask, positions), tmp_path / "a.cache")


def test_weights_must_fit_the_model():
    plain = model("llama-4-2-32")
    with pytest.raises(ConfigError, match="has 2 numbers"):
        pyramidkv.PyramidKVCache(plain.config, method="auto", share=0.5, layers="1,2")
    with pytest.raises(ConfigError, match="layers="):
        pyramidkv.CompressionConfig(method="full", layers="1,2")


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "auto", "share": 0.12}, {"method": "snapkv", "keep": 0.4}], ids=str)
def test_layers_hold_what_their_weights_say(options, tmp_path):
    """Unequal layers, padded rows, decoding, the bytes of the plan, and a file that remembers the weights."""
    plain = model("llama-4-2-32")
    count = plain.config.num_hidden_layers
    weights = tuple(float(2 + i) for i in range(count))
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, layers=weights, room=1, **options)
    ids, mask, positions = padded_batch((700, 450))
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    kept = [layer.held for layer in cache.layers]
    assert all(low[row] < high[row] for low, high in itertools.pairwise(kept) for row in (0, 1))
    assert [row[0] for row in kept] == list(cache.plan.budgets(700, batch=2, itemsize=4))
    even = pyramidkv.PyramidKVCache(plain.config, room=1, **options)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=even)
    assert cache.report().kv_bytes == pytest.approx(even.report().kv_bytes, rel=0.03)
    goes_on_the_same_from_a_file(cache, plain, (ids, mask, positions), tmp_path / "a.cache")


def by_hand(scores, share, recent):
    """Slots of each head of one budget over (heads, tokens): pages by their best score, after a floor."""
    heads, tokens = scores.shape
    pages = heads * (share - recent) // PAGE
    own = min(int(0.2 * (share - recent)) // PAGE, pages // heads)
    counts = [own] * heads
    ranked = [sorted(head[: tokens - recent].tolist(), reverse=True) for head in scores]
    best = [(-head[page * PAGE], h) for h, head in enumerate(ranked) for page in range(own, -(-len(head) // PAGE))]
    for _, h in sorted(best)[: pages - heads * own]:
        counts[h] += 1
    return [min(recent + PAGE * count, tokens) for count in counts]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_calibration_is_one_budget_over_all_layers(name, monkeypatch):
    """The weights against pages handed out in a loop, from scores that the layers were seen to give."""
    plain = model(name)
    config = pyramidkv.CompressionConfig(method="echo", heads="adaptive", keep=0.5, recent=32)
    said = []
    score = pyramidkv.scorers.EchoScorer.score

    def listened(scorer, seen):
        said.append(score(scorer, seen))
        # Scores that tell the layers apart, with no two alike after rounding to 16 bits.
        said[-1] = said[-1].sort(-1).values * 1.3 ** len(said)
        return said[-1]

    monkeypatch.setattr(pyramidkv.scorers.EchoScorer, "score", listened)
    before = plain.config._attn_implementation
    ids, _, _ = padded_batch((640,))
    weights = pyramidkv.calibrate(plain, [ids], config)
    assert plain.config._attn_implementation == before
    heads = said[0].shape[1]
    limits = by_hand(torch.cat(said, dim=1)[0], 320, 32)
    layers = torch.tensor(limits, dtype=torch.float64).reshape(-1, heads).mean(1)
    assert len(weights) == len(said) and weights == pytest.approx((layers / layers.mean()).tolist(), abs=6e-4)
    assert weights[-1] > weights[0]


@pytest.mark.parametrize(("heads", "kv_heads", "queries", "keys", "bits"), [(6, 2, 50, 150, 4), (1, 1, 64, 64, 2)])
def test_logit_noise_is_what_codes_move_logits_by(heads, kv_heads, queries, keys, bits):
    """Against all pairs of queries and keys in float64; keys in front of the last whole page don't count."""
    torch.manual_seed(0)
    query, key = torch.randn(1, heads, queries, 16), 3 * torch.randn(1, kv_heads, keys, 16)
    key[:, -1] *= 5
    pages = key[0, :, keys % PAGE :].reshape(kv_heads, -1, PAGE, 16)
    coded = dequantize_keys(quantize_keys(pages, bits), torch.float64).flatten(1, 2)
    moved = []
    for head in range(heads):
        kv = head * kv_heads // heads
        moved.append(0.25 * query[0, head].double() @ (coded - pages.flatten(1, 2).double())[kv].T)
    by_kv_head = torch.stack(moved).reshape(kv_heads, -1).square().mean(1).sqrt()
    assert logit_noise(query, key, 0.25, bits) == pytest.approx(by_kv_head.max().item(), rel=1e-4)


@torch.no_grad()
def test_layers_that_codes_disturb_are_given_more_bits(monkeypatch):
    """Those above the limit and no others; their weights are those of the tokens that then fit."""
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((640,))
    noise = iter([0.2, 0.4, 0.29, 0.31] * 4)
    monkeypatch.setattr(pyramidkv.calibration, "logit_noise", lambda *_: next(noise))
    count = plain.config.num_hidden_layers
    disturbed = [rank % 4 in (1, 3) for rank in range(count)]
    found = pyramidkv.calibrate(plain, [ids], share=0.3)
    config = pyramidkv.CompressionConfig(method="auto", share=0.3, layers=found)
    assert [config.bits_of(rank) for rank in range(count)] == [8 if more else 4 for more in disturbed]
    assert sum(config.weights) == pytest.approx(count, abs=0.01)
    noise = iter([0.4] * count)
    assert {n for _, n in pyramidkv.calibrate(plain, [ids], share=0.2, bits=2)} == {4}
    noise = iter([0.4] * count)
    assert all(isinstance(weight, float) for weight in pyramidkv.calibrate(plain, [ids], share=0.4, bits=8))
    noise = iter([])
    assert all(isinstance(weight, float) for weight in pyramidkv.calibrate(plain, [ids], keep=0.4, bits=16))


def test_calibration_says_what_it_needs():
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((640,))
    with pytest.raises(ConfigError, match="prompts is empty"):
        pyramidkv.calibrate(plain, [], share=0.5)
    with pytest.raises(ConfigError, match=r"shape \(2, 640\)"):
        pyramidkv.calibrate(plain, [ids.repeat(2, 1)], share=0.5)
    with pytest.raises(ConfigError, match="prompts=: one has 640 tokens, and all are kept"):
        pyramidkv.calibrate(plain, [ids], budget=4096)
    for method in ({"method": "full"}, {"method": "streamingllm", "keep": 0.5}):
        with pytest.raises(UnsupportedError, match="no scores of attention"):
            pyramidkv.calibrate(plain, [ids], **method)
    assert plain.config._attn_implementation != "pyramidkv"
