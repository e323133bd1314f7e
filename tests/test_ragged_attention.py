"""Attention without a mask where heads have unequal numbers of tokens; layers ask for it only where it is right."""

import pytest
import torch

import pyramidkv.layer
from families import model, padded_batch
from pyramidkv import PyramidKVCache
from pyramidkv.ops.attention import attention
from pyramidkv.ops.ragged_attention import ragged_attention, why_not

# batch, query heads, KV heads, head size, queries, keys
SHAPES = [(1, 1, 1, 32, 7, 7), (2, 4, 2, 64, 5, 19), (7, 3, 1, 80, 9, 23), (1, 6, 2, 128, 13, 33), (7, 2, 2, 80, 1, 17)]
LARGE = [(2, 8, 2, 128, 300, 1000), (1, 32, 32, 80, 257, 900), (7, 6, 3, 64, 130, 130), (1, 4, 4, 32, 512, 700)]


def inputs(shape, by_head, dtype=torch.float32, device="cpu"):
    batch, heads, kv_heads, size, queries, keys = shape
    make = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, heads, queries, size, generator=make)
    k, v = (torch.randn(batch, kv_heads, keys, size, generator=make) for _ in range(2))
    empty = torch.randint(
        0, keys + 1 - (queries if by_head else 0), (batch, kv_heads if by_head else 1), generator=make
    )
    valid = torch.arange(keys) >= empty[..., None]
    valid = valid if by_head else valid[:, 0]
    hidden = ~(valid if by_head else valid[:, None].expand(-1, kv_heads, -1))
    k[hidden] = v[hidden] = float("nan")  # whoever reads an empty slot finds out
    return [t.to(device, dtype) for t in (q, k, v)] + [valid.to(device)]


def by_definition(query, key, value, first_query, first_key, queries, keys, used, scaling):
    """What torch's flash kernel promises of its arguments: a loop over sequences, queries and heads."""
    assert all(numbers.is_contiguous() for numbers in (first_query, first_key, used))  # it asks for that
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    out = torch.zeros_like(query)
    for n, count in enumerate(used.tolist()):
        begin, end = first_query[n : n + 2].tolist()
        assert end - begin == queries
        k, v = (t[first_key[n] :][:count, 0].double() for t in (key, value))
        for i in range(begin, end):
            seen = count - (end - 1 - i)
            if seen > 0:
                p = torch.softmax(query[i].double() @ k[:seen].T * scaling, -1)
                out[i] = (p @ v[:seen]).to(out.dtype)
    return out


@pytest.mark.parametrize("by_head", [False, True], ids=["rows", "heads"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_kernel_is_told_is_the_masked_attention(shape, by_head):
    q, k, v, valid = inputs(shape, by_head)
    got = ragged_attention(q, k, v, 0.1, valid, by_definition)
    expected = attention(q, k.nan_to_num(), v.nan_to_num(), 0.1, valid)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_it_can_not_serve():
    q, k, v, _ = inputs(SHAPES[1], False)
    assert why_not(q, k, v, 0.0) == "it is for CUDA"


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 4}, {"method": "auto", "recent": 4}, {"heads": "adaptive"}, {"slack": 8}],
    ids=str,
)
def test_a_layer_says_that_there_are_no_holes_only_where_there_are_none(options, monkeypatch):
    told = []

    def watched(query, key, value, scaling, valid=None, dropout=0.0, *, holes=True):
        if valid is not None:
            gaps = bool((valid[..., :-1] & ~valid[..., 1:]).any())
            assert holes or not gaps
            told.append((holes, gaps))
        return attention(query, key, value, scaling, valid, dropout, holes=holes)

    monkeypatch.setattr(pyramidkv.layer, "attention", watched)
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = PyramidKVCache(plain.config, **{"method": "rms", "window": 4, "budget": 80, "room": 1, **options})
    ids, mask, _ = padded_batch((190, 30, 120))
    for end in (60, 100, 190):  # chunks: a row may begin in the second or third
        begin = {60: 0, 100: 60, 190: 100}[end]
        at = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
        plain(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=at, past_key_values=cache)
    token = ids[:, :1]
    for _ in range(3):
        plain(token, past_key_values=cache)
    assert all(not holes for holes, _ in told)
    assert told
    turn, more, _ = padded_batch((9, 4, 6))  # padding behind a past
    mask = torch.cat([mask, mask.new_ones(3, 3), more], 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)[:, -9:]
    told.clear()
    plain(turn, attention_mask=mask, position_ids=at, past_key_values=cache)
    assert all(told[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_head", [False, True], ids=["rows", "heads"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] > 1] + LARGE, ids=str)
def test_the_kernel_itself(shape, by_head, dtype):
    q, k, v, valid = inputs(shape, by_head, dtype, "cuda")
    assert why_not(q, k, v, 0.0) is None
    got = attention(q, k, v, 0.1, valid, holes=False)
    expected = attention(q.float(), k.float().nan_to_num(), v.float().nan_to_num(), 0.1, valid)
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    assert got.isfinite().all()
