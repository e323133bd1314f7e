"""The same as `naive.py`, without a sort: the score of the last page handed out is found digit by digit.

How many pages a head would have if all slots from some score on were kept, its best page and so on, follows from how
many slots score that much. So one launch counts the slots of each head at or above 256 thresholds, the upper 8 of the
16 bits of a score, by a histogram and its sums; the next counts them at 256 thresholds between the two where the pages
of the row run out; a third hands out the pages.
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

from pyramidkv.ops.heads.naive import row_facts
from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.select.triton import _ALWAYS, _NEVER, _keys, _newest
from pyramidkv.ops.valid import by_head

_DIGITS = tl.constexpr(256)


@dataclass(frozen=True)
class Blocks:
    """How a program reads the slots of a head."""

    slots: int  # at once
    warps: int


def choose(slots: int) -> Blocks:
    """Tiles for K slots: eight of them a thread, or all 32 warps."""
    block = max(128, min(8192, power_of_two(slots)))
    return Blocks(block, max(1, block // 256))


@triton.jit
def _facts(facts, row, own, pages, everything, EACH: tl.constexpr):
    """What `row_facts` says of a row."""
    if EACH:
        own = tl.load(facts + row * 3)
        pages = tl.load(facts + row * 3 + 1)
        everything = tl.load(facts + row * 3 + 2)
    return own, pages, everything


@triton.jit
def _filled(slots, own):
    """Pages of a head whose best `slots` slots are kept."""
    return tl.maximum((slots + 63) // 64, own)


@triton.jit
def _digit(counts, row, heads, own, pages, HEADS: tl.constexpr):
    """The last of the thresholds at which the heads of a row fill all its pages; the first if they never do."""
    lane = tl.arange(0, _DIGITS)
    total = tl.zeros([_DIGITS], tl.int32)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        there = (head < heads)[:, None] & (lane >= 0)[None, :]
        slots = tl.load(counts + (row * heads + head)[:, None] * _DIGITS + lane[None, :], mask=there, other=0)
        total += tl.sum(tl.where(there, _filled(slots, own), 0), 0)
    return tl.maximum(tl.sum((total >= pages).to(tl.int32), 0) - 1, 0)


@triton.jit(do_not_specialize=["slots", "newest", "own", "pages", "everything"])
def count_kernel(
    scores, valid, facts, coarse, counts, held, ssb, ssh, svb, svh, heads, slots, newest, own, pages, everything,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, TAIL: tl.constexpr, FINE: tl.constexpr,
    HAS_VALID: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """(B * H,) programs: slots of a head at or above each threshold, and how many it holds."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    own, pages, everything = _facts(facts, row, own, pages, everything, EACH)
    lane = tl.arange(0, _DIGITS)
    upper = 0
    above = 0
    if FINE:
        upper = _digit(coarse, row, heads, own, pages, HEADS)
        above = tl.load(coarse + program * _DIGITS + upper + 1, mask=upper < _DIGITS - 1, other=0)
    scores += row * ssb + head * ssh
    valid += row * svb + head * svh
    if HAS_VALID:
        newest = _newest(valid, slots, newest, TAIL)
    found = tl.zeros([_DIGITS], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)
    real = tl.zeros([BLOCK], tl.int32)
    for block in range(0, slots, BLOCK):
        key = _keys(scores, valid, block, slots, newest, BLOCK, HAS_VALID, True)
        counted = (key > _NEVER) & (key < _ALWAYS)  # the newest are in no page
        digit = (key >> 24) + 128
        if FINE:
            counted = counted & (digit == upper)
            digit = (key >> 16) & 255
        found += tl.histogram(tl.where(counted, digit, 0), _DIGITS)
        others += 1 - counted.to(tl.int32)
        real += (key > _NEVER).to(tl.int32)
    found -= tl.where(lane == 0, tl.sum(others, 0), 0)
    tl.store(counts + program * _DIGITS + lane, above + tl.sum(found, 0) - tl.cumsum(found, 0) + found)
    if not FINE:
        tl.store(held + program, tl.sum(real, 0))


