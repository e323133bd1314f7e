"""The tensor operations and the buffers against float64 loops over plain indexing, at odd shapes."""

import math

import pytest
import torch

from pyramidkv.ops.attention import attention
from pyramidkv.ops.pooling import pool
from pyramidkv.ops.select import select
from pyramidkv.ops.window_scores import window_scores
from pyramidkv.storage import Storage

# batch, query heads, KV heads, head size, queries, keys
SHAPES = [
    (1, 1, 1, 32, 1, 1),
    (1, 2, 2, 32, 7, 7),
    (2, 4, 2, 64, 5, 19),
    (7, 3, 1, 80, 9, 23),
    (1, 6, 2, 128, 1, 33),
    (7, 2, 2, 80, 1, 17),
    (2, 4, 1, 32, 13, 13),
]
LONG = (1, 1, 1, 32, 260, 263)  # more queries than one block of window_scores


def inputs(shape, dtype=torch.float32):
    batch, heads, kv_heads, size, queries, keys = shape
    make = torch.Generator().manual_seed(hash(shape) % 2**31)
    q = torch.randn(batch, heads, queries, size, generator=make)
    k, v = (torch.randn(batch, kv_heads, keys, size, generator=make) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding(kind, shape):
    """(B, K) bool, or None: rows begin with more and more padding, or have holes, or nothing real at all.

    Where heads differ, (B, Hkv, K).
    """
    batch, kv_heads, queries, keys = shape[0], shape[2], shape[4], shape[5]
    if kind == "none":
        return None
    valid = torch.arange(keys) >= torch.arange(batch)[:, None] * 3 % keys
    if kind == "holes":  # empty slots before the new tokens
        valid = torch.arange(keys)[None] % 3 != torch.arange(batch)[:, None] % 3
        valid[:, keys - queries :] = True
    if kind == "new":  # padding among the new tokens, behind a past
        valid[:, keys - queries : keys - queries // 2] = False
    if kind == "nothing":
        valid[-1] = False
    if kind == "heads":
        valid = torch.arange(keys) * 3 % 7 > torch.arange(batch * kv_heads).reshape(batch, kv_heads, 1) % 5
        valid[..., keys - queries :] = True
    return valid


def of_head(valid, row, head, keys):
    """Which keys are real for a row and KV head."""
    if valid is None:
        return [True] * keys
    return (valid[row] if valid.ndim == 2 else valid[row, head]).tolist()


def probabilities(q, k, scaling, valid):
    """softmax over what each query may see, by loops: (B, Hq, Q, K) float64; zero where a query sees nothing."""
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    out = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                last = keys - queries + i
                head = h // (heads // kv_heads)
                real = of_head(valid, b, head, keys)
                seen = [j for j in range(last + 1) if real[j]]
                if seen:
                    logits = torch.einsum("kd,d->k", k[b, head, seen].double(), q[b, h, i].double()) * scaling
                    out[b, h, i, seen] = torch.softmax(logits, 0)
    return out


CASES = [(shape, kind) for shape in SHAPES for kind in ("none", "left", "holes", "new", "nothing", "heads")]
CASES += [(LONG, "none"), (LONG, "new")]


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_attention_is_a_softmax_over_visible_keys(shape, kind):
    q, k, v = inputs(shape)
    valid = padding(kind, shape)
    scaling = 0.7 * shape[3] ** -0.5
    wide = v.double().repeat_interleave(shape[1] // shape[2], dim=1)
    expected = torch.einsum("bhqk,bhkd->bhqd", probabilities(q, k, scaling, valid), wide)
    got = attention(q, k, v, scaling, valid)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_window_scores_are_mean_probabilities_of_real_queries(shape, kind):
    q, k, _ = inputs(shape)
    valid = padding(kind, shape)
    scaling = 0.7 * shape[3] ** -0.5
    batch, heads, kv_heads, _, queries, keys = shape
    p = probabilities(q, k, scaling, valid)
    expected = torch.zeros(batch, kv_heads, keys, dtype=torch.float64)
    for b in range(batch):
        real = [i for i in range(queries) if of_head(valid, b, 0, keys)[keys - queries + i]]
        for h in range(heads):
            for i in real:
                expected[b, h // (heads // kv_heads)] += p[b, h, i] / len(real) / (heads // kv_heads)
    got = window_scores(q, k, scaling, valid)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    shape = (2, 4, 2, 64, 5, 19)
    q, k, v = inputs(shape, dtype)
    valid = padding("left", shape)
    p = probabilities(q, k, 0.125, valid)
    wide = v.double().repeat_interleave(2, dim=1)
    expected = torch.einsum("bhqk,bhkd->bhqd", p, wide)
    torch.testing.assert_close(attention(q, k, v, 0.125, valid).double(), expected, rtol=0.03, atol=0.03)
    scores = window_scores(q, k, 0.125, valid)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double().sum(-1), torch.ones(2, 2).double(), rtol=0.02, atol=0.02)


def test_large_half_precision_logits_do_not_overflow():
    """Products above float16's 65504 that the scaling brings back: seen in models with a few huge key channels."""
    q = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)
    k = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)  # 64 * 1600 = 102400; scaled: 12800
    torch.testing.assert_close(window_scores(q, k, 0.125), torch.full((1, 1, 2), 0.5))


def test_attention_has_a_gradient_even_where_a_query_sees_nothing():
    shape = (2, 4, 2, 32, 6, 6)
    q, k, v = (t.requires_grad_() for t in inputs(shape))
    attention(q, k, v, 0.2, padding("nothing", shape)).sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def best_slots(scores, limit):
    """The `limit` best slots, earlier ones first among equals, in their order."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(i for i in order[:limit] if scores[i] > -math.inf)


@pytest.mark.parametrize("seed", range(6))
def test_select_takes_the_best_in_order_and_settles_ties_early(seed):
    make = torch.Generator().manual_seed(seed)
    batch, heads, keys = (1, 3, 29) if seed % 2 else (7, 2, 40)
    scores = torch.randint(0, 5, (batch, heads, keys), generator=make).float()  # many ties
    scores.masked_fill_(torch.rand(batch, heads, keys, generator=make) < 0.2, -math.inf)
    scores[..., -4:] = math.inf
    limits = [1 + (5 * row + seed) % 13 for row in range(batch)]
    width = max(limits) + (2 if seed == 3 else 0)
    got = select(scores, limits, width)
    for b in range(batch):
        for h in range(heads):
            expected = best_slots(scores[b, h].tolist(), limits[b])
            assert got[b, h].tolist() == [-1] * (width - len(expected)) + expected


def test_select_of_nothing():
    assert select(torch.zeros(2, 3, 5), [0, 0], 0).shape == (2, 3, 0)
    assert select(torch.zeros(1, 1, 3), [0], 2).tolist() == [[[-1, -1]]]


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("keys", [1, 2, 11])
def test_pooling_is_over_real_neighbours(kind, kernel, padded, keys):
    scores = torch.rand(3, 2, keys, generator=torch.Generator().manual_seed(keys))
    valid = torch.arange(keys)[None] >= torch.tensor([0, 1, keys])[:, None] if padded else None
    if padded:
        scores[2] = math.nan  # what is left out may be anything
        scores = scores.masked_fill(~valid[:, None], math.nan)
    got = pool(scores, kernel, kind, None if valid is None else valid[:, None])
    for b in range(3):
        for j in range(keys):
            near = range(max(0, j - kernel // 2), min(keys, j + kernel // 2 + 1))
            near = [i for i in near if valid is None or valid[b, i]]
            if valid is None or valid[b, j]:
                column = scores[b, :, near]
                expected = column.mean(-1) if kind == "avg" else column.amax(-1)
                torch.testing.assert_close(got[b, :, j], expected)


@pytest.mark.parametrize("old", [0, 1, 10, 11])
def test_pooling_leaves_the_newest_alone(old):
    scores = torch.rand(3, 2, 11)
    got = pool(scores, 5, "avg", old=old)
    assert torch.equal(got[..., old:], scores[..., old:])
    assert torch.equal(got[..., :old], pool(scores[..., :old], 5, "avg"))


def test_pooling_nothing():
    assert pool(torch.zeros(2, 3, 0), 5, "avg").shape == (2, 3, 0)


def tokens(count, start=0, batch=2, heads=3):
    """Keys, values (of another size) and positions that can be told apart."""
    base = torch.arange(start, start + count).float()
    key = base[None, None, :, None] + 100 * torch.arange(batch * heads).view(batch, heads, 1, 1)
    position = base.int().expand(batch, heads, count)
    return key.expand(-1, -1, -1, 4).clone(), -key.expand(-1, -1, -1, 2).clone(), position.clone()


def poison(storage):
    """Free slots hold what must never be read."""
    for buffer in (storage.keys, storage.values):
        buffer[:, :, storage.length :] = math.nan
    storage.positions[:, :, storage.length :] = 10**9
    return storage


def assert_holds(storage, key, value, positions):
    held = storage.view()
    assert torch.equal(held[0], key)
    assert torch.equal(held[1], value)
    assert torch.equal(storage.positions[:, :, : storage.length], positions)


def test_whole_and_append_and_growth_keep_everything():
    parts = [tokens(5), tokens(1, 5), tokens(2, 6), tokens(1, 8), tokens(7, 9)]
    storage = poison(Storage.whole(*parts[0], 3))
    assert (storage.capacity, storage.length) == (8, 5)
    capacities = []
    for part in parts[1:]:
        storage.append(*part, 3)
        capacities.append(storage.capacity)
        poison(storage)
    assert capacities == [8, 8, 12, 20]  # out of room: what is needed, and 3 more or as many as were added (4)
    assert_holds(storage, *(torch.cat(t, dim=2) for t in zip(*parts, strict=True)))
    assert storage.valid() is None


def test_gather_is_indexing_and_marks_empty_slots():
    key, value, positions = tokens(9)
    make = torch.Generator().manual_seed(4)
    index = torch.stack([torch.randperm(9, generator=make)[:4].sort().values for _ in range(6)]).view(2, 3, 4)
    index[1, :, 0] = -1
    storage = poison(Storage.gather(key, value, positions, index, 2, padded=True))
    assert (storage.capacity, storage.length) == (6, 4)
    assert storage.valid().tolist() == [[True] * 4, [False] + [True] * 3]
    for b in range(2):
        for h in range(3):
            for slot, source in enumerate(index[b, h].tolist()):
                assert storage.positions[b, h, slot] == (source if source >= 0 else -1)
                if source >= 0:
                    assert torch.equal(storage.keys[b, h, slot], key[b, h, source])
                    assert torch.equal(storage.values[b, h, slot], value[b, h, source])


def test_rows_are_copies_that_may_repeat():
    storage = poison(Storage.whole(*tokens(5), 3))
    picked = storage.rows(torch.tensor([1, 1, 0]))
    key, value, _ = (t[[1, 1, 0]] for t in tokens(5))
    picked.append(*(t[[1, 1, 0]] for t in tokens(1, 5)), 3)
    assert torch.equal(picked.view()[0][:, :, :5], key)
    assert torch.equal(picked.view()[1][:, :, :5], value)
    assert_holds(storage, *tokens(5))
    assert storage.length == 5


def test_bytes_are_those_of_the_allocated_buffers():
    storage = Storage.whole(*tokens(5), 3)
    assert storage.nbytes == 2 * 3 * 8 * (4 * 4 + 2 * 4 + 4)


def test_storage_holds_no_graph():
    key, value, positions = tokens(4)
    storage = Storage.whole(key.requires_grad_(), value.requires_grad_(), positions, 2)
    storage = Storage.gather(*storage.view(), storage.positions[:, :, :4], torch.zeros(2, 3, 2).long(), 2, False)
    assert not any(t.requires_grad for t in storage.view())
