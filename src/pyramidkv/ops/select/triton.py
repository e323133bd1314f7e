"""The same as `naive.py`, without a sort: one program finds the limit-th highest score of a row and head by bisection.

Scores become integers of the same order, so that bisection ends: each step counts the slots at or above the middle of
the bracket, and it stops as soon as exactly as many as may be kept lie above its lower end, after some 16 steps when no
two scores are equal, and after 32 at the most. One cumulative sum then gives every kept slot its place. Up to
`WHOLE` slots stay in registers; more are read again at each step, from the L2 cache.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.select.naive import spread
from pyramidkv.ops.valid import by_head

WHOLE = 32768  # most slots that a program keeps in registers
STEP = 8192  # most slots whose places are found at once: that takes several registers a slot
_NEVER = tl.constexpr(-2139095041)  # of -inf
_ALWAYS = tl.constexpr(2139095040)  # of +inf


@dataclass(frozen=True)
class Blocks:
    """How a program reads its slots."""

    block: int  # slots at once; all of them if no fewer than K
    warps: int
    step: int = STEP  # of `block`, at most so many when they are written


def choose(slots: int) -> Blocks:
    """Tiles for K slots: 16 of them a thread, or all 32 warps."""
    block = max(32, power_of_two(slots))
    if block > WHOLE:
        return Blocks(STEP, 32)
    return Blocks(block, max(1, min(32, block // 512)))


@triton.jit
def _keys(scores, valid, block, slots, newest, BLOCK: tl.constexpr, HAS_VALID: tl.constexpr, FINITE: tl.constexpr):
    """Integers in the order of the scores from `block` on; all slots from `newest` on are `_ALWAYS`."""
    slot = block + tl.arange(0, BLOCK)
    inside = slot < slots
    bits = tl.load(scores + slot, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)  # -0.0 equals 0.0
    if FINITE:
        key = tl.minimum(tl.maximum(key, _NEVER + 1), _ALWAYS - 1)
    key = tl.where((bits & 0x7FFFFFFF) > _ALWAYS, _NEVER + 1, key)  # NaN
    key = tl.where(slot >= newest, _ALWAYS, key)
    if HAS_VALID:
        inside = inside & (tl.load(valid + slot, mask=inside, other=0) != 0)
    return tl.where(inside, key, _NEVER)


@triton.jit
def _newest(valid, slots, recent, BLOCK: tl.constexpr):
    """The first of the last `recent` valid slots."""
    first = slots
    block = (slots - 1) // BLOCK * BLOCK
    left = recent
    while (left > 0) & (block >= 0):
        slot = block + tl.arange(0, BLOCK)
        real = (tl.load(valid + slot, mask=slot < slots, other=0) != 0).to(tl.int32)
        total = tl.sum(real, 0)
        after = total - tl.cumsum(real, 0) + real  # valid slots of the block from here on
        first = tl.minimum(first, tl.min(tl.where((real > 0) & (after <= left), slot, slots), 0))
        left -= total
        block -= BLOCK
    return first


@triton.jit
def _write(out, key, block, low, high, place, need, BLOCK: tl.constexpr):
    """Write the slots of a block at or above `high`, and the first `need` of those in [low, high), from `place` on."""
    sure = key >= high
    level = (key >= low) & (key < high)
    both = sure.to(tl.uint32) + (level.to(tl.uint32) << 16)  # two counts in one sum: a block has at most 2^15 slots
    count = tl.cumsum(both, 0)
    levels = (count >> 16).to(tl.int32)
    where = place + (count & 0xFFFF).to(tl.int32) + tl.minimum(levels, need) - 1
    slot = block + tl.arange(0, BLOCK)
    tl.store(out + where, slot.to(tl.int64), mask=sure | (level & (levels <= need)))
    total = tl.sum(both, 0)
    used = tl.minimum((total >> 16).to(tl.int32), need)
    return place + (total & 0xFFFF).to(tl.int32) + used, need - used


@triton.jit(do_not_specialize=["limit", "width", "newest"])
def select_kernel(
    scores, valid, limits, out, ssb, ssh, svb, svh, slb, slh, heads, slots, limit, width, newest,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr, WHOLE: tl.constexpr,
    HAS_VALID: tl.constexpr, FINITE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """(B * H,) programs. `newest` is the first slot kept in any case; with `valid`, how many such slots there are."""
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    scores += batch * ssb + head * ssh
    valid += batch * svb + head * svh
    out += program * width
    if EACH:
        limit = tl.load(limits + batch * slb + head * slh)
    if HAS_VALID:
        newest = _newest(valid, slots, newest, TAIL)
    if WHOLE:
        key = _keys(scores, valid, 0, slots, newest, BLOCK, HAS_VALID, FINITE)
        real = key > _NEVER
        always = (key == _ALWAYS).to(tl.int32)
        lows = tl.where(real, key, _ALWAYS)
        tops = tl.where(key < _ALWAYS, key, _NEVER)
        reals = real.to(tl.int32)
    else:
        lows = tl.full([BLOCK], _ALWAYS, tl.int32)
        tops = tl.full([BLOCK], _NEVER, tl.int32)
        reals = tl.zeros([BLOCK], tl.int32)
        always = tl.zeros([BLOCK], tl.int32)
        for block in range(0, slots, BLOCK):
            key = _keys(scores, valid, block, slots, newest, BLOCK, HAS_VALID, FINITE)
            real = key > _NEVER
            always += (key == _ALWAYS).to(tl.int32)
            lows = tl.minimum(lows, tl.where(real, key, _ALWAYS))
            tops = tl.maximum(tops, tl.where(key < _ALWAYS, key, _NEVER))
            reals += real.to(tl.int32)
    # The limit-th highest lies in [low, high): at least `limit` slots are at or above low, fewer at or above high.
    at_low = tl.sum(reals, 0)
    at_high = tl.sum(always, 0)
    low = tl.min(lows, 0)
    high = tl.max(tops, 0) + 1
    limit = tl.minimum(tl.minimum(limit, width), at_low)
    if at_high >= limit:  # it is one of those kept in any case, or none is kept
        at_low = at_high
        at_high = 0
        low = tl.full([], _ALWAYS, tl.int32)
        high = tl.full([], _ALWAYS + 1, tl.int32)
    while (at_low > limit) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, of any two integers
        if WHOLE:
            above = (key >= middle).to(tl.int32)
        else:
            above = tl.zeros([BLOCK], tl.int32)
            for block in range(0, slots, BLOCK):
                key = _keys(scores, valid, block, slots, newest, BLOCK, HAS_VALID, FINITE)
                above += (key >= middle).to(tl.int32)
        count = tl.sum(above, 0)
        if count >= limit:
            low = middle
            at_low = count
        else:
            high = middle
            at_high = count
    place = width - limit
    for block in range(0, place, STEP):
        front = block + tl.arange(0, STEP)
        tl.store(out + front, tl.full([STEP], -1, tl.int64), mask=front < place)
    need = limit - at_high
    if WHOLE and STEP == BLOCK:
        _write(out, key, 0, low, high, place, need, BLOCK)
    else:
        for block in range(0, slots, STEP):
            piece = _keys(scores, valid, block, slots, newest, STEP, HAS_VALID, FINITE)
            place, need = _write(out, piece, block, low, high, place, need, STEP)


def select(
    scores: Tensor,
    limits: Sequence[int] | Tensor,
    width: int,
    *,
    recent: int = 0,
    valid: Tensor | None = None,
    finite: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `naive.select`: (B, H, K) scores, (B, H, width) int64 indices."""
    batch, heads, slots = scores.shape
    width = min(width, slots)
    out = torch.empty(batch, heads, width, dtype=torch.int64, device=scores.device)
    if out.numel() == 0:
        return out
    scores = dense(scores)
    limit, each = spread(limits, heads, scores.device)
    mask = None if valid is None else by_head(valid).contiguous().expand(scores.shape).view(torch.uint8)
    strides = tuple((0, 0) if t is None else t.stride()[:2] for t in (scores, mask, each))
    launch = _launch(tuple(scores.shape), strides, limit, width, recent, finite, mask is None, each is None, blocks)
    launch(scores, scores if mask is None else mask, scores if each is None else each, out)
    return out


@lru_cache(maxsize=KNOWN)
def _launch(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    limit: int,
    width: int,
    recent: int,
    finite: bool,
    all_valid: bool,
    alike: bool,
    blocks: Blocks | None,
) -> Launch:
    """For these shapes and strides of scores, mask and limits."""
    batch, heads, slots = shape
    blocks = blocks or choose(slots)
    return Launch(
        select_kernel, (batch * heads,), *(n for pair in strides for n in pair), heads, slots,
        limit, width, max(slots - recent, 0) if all_valid else recent,
        BLOCK=blocks.block, STEP=min(blocks.block, blocks.step), TAIL=min(blocks.block, 1024),
        WHOLE=blocks.block >= slots, HAS_VALID=not all_valid, FINITE=finite, EACH=not alike,
        num_warps=blocks.warps,
    )  # fmt: skip
