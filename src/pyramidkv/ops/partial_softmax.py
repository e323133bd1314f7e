"""What the kernels that join parts of an attention share, as functions of Triton.

A part is what a program has found over some slots: its attention, and the log2-sum-exp of its logits. They are joined
`PARTS` at a time, each of that many lanes keeping a running softmax of its own, which are joined at the end.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def used(length, start, row, head, capacity, slb, slh, ssb, ssh, TENSOR: tl.constexpr, HAS_START: tl.constexpr):
    """The slots in use of a row and head: from the first to the one behind the last."""
    end = length
    if TENSOR:
        end = tl.load(length + row * slb + head * slh)
    begin = 0
    if HAS_START:
        begin = tl.load(start + row * ssb + head * ssh)
    return begin, tl.minimum(end, capacity)


@triton.jit
def new_token(
    query, new_key, new_value, keys, values, ring, slot, capacity, skn, svn, srn, ring_slots, first, scale,
    channel, inside, WIDE: tl.constexpr, NEW: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The part of a new token, its softmax unfinished: highest logit, sum, mean.

    The first query head of a KV head writes key and value into their slot, each its query into the ring, unless the
    buffers are full. All pointers are those of one row and head.
    """
    top = float("-inf")
    total = 0.0
    mean = tl.zeros([WIDE], tl.float32)
    if NEW:
        one = tl.load(query + channel, mask=inside, other=0.0)
        key = tl.load(new_key + channel, mask=inside, other=0.0)
        value = tl.load(new_value + channel, mask=inside, other=0.0)
        top = tl.sum(one.to(tl.float32) * key.to(tl.float32), 0) * scale
        total = 1.0
        mean = value.to(tl.float32)
        if first & (slot < capacity):
            tl.store(keys + slot.to(tl.int64) * skn + channel, key, mask=inside)
            tl.store(values + slot.to(tl.int64) * svn + channel, value, mask=inside)
        if RING:
            place = ring + (slot % ring_slots) * srn + channel
            tl.store(place, one.to(ring.dtype.element_ty), mask=inside & (slot < capacity))
    return top, total, mean


@triton.jit
def nothing(PARTS: tl.constexpr, WIDE: tl.constexpr):
    """Running softmaxes to which nothing has been added."""
    return (
        tl.full([PARTS], float("-inf"), tl.float32), tl.zeros([PARTS], tl.float32), tl.zeros([PARTS, WIDE], tl.float32)
    )  # fmt: skip


@triton.jit
def add_parts(
    part, lse, first, low, high, channel, inside, tops, totals, sums,
    APART: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts [low, high), that number i at place first + i * APART, added to running softmaxes."""
    lane = tl.arange(0, PARTS)
    for step in range(low, high, PARTS):
        there = step + lane < high
        place = first + (step + lane) * APART
        weight = tl.load(lse + place, mask=there, other=float("-inf"))
        x = tl.load(part + place[:, None] * SIZE + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(tops, weight)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(tops - shift)
        share = tl.exp2(weight - shift)
        totals = totals * fade + share
        sums = sums * fade[:, None] + x * share[:, None]
        tops = higher
    return tops, totals, sums


@triton.jit
def joined(tops, totals, sums, top, total, mean):
    """The attention over the parts of all lanes and one more; zeros if there is none."""
    highest = tl.maximum(tl.max(tops, 0), top)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(tops - shift)
    share = tl.exp2(top - shift)
    total = tl.sum(totals * fade, 0) + total * share
    mean = tl.sum(sums * fade[:, None], 0) + mean * share
    return mean / tl.where(total > 0, total, 1.0)
