"""The same as `naive.py`, bound by the reading of keys and values alone.

The keys of a row and head are split over several programs, each of which keeps a running softmax; their results are
joined by a second kernel or, given counters, by the program that finishes last. Without grouped query heads a
product is a row of multiplications: each of BLOCK places of a tile keeps a softmax of its own through the loop, so that
nothing crosses the warps before the end. Grouped heads are the rows of a tile and go through the tensor cores.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, parts, power_of_two


@dataclass(frozen=True)
class Blocks:
    """How the keys of a head are cut up."""

    chunk: int  # slots a program
    block: int  # slots a step
    warps: int
    stages: int  # depth of the software pipeline; 1: loads straight to registers
    halves: bool  # read a head size like 80 as 64 + 16 rather than as a masked 128
    dot: bool  # tensor cores
    overlap: bool = False  # launch the joining kernel before the first has ended (Hopper and later)


def choose(capacity: int, heads: int, groups: int, size: int, itemsize: int) -> Blocks:
    """Tiles for (B * Hkv) `heads` of `groups` query heads."""
    dot = groups > 1
    slots = (16384 if dot else 10240) // (size * itemsize)  # of 10 kB keys and as many values a program, eight at once
    block = max(16, min(64, power_of_two(slots + 1) // 2))
    chunk = block
    while chunk < 1024 and heads * triton.cdiv(capacity, chunk) > 16384:
        chunk *= 2  # a few rounds of programs are plenty, and each costs a partial result
    return Blocks(chunk, block, 4, 2 if dot else 1, halves=True, dot=dot)


@triton.jit
def _load(base, offset, ok, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Channels FIRST to FIRST + WIDE of the rows at base + offset; what is not ok or past SIZE is zero."""
    channel = FIRST + tl.arange(0, WIDE)
    if FIRST + WIDE <= SIZE:
        return tl.load(base + offset[:, None] + channel[None, :], mask=ok[:, None], other=0.0)
    return tl.load(base + offset[:, None] + channel[None, :], mask=ok[:, None] & (channel < SIZE)[None, :], other=0.0)


