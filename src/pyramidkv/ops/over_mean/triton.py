"""The same as `naive.py` in one launch: a program reads the scores of a head twice, for the means and for the rest."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.valid import by_head

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _read(newer, scores, valid, block, slots, older, BLOCK: tl.constexpr, HAS_VALID: tl.constexpr):
    """Both scores of some slots, and which slots count."""
    slot = block + tl.arange(0, BLOCK)
    real = slot < slots
    if HAS_VALID:
        real = real & (tl.load(valid + slot, mask=real, other=0) != 0)
    one = tl.load(newer + slot - older, mask=real & (slot >= older), other=0.0)
    return slot, real, one, tl.load(scores + slot, mask=real, other=0.0)


@triton.jit(do_not_specialize=["slots", "older"])
def over_mean_kernel(
    newer, scores, valid, out, snb, snh, ssb, ssh, svb, svh, heads, slots, older,
    BLOCK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """(B * H,) programs."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    newer += row * snb + head * snh
    scores += row * ssb + head * ssh
    valid += row * svb + head * svh
    ones = tl.zeros([BLOCK], tl.float32)
    twos = tl.zeros([BLOCK], tl.float32)
    reals = tl.zeros([BLOCK], tl.int32)
    for block in range(0, slots, BLOCK):
        _, real, one, two = _read(newer, scores, valid, block, slots, older, BLOCK, HAS_VALID)
        ones += one
        twos += two
        reals += real.to(tl.int32)
    count = tl.maximum(tl.sum(reals, 0), 1).to(tl.float32)
    one_mean = tl.maximum(tl.sum(ones, 0) / count, _TINY)
    two_mean = tl.maximum(tl.sum(twos, 0) / count, _TINY)
    for block in range(0, slots, BLOCK):
        slot, _, one, two = _read(newer, scores, valid, block, slots, older, BLOCK, HAS_VALID)
        larger = tl.maximum(one / one_mean, two / two_mean, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + program * slots + slot, larger, mask=slot < slots)


def over_mean(newer: Tensor, scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """As `naive.over_mean`."""
    rows, heads, slots = scores.shape
    newer, scores = dense(newer), dense(scores)
    mask = None if valid is None else by_head(valid).contiguous().expand(scores.shape).view(torch.uint8)
    out = torch.empty(rows, heads, slots, dtype=torch.float32, device=scores.device)
    block = max(128, min(4096, power_of_two(slots)))
    over_mean_kernel[(rows * heads,)](
        newer, scores, scores if mask is None else mask, out, *newer.stride()[:2], *scores.stride()[:2],
        *(0, 0) if mask is None else mask.stride()[:2], heads, slots, slots - newer.shape[2],
        BLOCK=block, HAS_VALID=mask is not None, num_warps=max(1, block // 256),
    )  # fmt: skip
    return out
