"""The same as `naive.py`, to the last bit, in one launch that reads and writes each number once."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch


@dataclass(frozen=True)
class Blocks:
    """What a program turns."""

    rows: int = 64  # vectors
    warps: int = 4


@triton.jit(do_not_specialize=["count"])
def turn_kernel(
    vectors, cos, sin, out, svb, svh, svn, heads, count,
    SIZE: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(blocks of vectors, B * H) programs. HALF pairs in LANES lanes, and the other channels in REST lanes."""
    far = tl.full([], 1, tl.int64)  # offsets pass 2^31 in long prompts
    block, head = tl.program_id(0) * ROWS, tl.program_id(1)
    row = head // heads
    lane = tl.arange(0, ROWS)
    there = (block + lane < count)[:, None]
    vectors += far * row * svb + far * (head % heads) * svh + far * block * svn + lane[:, None] * svn
    out += (far * head * count + block) * SIZE + lane[:, None] * SIZE
    pair = tl.arange(0, LANES)[None, :]
    inside = pair < HALF
    paired = there & inside
    one = tl.load(vectors + pair, mask=paired, other=0.0).to(tl.float32)
    two = tl.load(vectors + HALF + pair, mask=paired, other=0.0).to(tl.float32)
    if REST > 0:
        other = 2 * HALF + tl.arange(0, REST)[None, :]
        rest = tl.load(vectors + other, mask=there & (other < SIZE), other=0.0)
        tl.store(out + other, rest, mask=there & (other < SIZE))
    x = tl.load(cos + row * HALF + pair, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(sin + row * HALF + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, (one * x - two * y).to(out.dtype.element_ty), mask=paired)
    tl.store(out + HALF + pair, (two * x + one * y).to(out.dtype.element_ty), mask=paired)


def turn(vectors: Tensor, cos: Tensor, sin: Tensor, blocks: Blocks | None = None) -> Tensor:
    """As `naive.turn`. Any strides do, as long as the channels lie side by side."""
    vectors, cos, sin = dense(vectors), cos.contiguous(), sin.contiguous()
    out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    if out.numel():
        _launch(vectors.shape, vectors.stride(), cos.shape[-1], blocks or Blocks())(vectors, cos, sin, out)
    return out


@lru_cache(maxsize=KNOWN)
def _launch(shape: tuple[int, ...], strides: tuple[int, ...], half: int, blocks: Blocks) -> Launch:
    batch, heads, count, size = shape
    return Launch(
        turn_kernel, (tiles(count, blocks.rows), batch * heads), *strides[:3], heads, count,
        SIZE=size, HALF=half, LANES=power_of_two(half), ROWS=blocks.rows,
        REST=power_of_two(size - 2 * half) if size > 2 * half else 0,
        num_warps=blocks.warps, enable_fp_fusion=False,  # fused, a product would not be rounded
    )  # fmt: skip
