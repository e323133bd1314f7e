"""Layer budgets by weight, and weights measured on a model."""

import itertools

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.budget import layer_budgets
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.ops.quantize import PAGE


def test_weights_divide_the_budget():
    def budgets(weights, total, prompt=1000, least=10):
        return layer_budgets(
            "pyramid", layers=3, total=total, prompt=prompt, window=4, least=least, beta=20, weights=weights
        )

    assert budgets((3.0, 2.0, 1.0), 600) == (300, 200, 100)
    assert budgets((0.3, 0.2, 0.1), 601) == (301, 200, 100)
    assert budgets((98.0, 1.0, 1.0), 1600) == (1000, 300, 300)  # what a layer can't use goes to the others alike
    assert budgets((1.0, 1.0, 1e-9), 600, least=50) == (275, 275, 50)


@pytest.mark.parametrize("wrong", ["", "1,,2", "1, two", (1.0, 0.0), (1.0, -1.0), (1.0, float("inf")), 3, ()])
def test_weights_must_be_positive_numbers(wrong):
    with pytest.raises(ConfigError, match="layers="):
        pyramidkv.CompressionConfig(method="auto", share=0.5, layers=wrong)


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
    cache.save(tmp_path / "a.cache")
    again = pyramidkv.PyramidKVCache.load(tmp_path / "a.cache", plain.config)
    assert again.config == cache.config
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": positions[:, -1:] + 1}
    one, two = (plain(ids[:, -1:], past_key_values=c, **step).logits for c in (cache, again))
    assert torch.equal(one, two)


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
