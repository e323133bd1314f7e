"""The same as `naive.py` in one launch; a program reads a block of slots once for each neighbour."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, tiles
from pyramidkv.ops.launch import KNOWN, Launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["slots", "old"])
def pool_kernel(
    scores, valid, out, ssb, ssh, svb, svh, heads, slots, old,
    KERNEL: tl.constexpr, MAX: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(blocks of slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)
    scores += program // heads * ssb + program % heads * ssh
    valid += program // heads * svb + program % heads * svh
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(KERNEL):
        near = slot + step - KERNEL // 2
        inside = (near >= 0) & (near < old)
        real = inside
        if HAS_VALID:
            real = inside & (tl.load(valid + near, mask=inside, other=0) != 0)
        score = tl.load(scores + near, mask=real, other=0.0)
        if MAX:
            most = tl.maximum(most, tl.where(inside, score, float("-inf")))
        else:
            total += score
            count += real.to(tl.float32)
    pooled = most if MAX else tl.div_rn(total, tl.maximum(count, 1.0))
    own = tl.load(scores + slot, mask=(slot >= old) & (slot < slots), other=0.0)
    tl.store(out + program * slots + slot, tl.where(slot < old, pooled, own), mask=slot < slots)


def pool(scores: Tensor, kernel: int, kind: str, valid: Tensor | None = None, old: int | None = None) -> Tensor:
    """As `naive.pool`, of float32 scores."""
    scores = dense(scores)
    mask = None if valid is None else valid.contiguous().expand(scores.shape).view(torch.uint8)
    strides = scores.stride(), (0, 0) if mask is None else mask.stride()
    out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    launch = _launch(scores.shape, strides, kernel, kind, mask is not None, scores.shape[2] if old is None else old)
    launch(scores, scores if mask is None else mask, out)
    return out


@lru_cache(maxsize=KNOWN)
def _launch(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], kernel: int, kind: str, has_valid: bool, old: int
) -> Launch:
    """For this shape, and these strides of scores and mask."""
    rows, heads, slots = shape
    return Launch(
        pool_kernel, (tiles(slots, _BLOCK), rows * heads), *strides[0][:2], *strides[1][:2], heads, slots, old,
        KERNEL=kernel, MAX=kind == "max", HAS_VALID=has_valid, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