@triton.jit
def _times(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _put(base, row, ok, x, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Write (ROWS, WIDE) to the channels from FIRST on of rows SIZE wide."""
    channel = FIRST + tl.arange(0, WIDE)
    keep = ok[:, None] & (channel < SIZE)[None, :]
    tl.store(base + row[:, None] * SIZE + channel[None, :], x, mask=keep)


@triton.jit
def _join(part, lse, splits, row, low, high, out, PARTS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """The attention of one query head from its parts [low, high), PARTS at a time."""
    channel = tl.arange(0, WIDE)
    lane = tl.arange(0, PARTS)
    tops = tl.full([PARTS], float("-inf"), tl.float32)
    totals = tl.zeros([PARTS], tl.float32)
    sums = tl.zeros([PARTS, WIDE], tl.float32)
    first = row.to(tl.int64) * splits
    # Not from L1, which may hold what the parts were before.
    for step in range(low, high, PARTS):
        there = step + lane < high
        place = first + step + lane
        weight = tl.load(lse + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        within = there[:, None] & (channel < SIZE)[None, :]
        x = tl.load(part + place[:, None] * SIZE + channel[None, :], mask=within, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(tops, weight)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(tops - shift)
        share = tl.exp2(weight - shift)
        totals = totals * fade + share
        sums = sums * fade[:, None] + x * share[:, None]
        tops = higher
    top = tl.max(tops, 0)
    fade = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(totals * fade, 0)
    mean = tl.sum(sums * fade[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row.to(tl.int64) * SIZE + channel, mean.to(out.dtype.element_ty), mask=channel < SIZE)


@triton.jit
def _used(length, start, batch, head, slb, slh, ssb, ssh, TENSOR: tl.constexpr, HAS_START: tl.constexpr):
    """The slots in use of a row and head."""
    end = length
    if TENSOR:
        end = tl.load(length + batch * slb + head * slh)
    begin = 0
    if HAS_START:
        begin = tl.load(start + batch * ssb + head * ssh)
    return begin, end


@triton.jit
def _vector_step(
    q, k, v, tops, totals, sums, sums_rest, step, last, begin, skn, svn, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """BLOCK slots added to the softmax of each place of a tile, for one query head."""
    slot = step + tl.arange(0, BLOCK)
    ok = (slot < last) & (slot >= begin)
    # Values are under way before the keys are used, and both before the query, which crosses shared memory.
    key = _load(k, slot * skn, ok, 0, FIRST, SIZE)
    value = _load(v, slot * svn, ok, 0, FIRST, SIZE)
    if REST > 0:
        key_rest = _load(k, slot * skn, ok, FIRST, REST, SIZE)
        value_rest = _load(v, slot * svn, ok, FIRST, REST, SIZE)
    zero = tl.zeros([1], tl.int32)
    query = _load(q, zero, zero == 0, 0, FIRST, SIZE).to(tl.float32) * scale  # (1, FIRST)
    logit = tl.sum(key.to(tl.float32) * query, 1)
    if REST > 0:
        query_rest = _load(q, zero, zero == 0, FIRST, REST, SIZE).to(tl.float32) * scale
        logit += tl.sum(key_rest.to(tl.float32) * query_rest, 1)
    logit = tl.where(ok, logit, float("-inf"))
    if ALONE:  # nothing to add to: the softmax of one slot is 1
        sums_rest = logit
        if REST > 0:
            sums_rest = value_rest.to(tl.float32)
        return logit, tl.where(ok, 1.0, 0.0), value.to(tl.float32), sums_rest
    higher = tl.maximum(tops, logit)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(tops - shift)
    share = tl.exp2(logit - shift)
    totals = totals * fade + share
    sums = sums * fade[:, None] + share[:, None] * value.to(tl.float32)
    if REST > 0:
        sums_rest = sums_rest * fade[:, None] + share[:, None] * value_rest.to(tl.float32)
    return higher, totals, sums, sums_rest


@triton.jit(do_not_specialize=["length"])
def split_kernel(
    q, k, v, out, part, lse, counters, length, start,
    sqb, sqh, skb, skh, skn, svb, svh, svn, slb, slh, ssb, ssh,
    scale, kv_heads, capacity,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, HAS_START: tl.constexpr, COUNT: tl.constexpr, OVERLAP: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(splits, B * Hkv) programs. Writes each query head's attention to a chunk of slots and its log2-sum-exp."""
    split, head = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = head // kv_heads, head % kv_heads
    begin, end = _used(length, start, batch, kv_head, slb, slh, ssb, ssh, TENSOR, HAS_START)
    end = tl.minimum(end, capacity)
    low, high = begin // CHUNK, tl.cdiv(end, CHUNK)  # the splits that have slots
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if (split >= low) & (split < high):
        q += batch.to(tl.int64) * sqb + kv_head.to(tl.int64) * GROUPS * sqh
        k += batch.to(tl.int64) * skb + kv_head.to(tl.int64) * skh + (split * CHUNK).to(tl.int64) * skn
        v += batch.to(tl.int64) * svb + kv_head.to(tl.int64) * svh + (split * CHUNK).to(tl.int64) * svn
        base = split * CHUNK
        last = tl.minimum(end - base, CHUNK)
        place = tl.arange(0, BLOCK)
        if DOT:
            precision: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
            row = tl.arange(0, ROWS)
            real = row < GROUPS
            query = _load(q, row * sqh, real, 0, FIRST, SIZE)
            if REST > 0:
                query_rest = _load(q, row * sqh, real, FIRST, REST, SIZE)
                acc_rest = tl.zeros([ROWS, REST], tl.float32)
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, FIRST], tl.float32)
            for step in tl.range(0, last, BLOCK, num_stages=STAGES):
                slot = step + place
                ok = (slot < last) & (base + slot >= begin)
                key = _load(k, slot * skn, ok, 0, FIRST, SIZE)
                logit = _times(query, tl.trans(key), precision)
                if REST > 0:
                    logit += _times(query_rest, tl.trans(_load(k, slot * skn, ok, FIRST, REST, SIZE)), precision)
                logit = tl.where(ok[None, :], logit * scale, float("-inf"))  # (ROWS, BLOCK)
                higher = tl.maximum(top, tl.max(logit, 1))
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                fade = tl.exp2(top - shift)
                share = tl.exp2(logit - shift[:, None])
                total = total * fade + tl.sum(share, 1)
                share = share.to(v.dtype.element_ty)
                acc = acc * fade[:, None] + _times(share, _load(v, slot * svn, ok, 0, FIRST, SIZE), precision)
                if REST > 0:
                    value = _load(v, slot * svn, ok, FIRST, REST, SIZE)
                    acc_rest = acc_rest * fade[:, None] + _times(share, value, precision)
                top = higher
            shift = tl.where(total > 0, total, 1.0)
            where = (head.to(tl.int64) * GROUPS + row) * splits + split
            _put(part, where, real, acc / shift[:, None], 0, FIRST, SIZE)
            if REST > 0:
                _put(part, where, real, acc_rest / shift[:, None], FIRST, REST, SIZE)
            tl.store(lse + where, tl.where(total > 0, top + tl.log2(shift), float("-inf")), mask=real)
        else:
            tops = tl.full([BLOCK], float("-inf"), tl.float32)
            totals = tl.zeros([BLOCK], tl.float32)
            sums = tl.zeros([BLOCK, FIRST], tl.float32)
            sums_rest = tops
            if REST > 0:
                sums_rest = tl.zeros([BLOCK, REST], tl.float32)
            if CHUNK == BLOCK:
                tops, totals, sums, sums_rest = _vector_step(
                    q, k, v, tops, totals, sums, sums_rest, 0, last, begin - base, skn, svn, scale,
                    FIRST, REST, SIZE, BLOCK, True,
                )  # fmt: skip
            else:
                for step in tl.range(0, last, BLOCK, num_stages=STAGES):
                    tops, totals, sums, sums_rest = _vector_step(
                        q, k, v, tops, totals, sums, sums_rest, step, last, begin - base, skn, svn, scale,
                        FIRST, REST, SIZE, BLOCK, False,
                    )  # fmt: skip
            top = tl.max(tops, 0)
            fade = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
            total = tl.sum(totals * fade, 0)
            scaled = tl.where(total > 0, total, 1.0)
            where = head.to(tl.int64) * splits + split
            channel = tl.arange(0, FIRST)
            mean = tl.sum(sums * fade[:, None], 0) / scaled
            tl.store(part + where * SIZE + channel, mean, mask=channel < SIZE)
            if REST > 0:
                channel = FIRST + tl.arange(0, REST)
                mean = tl.sum(sums_rest * fade[:, None], 0) / scaled
                tl.store(part + where * SIZE + channel, mean, mask=channel < SIZE)
            tl.store(lse + where, tl.where(total > 0, top + tl.log2(scaled), float("-inf")))
    if COUNT:
        tl.debug_barrier()  # every thread's results before the count
        before = tl.atomic_add(counters + head, 1, sem="acq_rel", scope="gpu")
        if before == splits - 1:  # the last one: all parts are there
            tl.debug_barrier()
            for group in tl.range(0, GROUPS):
                _join(part, lse, splits, head * GROUPS + group, low, high, out, PARTS, WIDE, SIZE)
            tl.store(counters + head, 0)


