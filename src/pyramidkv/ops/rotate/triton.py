"""The same as `naive.py`, to the last bit, in one launch that reads and writes each number once."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch


@dataclass(frozen=True)
class Blocks:
    """What a program rotates."""

    rows: int = 8  # tokens of one head
    warps: int = 4


@triton.jit
def _product(x, y):
    """Rounded, as a tensor that torch writes to memory would be."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def rotate_kernel(
    query, key, cos, sin, new_query, new_key, count, sqb, sqh, sqn, skb, skh, skn, scb, scn, ssb, ssn,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    LANES: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(HEADS + KV_HEADS, blocks of tokens, B) programs: a block of one head. HALF pairs in LANES lanes, the other
    channels in REST lanes."""
    far = tl.full([], 1, tl.int64)  # offsets pass 2^31 in long prompts
    head, block, row = tl.program_id(0), tl.program_id(1) * ROWS, far * tl.program_id(2)
    lane = tl.arange(0, ROWS)
    there = (block + lane < count)[:, None]
    token = (block + lane)[:, None]
    if head < HEADS:
        vectors = query + row * sqb + far * head * sqh + far * block * sqn + lane[:, None] * sqn
        out = new_query + (row * count + token) * (HEADS * SIZE) + head * SIZE
    else:
        head -= HEADS
        vectors = key + row * skb + far * head * skh + far * block * skn + lane[:, None] * skn
        out = new_key + ((row * KV_HEADS + head) * count + token) * SIZE
    if REST > 0:
        other = 2 * HALF + tl.arange(0, REST)[None, :]
        rest = tl.load(vectors + other, mask=there & (other < SIZE), other=0.0)
        tl.store(out + other, rest, mask=there & (other < SIZE))
    pair = tl.arange(0, LANES)[None, :]
    paired = there & (pair < HALF)
    cos += row * scb + token * scn + pair
    sin += row * ssb + token * ssn + pair
    one = tl.load(vectors + pair, mask=paired, other=0.0)
    two = tl.load(vectors + HALF + pair, mask=paired, other=0.0)
    first = _product(one, tl.load(cos, mask=paired, other=0.0))
    first += _product(-two, tl.load(sin, mask=paired, other=0.0))
    second = _product(two, tl.load(cos + HALF, mask=paired, other=0.0))
    second += _product(one, tl.load(sin + HALF, mask=paired, other=0.0))
    tl.store(out + pair, first.to(out.dtype.element_ty), mask=paired)
    tl.store(out + HALF + pair, second.to(out.dtype.element_ty), mask=paired)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, blocks: Blocks | None = None) -> tuple[Tensor, Tensor]:
    """As `naive.rotate`. Any strides do, as long as the channels lie side by side."""
    query, key, cos, sin = (dense(t) for t in (query, key, cos, sin))
    (batch, heads, count, size), kv_heads = query.shape, key.shape[1]
    out = query.new_empty(batch, count, heads, size).transpose(1, 2), key.new_empty(batch, kv_heads, count, size)
    if count:
        strides = tuple(t.stride() for t in (query, key, cos, sin))
        launch = _launch(query.shape, kv_heads, cos.shape, sin.shape[0], strides, blocks or Blocks())
        launch(query, key, cos, sin, *out)
    return out


@lru_cache(maxsize=KNOWN)
def _launch(
    query: tuple[int, ...],
    kv_heads: int,
    cos: tuple[int, ...],
    sin_rows: int,
    strides: tuple[tuple[int, ...], ...],
    blocks: Blocks,
) -> Launch:
    """For these shapes, and strides of queries, keys, cosines and sines."""
    (batch, heads, count, size), rotated = query, cos[-1]
    angles = [s[:2] if rows == batch else (0, s[1]) for rows, s in ((cos[0], strides[2]), (sin_rows, strides[3]))]
    return Launch(
        rotate_kernel, (heads + kv_heads, tiles(count, blocks.rows), batch),
        count, *strides[0][:3], *strides[1][:3], *angles[0], *angles[1],
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF=rotated // 2,
        LANES=power_of_two(rotated // 2), REST=power_of_two(size - rotated) if size > rotated else 0,
        ROWS=blocks.rows, num_warps=blocks.warps, enable_fp_fusion=False,  # fused, a product would not be rounded
    )  # fmt: skip
