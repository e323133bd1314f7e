"""Window scores and decode attention: plain definitions against float64, Triton against those, interpreted or on a GPU.

One test runs the interpreted ones of all files. Nothing of them runs where triton is not installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from attention_cases import exact_decode, new_token, ring_for, scores_case, slots_case
from kernel_testing import (
    DTYPES,
    ERROR,
    HAS_TRITON,
    INTERPRETED,
    distance,
    follows_the_length,
    interpreted,
    random,
    same,
)
from pyramidkv.ops import kernels
from pyramidkv.ops import window_scores as scores_package
from pyramidkv.ops.decode_attention import decode_attention, why_naive
from pyramidkv.ops.decode_attention import naive as decode_naive
from pyramidkv.ops.valid import by_head
from pyramidkv.ops.window_scores import naive as scores_naive
from pyramidkv.ops.window_scores import window_scores

# batch, query heads, KV heads, head size, queries, keys
SCORES = [
    (1, 1, 1, 32, 8, 8),
    (1, 2, 2, 80, 70, 150),  # more queries than one tile
    (2, 4, 2, 64, 7, 133),  # the heads of a group in one tile
    (1, 7, 1, 96, 20, 300),  # more rows than one tile, of mixed heads
    (1, 4, 1, 128, 129, 260),
    (1, 1, 1, 256, 16, 65),
    (7, 1, 1, 80, 9, 23),
]
# batch, query heads, KV heads, head size, capacity
DECODE = [
    (1, 2, 2, 80, 150),
    (7, 2, 1, 64, 33),
    (2, 7, 1, 128, 130),
    (1, 4, 1, 32, 17),
    (2, 3, 3, 96, 67),
    (1, 1, 1, 256, 40),
    (1, 4, 2, 80, 300),
]


def decode_case(shape, dtype, kind, device="cpu", room=False):
    """Queries, and buffers, lengths, starts and used slots as `slots_case` has them."""
    batch, heads, kv_heads, size, capacity = shape
    query = random(batch, heads, 1, size, seed=1, dtype=dtype, device=device)
    return query, *slots_case((batch, kv_heads, capacity, size), dtype, kind, device, room)


def exact_scores(query, key, scaling, valid, power, per_visible):
    """The definition by one loop over the queries, float64."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    key = key.double().repeat_interleave(heads // kv_heads, 1)
    total = torch.zeros(batch, heads, keys, dtype=torch.float64)
    terms = torch.zeros(batch, 1, keys)
    real = torch.ones(batch, keys, dtype=torch.bool) if valid is None else valid
    real = by_head(real).expand(batch, kv_heads, keys).repeat_interleave(heads // kv_heads, 1)
    for i in range(queries):
        own = keys - queries + i
        seen = real & (torch.arange(keys) <= own)
        logit = torch.einsum("bhd,bhkd->bhk", query[:, :, i].double(), key) * scaling
        share = logit.masked_fill(~seen, float("-inf")).softmax(-1)
        asks = real[:, :, own, None]
        total += torch.where(asks, share, 0.0) ** power
        terms += (asks & ((torch.arange(keys) <= own) | (not per_visible)))[:, :1]
    total = total.unflatten(1, (kv_heads, -1)).sum(2) / (heads // kv_heads)
    return (total / terms.clamp(min=1)) ** (1 / power)


def behind_case(shape, dtype, kind, device="cpu"):
    """Queries that come from behind the sequence, their keys, which keys are real and which queries count."""
    batch, heads, _, size, queries, _ = shape
    _, key, valid = scores_case(shape, dtype, kind, device)
    query = random(batch, queries + 1, heads, size, seed=5, dtype=dtype, device=device)[:, 1:].transpose(1, 2)
    if kind == "none":
        return query, key, valid, None
    asking = (torch.arange(queries) % 5 != 3).repeat(batch, 1)
    asking[-1, : queries // 2] = False
    asking = asking.to(device)
    return query.masked_fill(~asking[:, None, :, None], float("nan")), key, valid, asking


def exact_behind(query, key, scaling, valid, asking, power):
    """The definition by one loop over the queries, float64."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    key = key.double().repeat_interleave(heads // kv_heads, 1)
    real = torch.ones(batch, keys, dtype=torch.bool) if valid is None else valid
    asking = torch.ones(batch, queries, dtype=torch.bool) if asking is None else asking
    total = torch.zeros(batch, heads, keys, dtype=torch.float64)
    for i in range(queries):
        logit = torch.einsum("bhd,bhkd->bhk", query[:, :, i].double(), key) * scaling
        share = logit.masked_fill(~real[:, None], float("-inf")).softmax(-1)
        total += torch.where(asking[:, i, None, None], share, 0.0) ** power
    total = total.unflatten(1, (kv_heads, -1)).sum(2) / (heads // kv_heads)
    return (total / asking.sum(1).clamp(min=1)[:, None, None]) ** (1 / power)


@pytest.mark.parametrize("shape", SCORES)
@pytest.mark.parametrize("kind", ["none", "padding", "holes", "heads"])
@pytest.mark.parametrize(("power", "per_visible"), [(1, False), (2, True), (2, False)])
def test_window_scores_are_their_definition(shape, kind, power, per_visible):
    query, key, valid = scores_case(shape, torch.float32, kind)
    got = window_scores(query, key, 0.2, valid, power=power, per_visible=per_visible)
    expected = exact_scores(query, key, 0.2, valid, power, per_visible)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert distance(got, expected) < 1e-5


@pytest.mark.parametrize("shape", SCORES)
@pytest.mark.parametrize("kind", ["none", "padding", "holes"])
@pytest.mark.parametrize("power", [1, 2])
def test_window_scores_from_behind_are_their_definition(shape, kind, power):
    query, key, valid, asking = behind_case(shape, torch.float32, kind)
    got = window_scores(query, key, 0.2, valid, power=power, per_visible=True, behind=True, asking=asking)
    assert distance(got, exact_behind(query, key, 0.2, valid, asking, power)) < 1e-5


@pytest.mark.parametrize("shape", DECODE)
@pytest.mark.parametrize("kind", ["number", "one", "each", "none"])
def test_decode_attention_is_its_definition(shape, kind):
    query, keys, values, length, start, used = decode_case(shape, torch.float32, kind)
    got = decode_attention(query, keys, values, length, start, 0.2)
    assert got.shape == query.shape
    assert distance(got, exact_decode(query, keys, values, used, 0.2)) < 1e-5


@pytest.mark.parametrize("shape", DECODE)
@pytest.mark.parametrize("kind", ["number", "one", "each", "none"])
def test_a_new_token_is_attended_to_and_written(shape, kind):
    query, keys, values, length, start, used = decode_case(shape, torch.float32, kind, room=True)
    new = new_token(keys)
    got = decode_attention(query, keys, values, length, start, 0.2, new)
    slot = torch.arange(shape[-1])
    lengths = (
        length if isinstance(length, int) else length.reshape(-1, 1, 1) if length.numel() == 1 else length[..., None]
    )
    used = used | (slot == lengths)
    assert distance(got, exact_decode(query, keys, values, used, 0.2)) < 1e-5
    for buffer, tensor in zip((keys, values), new, strict=True):
        assert torch.equal(buffer[used & (slot == lengths)], tensor.flatten(0, 2))


@pytest.mark.parametrize("kind", ["number", "one", "each"])
def test_the_query_goes_into_a_ring(kind):
    query, keys, values, length, start, _ = decode_case((7, 6, 2, 32, 31), torch.float32, kind, room=True)
    ring = ring_for(query, 5)
    decode_attention(query, keys, values, length, start, 0.2, new_token(keys), ring)
    for row in range(7):
        for head in range(6):
            slot = length if isinstance(length, int) else length.expand(7, 2)[row, head // 3].item()
            expected = torch.full((5, 32), 7.0)
            expected[slot % 5] = query[row, head, 0]
            assert torch.equal(ring[row, head], expected)


def test_the_dtype_of_the_query_comes_back():
    query, keys, values, length, start, _ = decode_case(DECODE[0], torch.bfloat16, "each")
    assert decode_attention(query, keys, values, length, start, 0.2).dtype == torch.bfloat16


def test_the_reason_for_plain_torch_is_given(monkeypatch):
    query = torch.zeros(1, 2, 1, 64)
    assert "on cpu" in why_naive(query) and "on cpu" in scores_package.why_naive(query)
    monkeypatch.setenv("PYRAMIDKV_TRITON", "0")
    assert why_naive(query) == "PYRAMIDKV_TRITON=0"


def test_both_trace_whole_under_compile():
    query, keys, values, _, start, _ = decode_case(DECODE[0], torch.float32, "each")
    length = torch.tensor([9], dtype=torch.int32)
    step = torch.compile(lambda *x: decode_attention(*x, start, 0.2), backend="eager", fullgraph=True)
    torch.testing.assert_close(
        step(query, keys, values, length), decode_attention(query, keys, values, length, start, 0.2), equal_nan=True
    )


@pytest.mark.parametrize(("size", "expected"), [(64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (72, (64, 16))])
def test_head_sizes_are_two_powers_of_two(size, expected):
    assert kernels.parts(size) == expected


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="triton is not installed")
@pytest.mark.skipif(
    numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4"
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_in_its_interpreter(which):
    files = [file for file in Path(__file__).parent.glob("test_*.py") if "\n@interpreted" in file.read_text()]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "interpreted", "-m", f"{which} and not gpu", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


@interpreted
@pytest.mark.parametrize("shape", SCORES)
@pytest.mark.parametrize(
    ("kind", "power", "per_visible"), [("none", 1, False), ("none", 2, True), ("holes", 1, False), ("heads", 2, True)]
)
def test_interpreted_window_scores(shape, kind, power, per_visible):
    from pyramidkv.ops.window_scores import triton

    query, key, valid = scores_case(shape, torch.float32, kind)
    got = triton.window_scores(query, key, 0.2, valid, power=power, per_visible=per_visible)
    expected = scores_naive.window_scores(query, key, 0.2, valid, power=power, per_visible=per_visible)
    assert distance(got, expected) < 1e-5
    assert not got.isnan().any()


@interpreted
@pytest.mark.parametrize("split", [True, False])
def test_interpreted_window_scores_in_half_precision(split):
    from pyramidkv.ops.window_scores import triton

    dtype = torch.float16  # the interpreter's dot takes bfloat16 for integers
    query, key, _ = scores_case((1, 2, 1, 80, 40, 600 if split else 90), dtype, "none")
    got = triton.window_scores(query, key, 0.1)
    assert distance(got, scores_naive.window_scores(query.float(), key.float(), 0.1)) < ERROR[dtype]


@interpreted
@pytest.mark.parametrize("shape", SCORES)
@pytest.mark.parametrize("kind", ["none", "padding", "holes", "asking"])
def test_interpreted_window_scores_from_behind(shape, kind):
    from pyramidkv.ops.window_scores import triton

    query, key, valid, asking = behind_case(shape, torch.float32, "holes" if kind == "asking" else kind)
    if kind == "asking":
        key, valid = key.nan_to_num(), None
    options = {"power": 2, "behind": True, "asking": asking}
    got = triton.window_scores(query, key, 0.2, valid, **options)
    assert distance(got, scores_naive.window_scores(query, key, 0.2, valid, **options)) < 1e-5


@interpreted
@pytest.mark.parametrize("shape", DECODE)
@pytest.mark.parametrize("kind", ["number", "one", "each", "none"])
@pytest.mark.parametrize("fresh", [False, True])
def test_interpreted_decode_attention(shape, kind, fresh):
    from pyramidkv.ops.decode_attention import triton

    query, keys, values, length, start, _ = decode_case(shape, torch.float32, kind, room=fresh)
    new = new_token(keys) if fresh else None
    before = keys.clone(), values.clone()
    rings = [ring_for(query, 11) if fresh else None for _ in range(2)]
    got = triton.decode_attention(query, keys, values, length, start, 0.2, new, rings[0])
    assert distance(got, decode_naive.decode_attention(query, *before, length, start, 0.2, new, rings[1])) < 1e-5
    assert not fresh or torch.equal(*rings)
    assert same((keys, values), before)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_interpreted_decode_attention_in_all_its_variants(dtype, halves, dot):
    from pyramidkv.ops.decode_attention import triton

    if dot and dtype == torch.bfloat16:
        pytest.skip("the interpreter's dot takes bfloat16 for integers")
    query, keys, values, length, start, _ = decode_case((2, 2, 2, 80, 200), dtype, "each")
    blocks = triton.Blocks(64, 16, 4, 2, halves, dot)
    got = triton.decode_attention(query, keys, values, length, start, 0.2, blocks=blocks)
    reference = decode_naive.decode_attention(query.float(), keys.float(), values.float(), length, start, 0.2)
    assert distance(got, reference) < ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "holes", "heads"])
@pytest.mark.parametrize("heads", [(32, 32, 80), (32, 8, 128), (28, 4, 128), (4, 1, 256), (8, 8, 96), (8, 4, 64)])
@pytest.mark.parametrize("window", [8, 33, 256, 1024])
def test_gpu_window_scores(dtype, kind, heads, window):
    query, key, valid = scores_case((1, *heads, window, 3001), dtype, kind, "cuda")
    assert scores_package.why_naive(query) is None
    got = window_scores(query, key, heads[2] ** -0.5, valid, power=2, per_visible=True)
    expected = scores_naive.window_scores(
        query.float(), key.float(), heads[2] ** -0.5, valid, power=2, per_visible=True
    )
    assert distance(got, expected) < ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.parametrize("heads", [(32, 32, 80), (32, 8, 128), (4, 1, 256)])
@pytest.mark.parametrize("queries", [33, 512])
def test_gpu_window_scores_from_behind(dtype, kind, heads, queries):
    query, key, valid, asking = behind_case((1, *heads, queries, 3001), dtype, kind, "cuda")
    options = {"power": 2, "behind": True, "asking": asking}
    got = window_scores(query, key, heads[2] ** -0.5, valid, **options)
    expected = scores_naive.window_scores(query.float(), key.float(), heads[2] ** -0.5, valid, **options)
    assert distance(got, expected) < ERROR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "one", "each", "none"])
@pytest.mark.parametrize("heads", [(32, 32, 80), (32, 8, 128), (28, 4, 128), (4, 1, 256), (8, 8, 96), (8, 4, 64)])
@pytest.mark.parametrize("fresh", [False, True])
def test_gpu_decode_attention(dtype, kind, heads, fresh):
    query, keys, values, length, start, _ = decode_case((7, *heads, 1691), dtype, kind, "cuda", room=fresh)
    new = new_token(keys) if fresh else None
    exact = keys.float(), values.float()
    rings = [ring_for(query, 130) if fresh else None for _ in range(2)]
    expected = decode_naive.decode_attention(query.float(), *exact, length, start, heads[2] ** -0.5, new, rings[1])
    got = decode_attention(query, keys, values, length, start, heads[2] ** -0.5, new, rings[0])
    assert not fresh or torch.equal(*rings)
    assert distance(got, expected) < ERROR[dtype]
    assert same((keys.float(), values.float()), exact)


@pytest.mark.gpu
def test_a_graph_stays_right_as_the_length_grows():
    query, keys, values, _, _, _ = decode_case((2, 32, 32, 80, 800), torch.float16, "number", "cuda")
    keys, values = keys.nan_to_num(), values.nan_to_num()
    exact = (query.float(), keys.float(), values.float())
    assert follows_the_length(
        lambda length: decode_attention(query, keys, values, length, None, 0.1),
        lambda length: decode_naive.decode_attention(*exact, length, None, 0.1),
        (300, 301, 640, 798, 1, 0),
    )