@triton.jit(do_not_specialize=["recent", "own", "pages", "everything"])
def share_kernel(
    coarse, fine, held, facts, limits, heads, recent, own, pages, everything,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """(B,) programs: slots of each head."""
    row = tl.program_id(0).to(tl.int64)
    own, pages, everything = _facts(facts, row, own, pages, everything, EACH)
    upper = _digit(coarse, row, heads, own, pages, BLOCK)
    lower = _digit(fine, row, heads, own, pages, BLOCK)
    head = tl.arange(0, HEADS)
    there = head < heads
    place = (row * heads + head) * _DIGITS
    at = tl.load(fine + place + lower, mask=there, other=0)
    next_fine = tl.load(fine + place + lower + 1, mask=there & (lower < _DIGITS - 1), other=0)
    next_coarse = tl.load(coarse + place + upper + 1, mask=there & (upper < _DIGITS - 1), other=0)
    above = tl.where(lower < _DIGITS - 1, next_fine, next_coarse)
    most = tl.where(there, _filled(at, own), 0)
    sure = tl.where(there, _filled(above, own), 0)
    level = most - sure  # of equal worth; the earlier head's come first
    left = pages - tl.sum(sure, 0) - (tl.cumsum(level, 0) - level)
    filled = sure + tl.minimum(level, tl.maximum(left, 0))
    real = tl.load(held + row * heads + head, mask=there, other=0)
    slots = tl.where(everything > 0, real, tl.minimum(recent + 64 * filled, real))
    tl.store(limits + row * heads + head, slots, mask=there)


def head_limits(
    scores: Tensor,
    shares: Sequence[int],
    available: Sequence[int],
    recent: int,
    valid: Tensor | None = None,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `naive.head_limits`."""
    rows, heads, _ = scores.shape
    scores = dense(scores)
    each, alike = scores, (0, 0, 0)  # the former is not read
    facts = row_facts(heads, shares, available, recent)
    if len(set(facts)) == 1:
        alike = facts[0]
    else:
        # Not pinned: so small a copy is taken along at once, and new pinned memory would have to wait for the device.
        each = torch.tensor(facts, dtype=torch.int32).to(scores.device, non_blocking=True)
    mask = None if valid is None else by_head(valid).contiguous().expand(scores.shape).view(torch.uint8)
    strides = tuple((0, 0) if t is None else t.stride()[:2] for t in (scores, mask))
    known = tuple(scores.shape), strides, recent, alike, mask is None, each is scores, blocks
    first, second, last = _launches(*known)
    coarse, fine = (torch.empty(rows, heads, _DIGITS.value, dtype=torch.int32, device=scores.device) for _ in range(2))
    held, limits = (torch.empty(rows, heads, dtype=torch.int32, device=scores.device) for _ in range(2))
    for count, counts in ((first, coarse), (second, fine)):
        count(scores, scores if mask is None else mask, each, coarse, counts, held)
    last(coarse, fine, held, each, limits)
    return limits


@lru_cache(maxsize=KNOWN)
def _launches(
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    recent: int,
    facts: tuple[int, int, int],
    all_valid: bool,
    alike: bool,
    blocks: Blocks | None,
) -> tuple[Launch, Launch, Launch]:
    """The two launches that count and the one that hands out, for these shapes and strides of scores and mask."""
    rows, heads, slots = shape
    blocks = blocks or choose(slots)
    some = min(32, power_of_two(heads))  # heads whose counts are read at once
    numbers = *(n for pair in strides for n in pair), heads, slots, max(slots - recent, 0) if all_valid else recent
    constants = {"BLOCK": blocks.slots, "HEADS": some, "TAIL": 1024, "HAS_VALID": not all_valid, "EACH": not alike}
    coarse, fine = (
        Launch(count_kernel, (rows * heads,), *numbers, *facts, **constants, FINE=is_fine, num_warps=blocks.warps)
        for is_fine in (False, True)
    )
    share = Launch(
        share_kernel, (rows,), heads, recent, *facts,
        HEADS=power_of_two(heads), BLOCK=some, EACH=not alike, num_warps=8,
    )  # fmt: skip
    return coarse, fine, share
