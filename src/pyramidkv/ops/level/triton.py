"""The same as `naive.py` in one launch in place of some twenty: a program has all scores of a row and head."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.valid import by_head

_TINY = tl.constexpr(2.0**-126)  # the least normal float32


@triton.jit
def _mean(scores, valid, slots, BLOCK: tl.constexpr, HAS_VALID: tl.constexpr):
    """The mean of the scores that are valid; never 0."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for block in range(0, slots, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        real = slot < slots
        if HAS_VALID:
            real = real & (tl.load(valid + slot, mask=real, other=0) != 0)
        total += tl.load(scores + slot, mask=real, other=0.0)
        count += real.to(tl.int32)
    return tl.maximum(tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1), _TINY)


@triton.jit
def _write(out, scores, slots, scale, BLOCK: tl.constexpr):
    for block in range(0, slots, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        there = slot < slots
        tl.store(out + slot, tl.load(scores + slot, mask=there, other=0.0) * scale, mask=there)


@triton.jit(do_not_specialize=["past", "count"])
def level_kernel(
    older, new, valid, out, sob, soh, snb, snh, svb, svh, heads, past, count,
    BLOCK: tl.constexpr, FEW: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """(B * H,) programs."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    older += row * sob + head * soh
    new += row * snb + head * snh
    valid += row * svb + head * svh
    out += program * (past + count)
    mean = _mean(new, valid + past, count, FEW, HAS_VALID)
    _write(out, older, past, mean / _mean(older, valid, past, BLOCK, HAS_VALID), BLOCK)
    _write(out + past, new, count, 1.0, FEW)


def level(older: Tensor, new: Tensor, valid: Tensor | None = None) -> Tensor:
    """As `naive.level`."""
    older, new = dense(older), dense(new)
    out = torch.empty(*new.shape[:2], older.shape[2] + new.shape[2], dtype=torch.float32, device=new.device)
    mask = None if valid is None else by_head(valid).contiguous().expand(out.shape).view(torch.uint8)
    strides = tuple((0, 0) if t is None else t.stride()[:2] for t in (older, new, mask))
    _launch(older.shape, new.shape[2], strides, mask is None)(older, new, new if mask is None else mask, out)
    return out


@lru_cache(maxsize=KNOWN)
def _launch(older: tuple[int, ...], count: int, strides: tuple[tuple[int, ...], ...], all_valid: bool) -> Launch:
    """For these numbers of scores, and strides of both and of the mask."""
    rows, heads, past = older
    return Launch(
        level_kernel, (rows * heads,), *(n for pair in strides for n in pair), heads, past, count,
        BLOCK=min(4096, power_of_two(past)), FEW=min(1024, power_of_two(count)), HAS_VALID=not all_valid, num_warps=8,
    )  # fmt: skip
