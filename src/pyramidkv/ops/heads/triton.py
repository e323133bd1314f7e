"""The same as `naive.py` in two launches: what each page of each head is worth, and who gets which.

A program sorts the scores of a head in its registers. Another hands out the pages of a row without a sort: it finds the
last one's worth by bisection, as selection does (`ops/select`).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.heads.naive import row_facts
from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.quantize import PAGE

_NEVER = tl.constexpr(-2139095041)  # of -inf
_ALWAYS = tl.constexpr(2139095040)  # of +inf
_LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit(do_not_specialize=["slots"])
def worth_kernel(scores, worth, held, ssb, ssh, heads, slots, BLOCK: tl.constexpr):
    """(B * H,) programs: the mean of a head's best 64 slots, of the next 64, ...; and how many it holds."""
    program = tl.program_id(0).to(tl.int64)
    PAGES: tl.constexpr = BLOCK // 64
    slot = tl.arange(0, BLOCK)
    scores += program // heads * ssb + program % heads * ssh
    x = tl.load(scores + slot, mask=slot < slots, other=float("-inf"))
    tl.store(held + program, tl.sum((x > float("-inf")).to(tl.int32), 0))
    x = tl.sort(tl.where(x == float("inf"), float("-inf"), x), descending=True)
    x = tl.reshape(x, [PAGES, 64])
    real = x > float("-inf")
    count = tl.sum(real.to(tl.int32), 1)
    x = tl.where(real, x, 0.0)
    for half in tl.static_range(6):  # in an order that does not depend on the tile: the first half and the second
        x = tl.sum(tl.reshape(x, [PAGES, 2, 32 >> half]), 1)
    mean = tl.div_rn(tl.reshape(x, [PAGES]), tl.maximum(count, 1).to(tl.float32))
    mean = tl.where(count > 0, tl.maximum(mean, _LEAST), float("-inf"))
    tl.store(worth + program * PAGES + tl.arange(0, PAGES), mean)


@triton.jit(do_not_specialize=["recent"])
def share_kernel(worth, held, facts, limits, rows, heads, recent, HEADS: tl.constexpr, PAGES: tl.constexpr):
    """(B,) programs: the best pages of a row, equal ones in the order of its heads."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(facts + row)
    total = tl.load(facts + rows + row)
    everything = tl.load(facts + 2 * rows + row)
    lane = tl.arange(0, HEADS * PAGES)
    others = (lane < heads * PAGES) & (lane % PAGES >= own)
    bits = tl.load(worth + row * heads * PAGES + lane, mask=others, other=float("-inf")).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    key = tl.where(key == -1, 0, key)  # -0.0 equals 0.0
    real = key > _NEVER
    # The last page handed out lies in [low, high): enough lie at or above low, fewer at or above high.
    at_low = tl.sum(real.to(tl.int32), 0)
    at_high = 0
    limit = tl.minimum(total - heads * own, at_low)
    low = tl.min(tl.where(real, key, _ALWAYS), 0)
    high = tl.max(key, 0) + 1
    while (at_low > limit) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, of any two integers
        count = tl.sum((key >= middle).to(tl.int32), 0)
        if count >= limit:
            low = middle
            at_low = count
        else:
            high = middle
            at_high = count
    level = (key >= low) & (key < high)
    won = (key >= high) | (level & (tl.cumsum(level.to(tl.int32), 0) <= limit - at_high))
    pages = tl.sum(tl.reshape((won & real).to(tl.int32), [HEADS, PAGES]), 1)
    head = tl.arange(0, HEADS)
    most = tl.load(held + row * heads + head, mask=head < heads, other=0)
    slots = tl.where(everything > 0, most, tl.minimum(recent + 64 * (pages + own), most))
    tl.store(limits + row * heads + head, slots, mask=head < heads)


def head_limits(scores: Tensor, shares: Sequence[int], available: Sequence[int], recent: int) -> Tensor:
    """As `naive.head_limits`, of (B, H, K) float32 scores."""
    return hand_out(scores, row_facts(scores.shape[1], shares, available, recent, scores.device), recent)


def hand_out(scores: Tensor, facts: Tensor, recent: int) -> Tensor:
    """The same, from what `row_facts` gives."""
    rows, heads, slots = scores.shape
    scores = dense(scores)
    block = max(2 * PAGE, power_of_two(slots))
    worth = scores.new_empty(rows, heads, block // PAGE)
    held, limits = (scores.new_empty(rows, heads, dtype=torch.int32) for _ in range(2))
    worth_kernel[(rows * heads,)](
        scores, worth, held, *scores.stride()[:2], heads, slots, BLOCK=block, num_warps=max(1, block // 512)
    )
    lanes = power_of_two(heads) * worth.shape[2]
    share_kernel[(rows,)](
        worth, held, facts, limits, rows, heads, recent,
        HEADS=power_of_two(heads), PAGES=worth.shape[2], num_warps=max(1, min(32, lanes // 256)),
    )  # fmt: skip
    return limits
