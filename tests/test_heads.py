"""Budgets of heads, against a loop that hands out pages one by one; and caches whose heads keep unequal numbers."""

import struct

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.methods import METHODS, Method
from pyramidkv.ops.heads import FLOOR, head_limits, row_pages
from pyramidkv.plan import Plan
from pyramidkv.scorers import Scorer
from pyramidkv.shape import cache_shape

RECENT = 5


def scores_of(rows, heads, slots, available):
    """Random scores, different from head to head; and which slots are valid: of each row, the last `available`."""
    scores = torch.rand(rows, heads, slots, generator=torch.Generator().manual_seed(0)) ** 4
    scores = scores * torch.arange(1, heads + 1)[:, None]
    return scores, torch.arange(slots) >= slots - torch.tensor(available)[:, None]


def shortened(score):
    """The first 16 bits of a float32 number, as bfloat16 without rounding."""
    return struct.unpack(">f", struct.pack(">f", score)[:2] + bytes(2))[0]


def by_hand(scores, share, available):
    """Slots of each head of one row, (H, K) scores, of which the last `available` are valid."""
    heads = len(scores)
    if share >= available:
        return [available] * heads
    old = [sorted(row[-available:][:-RECENT].tolist(), reverse=True) for row in scores]
    pages = [int(FLOOR * (share - RECENT)) // 64] * heads
    while sum(pages) < heads * (share - RECENT) // 64:
        worth = [shortened(row[64 * p]) if 64 * p < len(row) else -1.0 for row, p in zip(old, pages, strict=True)]
        pages[worth.index(max(worth))] += 1
    return [min(RECENT + 64 * p, available) for p in pages]


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("share", [70, 133, 200, 300, 600])
def test_pages_go_where_scores_are_highest(heads, share):
    available = [700, 333, 90, 4]
    shares = [min(share, most) for most in available]
    scores, valid = scores_of(4, heads, 700, available)
    counts = head_limits(scores, shares, available, RECENT, valid)
    assert counts.dtype == torch.int32
    expected = [by_hand(row, s, a) for row, s, a in zip(scores, shares, available, strict=True)]
    assert counts.tolist() == expected
    for row, s, a in zip(counts.tolist(), shares, available, strict=True):
        assert sum(row) <= heads * s
        assert sum(-(-max(n - RECENT, 0) // 64) for n in row) <= row_pages(heads, s, a, RECENT)


def test_one_head_can_take_most():
    scores = torch.rand(1, 4, 1000, generator=torch.Generator().manual_seed(1))
    scores[:, 2] += 10
    counts = head_limits(scores, [325], [1000], 5)[0].tolist()
    assert counts == [133, 69, 1000, 69]  # 20 pages: one each as floor, 15 more fill the third head, one is left


def test_equal_scores_go_to_the_earlier_head():
    scores = torch.ones(1, 3, 300)
    scores[:, 0] += 2**-8  # no difference in 16 bits
    assert head_limits(scores, [129], [300], 1).tolist() == [[300, 65, 1]]


LENGTHS = (400, 250, 110)


def cache_of(plain, **options):
    plain.set_attn_implementation("pyramidkv")
    return pyramidkv.PyramidKVCache(plain.config, heads="adaptive", recent=6, room=9, **options)


def kept(layer, row, head):
    positions = layer.storage.positions[row, head].tolist()
    return [p for p in positions if p >= 0]


@torch.no_grad()
@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
@pytest.mark.parametrize("name", ["llama-4-2-32", "gpt_neox-2-2-80"])
def test_heads_share_a_layers_budget(name, method):
    plain = model(name)
    cache = cache_of(plain, method=method, keep=0.5)
    ids, mask, positions = padded_batch(LENGTHS)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    for rank, layer in enumerate(cache.layers):
        heads = layer.storage.positions.shape[1]
        for row, length in enumerate(LENGTHS):
            share = layer.held[row]
            assert share == min(length, cache.plan.budgets(length, batch=3, itemsize=4)[rank])
            counts = [len(kept(layer, row, head)) for head in range(heads)]
            assert sum(counts) <= heads * share
            assert sum(counts) > heads * share - 64 - 64 * heads  # whole pages, and a head may end in part of one
            for head in range(heads):
                assert kept(layer, row, head)[-6:] == list(range(length - 6, length))


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_and_its_bytes_are_planned(name, bits):
    """A prompt, another turn, and decoding."""
    plain = model(name)
    more = torch.randint(3, 101, (len(LENGTHS), 40), generator=torch.Generator().manual_seed(8))
    options = {"method": "echo", "keep": 0.5, "bits": bits}

    def run(ids, mask, positions, more):
        cache = cache_of(plain, **options)
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        held = [layer.kv_bytes for layer in cache.report().layers if layer.compressed]
        out = []
        for now in (slice(0, 35), *(slice(i, i + 1) for i in range(35, 40))):
            place = positions[:, -1:] + 1 + torch.arange(now.start, now.stop)
            seen = torch.cat([mask, torch.ones_like(more[:, : now.stop])], 1)
            out.append(plain(more[:, now], attention_mask=seen, position_ids=place, past_key_values=cache).logits)
        return cache, held, torch.cat(out, 1)

    ids, mask, positions = padded_batch(LENGTHS)
    many, _, together = run(ids, mask, positions, more)
    for row, length in enumerate(LENGTHS):
        own = slice(row, row + 1)
        one, held, alone = run(ids[own, -length:], mask[own, -length:], positions[own, -length:], more[own])
        near = 1e-4 if bits == 16 else 1e-2  # a number half-way between two codes may go either way
        torch.testing.assert_close(together[own], alone, rtol=1e-4, atol=near)
        for x, y in zip(many.layers, one.layers, strict=True):
            if isinstance(x, PyramidKVLayer):
                for head in range(x.storage.positions.shape[1]):
                    other = set(kept(x, row, head)) ^ set(kept(y, 0, head))
                    assert len(other) <= (0 if bits == 16 else 2)  # such a number may change which slot is the last
        plan = Plan(one.config, cache_shape(plain.config))
        planned = plan._bytes_of(plan.budgets(length, itemsize=4), length, 1, 4)
        assert sum(held) == planned


@torch.no_grad()
def test_a_head_whose_scores_are_higher_keeps_more(monkeypatch):
    class Lopsided(Scorer):
        """The second head's keys are worth ten times as much."""

        def score(self, seen):
            rising = seen.positions.float() + 1
            return rising * torch.tensor([1.0, 10.0])[:, None]

    monkeypatch.setitem(METHODS, "lopsided", Method("lopsided", "uniform", Lopsided, ""))
    plain = model("llama-4-2-32")
    cache = cache_of(plain, method="lopsided", budget=200, window=6)
    ids, mask, positions = padded_batch(LENGTHS)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    for layer in cache.layers:
        # 6 + 64 a page: of 2 * 194 // 64 = 6 pages the second head takes all that it can use
        assert [len(kept(layer, 0, head)) for head in range(2)] == [6, 390]
        assert [len(kept(layer, 1, head)) for head in range(2)] == [134, 250]
        assert [len(kept(layer, 2, head)) for head in range(2)] == [110, 110]
        assert kept(layer, 0, 1) == list(range(10, 400))


@torch.no_grad()
def test_everything_kept_is_the_plain_model():
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch(LENGTHS)
    plain.set_attn_implementation("sdpa")
    expected = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with pyramidkv.compress(plain, method="echo", keep=1.0, heads="adaptive", recent=6):
        found = plain.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)


def test_less_than_a_page_for_each_head_is_refused():
    with pytest.raises(pyramidkv.ConfigError, match="budget=90: must be at least 96"):
        pyramidkv.CompressionConfig(method="echo", budget=90, recent=32, heads="adaptive")
    with pytest.raises(pyramidkv.ConfigError, match="heads='ada': unknown; allowed: uniform, adaptive"):
        pyramidkv.CompressionConfig(keep=0.5, heads="ada")