@triton.jit(do_not_specialize=["length"])
def join_kernel(
    part, lse, out, length, start, slb, slh, ssb, ssh, splits, kv_heads, capacity,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    TENSOR: tl.constexpr, HAS_START: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(B * Hq,) programs: each joins the parts of one query head."""
    row = tl.program_id(0)
    head = row // GROUPS
    begin, end = _used(
        length, start, head // kv_heads, head % kv_heads, slb, slh, ssb, ssh, TENSOR, HAS_START
    )  # fmt: skip
    end = tl.minimum(end, capacity)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    _join(part, lse, splits, row, begin // CHUNK, tl.cdiv(end, CHUNK), out, PARTS, WIDE, SIZE)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    *,
    counters: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `naive.decode_attention`: (B, Hq, 1, D) over (B, Hkv, C, D) buffers; (B, Hq, 1, D).

    Any strides do, as long as the channels lie side by side. `counters` as in the package's `decode_attention`.
    """
    batch, heads, _, size = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    query, keys, values = dense(query), dense(keys), dense(values)
    blocks = blocks or choose(capacity, batch * kv_heads, groups, size, keys.itemsize)
    splits = max(1, triton.cdiv(capacity, blocks.chunk))
    wide = power_of_two(size)
    parts_at_once = (4096 if counters is None else 2048) // wide  # 32 or 16 registers of a thread
    first, rest = parts(size) if blocks.halves else (wide, 0)
    lengths = (0, 0) if isinstance(length, int) or length.numel() == 1 else length.stride()
    starts = (0, 0) if start is None else start.stride()
    out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    part = torch.empty(batch * heads, splits, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch * heads, splits, dtype=torch.float32, device=query.device)
    overlap = blocks.overlap and counters is None
    split_kernel[(splits, batch * kv_heads)](
        query, keys, values, out, part, lse, lse if counters is None else counters,
        length, query if start is None else start,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *lengths, *starts,
        scaling * math.log2(math.e), kv_heads, capacity,
        GROUPS=groups, SIZE=size, FIRST=first, REST=rest,
        CHUNK=blocks.chunk, BLOCK=blocks.block, STAGES=blocks.stages,
        DOT=blocks.dot or groups > 1, ROWS=max(16, power_of_two(groups)),
        TENSOR=not isinstance(length, int), HAS_START=start is not None, COUNT=counters is not None,
        OVERLAP=overlap, PARTS=parts_at_once, WIDE=wide,
        num_warps=blocks.warps,
    )  # fmt: skip
    if counters is not None:
        return out
    join_kernel[(batch * heads,)](
        part, lse, out, length, query if start is None else start, *lengths, *starts, splits, kv_heads, capacity,
        GROUPS=groups, SIZE=size, CHUNK=blocks.chunk, PARTS=parts_at_once, WIDE=wide,
        TENSOR=not isinstance(length, int), HAS_START=start is not None, OVERLAP=overlap, num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
