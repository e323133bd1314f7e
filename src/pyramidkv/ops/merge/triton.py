"""The same as `naive.py` in one launch, bound by the bytes that it moves."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.merge.naive import Part


@dataclass(frozen=True)
class Blocks:
    """What a program merges."""

    rows: int = 32  # queries
    warps: int = 8


@triton.jit
def _lse(base, row, there):
    """Log-sum-exps; nothing seen is -inf."""
    lse = tl.load(base + row, mask=there, other=0.0)
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    one, two, three, lse1, lse2, lse3, out,
    b1, h1, n1, b2, h2, n2, b3, h3, n3, bo, ho, no, heads, count,
    SIZE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    """(tiles of queries, B * H) programs. SIZE channels in WIDE lanes."""
    program = tl.program_id(1).to(tl.int64)  # offsets pass 2^31 in large batches
    batch, head = program // heads, program % heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < count
    x1 = _lse(lse1 + program * count, row, there)
    x2 = _lse(lse2 + program * count, row, there)
    top = tl.maximum(x1, x2)
    x3 = x2
    if THREE:
        x3 = _lse(lse3 + program * count, row, there)
        top = tl.maximum(top, x3)
    top = tl.where(top == float("-inf"), 0.0, top)
    w1, w2, w3 = tl.exp(x1 - top), tl.exp(x2 - top), tl.exp(x3 - top)
    total = w1 + w2
    if THREE:
        total += w3
    total = tl.where(total == 0, 1.0, total)
    channel = tl.arange(0, WIDE)[None, :]
    inside = there[:, None] & (channel < SIZE)
    row = row[:, None]
    a = tl.load(one + batch * b1 + head * h1 + row * n1 + channel, mask=inside, other=0.0)
    b = tl.load(two + batch * b2 + head * h2 + row * n2 + channel, mask=inside, other=0.0)
    mean = a.to(tl.float32) * (w1 / total)[:, None] + b.to(tl.float32) * (w2 / total)[:, None]
    if THREE:
        c = tl.load(three + batch * b3 + head * h3 + row * n3 + channel, mask=inside, other=0.0)
        mean += c.to(tl.float32) * (w3 / total)[:, None]
    tl.store(out + batch * bo + head * ho + row * no + channel, mean.to(out.dtype.element_ty), mask=inside)


def merge(given: Sequence[Part], out: Tensor, *, blocks: Blocks | None = None) -> None:
    """As `naive.merge`, of two or three parts. Any strides do, as long as the channels lie side by side."""
    if out.stride(-1) != 1:
        raise ValueError("out: its channels must lie side by side")
    if out.numel() == 0:
        return
    three = len(given) == 3
    over = [dense(part) for part, _ in given]
    lses = [lse.float().contiguous() for _, lse in given]
    if not three:
        over.append(over[-1])
        lses.append(lses[-1])
    strides = tuple(t.stride() for t in (*over, out))
    _launch(out.shape, strides, three, blocks or Blocks())(*over, *lses, out)


@lru_cache(maxsize=KNOWN)
def _launch(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], three: bool, blocks: Blocks) -> Launch:
    batch, heads, count, size = shape
    return Launch(
        merge_kernel, (tiles(count, blocks.rows), batch * heads),
        *(n for part in strides for n in part[:3]), heads, count,
        SIZE=size, WIDE=power_of_two(size), ROWS=blocks.rows, THREE=three, num_warps=blocks.warps,
    )  # fmt: skip
