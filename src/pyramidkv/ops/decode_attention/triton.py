"""The same as `naive.py`, bound by the reading of keys and values alone.

The keys of a row and head are split over several programs, each of which keeps a running softmax; a second kernel joins
their results, adds a new token to them if there is one, and writes that into its slot, and its query into a ring if one
is given. Without grouped query heads a product is a row of multiplications: each of BLOCK places of a tile keeps a
softmax of its own through the loop, so that nothing crosses the warps before the end. Grouped heads are the rows of a
tile and go through the tensor cores.
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
from pyramidkv.ops.partial_softmax import add_parts, joined, new_token, nothing, used


@dataclass(frozen=True)
class Blocks:
    """How the keys of a head are cut up."""

    chunk: int  # slots a program
    block: int  # slots a step
    warps: int
    stages: int  # depth of the software pipeline; 1: loads straight to registers
    halves: bool  # read a head size like 80 as 64 + 16 rather than as a masked 128
    dot: bool  # tensor cores
    overlap: bool = False  # launch the joining kernel before the first has ended (compute capability 9 and later)


def choose(capacity: int, heads: int, groups: int, size: int, itemsize: int, overlap: bool) -> Blocks:
    """Tiles for (B * Hkv) `heads` of `groups` query heads."""
    dot = groups > 1
    slots = (16384 if dot else 5120) // (size * itemsize)
    block = max(16, min(64, power_of_two(slots + 1) // 2))
    chunk = block if dot else 8 * block
    while chunk < 1024 and heads * triton.cdiv(capacity, chunk) > 16384:
        chunk *= 2  # a few rounds of programs are plenty, and each costs a partial result
    return Blocks(chunk, block, 4, 2 if dot else 3, halves=True, dot=dot, overlap=overlap)


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
    q, k, v, part, lse, length, start,
    sqb, sqh, skb, skh, skn, svb, svh, svn, slb, slh, ssb, ssh,
    scale, kv_heads, capacity,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr,
    TENSOR: tl.constexpr, HAS_START: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(splits, B * Hkv) programs. Writes each query head's attention to a chunk of slots and its log2-sum-exp."""
    split, head = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    batch, kv_head = head // kv_heads, head % kv_heads
    begin, end = used(length, start, batch, kv_head, capacity, slb, slh, ssb, ssh, TENSOR, HAS_START)
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


@triton.jit(do_not_specialize=["length", "ring_slots"])
def join_kernel(
    part, lse, out, length, start, q, k, v, new_k, new_v, ring,
    slb, slh, ssb, ssh, sqb, sqh, skb, skh, skn, svb, svh, svn, snkb, snkh, snvb, snvh, srb, srh, srn,
    scale, splits, kv_heads, capacity, ring_slots,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    TENSOR: tl.constexpr, HAS_START: tl.constexpr, NEW: tl.constexpr, RING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(B * Hq,) programs: each joins the parts of one query head, PARTS at a time, and the new token."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # a product behind may ask for its weights meanwhile
    row = tl.program_id(0)
    head = row // GROUPS
    batch, kv_head = head // kv_heads, head % kv_heads
    begin, end = used(length, start, batch, kv_head, capacity, slb, slh, ssb, ssh, TENSOR, HAS_START)
    low, high = begin // CHUNK, tl.cdiv(end, CHUNK)
    channel = tl.arange(0, WIDE)
    inside = channel < SIZE
    batch, kv_head = batch.to(tl.int64), kv_head.to(tl.int64)
    query_head = (row % (GROUPS * kv_heads)).to(tl.int64)
    top, total, mean = new_token(  # while the first kernel still runs
        q + batch * sqb + query_head * sqh, new_k + batch * snkb + kv_head * snkh,
        new_v + batch * snvb + kv_head * snvh, k + batch * skb + kv_head * skh, v + batch * svb + kv_head * svh,
        ring + batch * srb + query_head * srh,
        end, capacity, skn, svn, srn, ring_slots, row % GROUPS == 0, scale, channel, inside, WIDE, NEW, RING,
    )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    tops, totals, sums = nothing(PARTS, WIDE)
    first = row.to(tl.int64) * splits
    tops, totals, sums = add_parts(
        part, lse, first, low, high, channel, inside, tops, totals, sums, 1, SIZE, PARTS
    )  # fmt: skip
    mean = joined(tops, totals, sums, top, total, mean)
    tl.store(out + row.to(tl.int64) * SIZE + channel, mean.to(out.dtype.element_ty), mask=inside)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
    ring: Tensor | None = None,
    *,
    blocks: Blocks | None = None,
) -> Tensor:
    """As `naive.decode_attention`: (B, Hq, 1, D) over (B, Hkv, C, D) buffers; (B, Hq, 1, D).

    Any strides do, as long as the channels lie side by side.
    """
    batch, heads, _, size = query.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    query = dense(query)
    new_key, new_value = (query, query) if new is None else (dense(new[0]), dense(new[1]))
    if new is None:
        keys, values = dense(keys), dense(values)
    elif keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("buffers that a new token is written into need their channels side by side")
    if blocks is None:
        overlap = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
        blocks = choose(capacity, batch * kv_heads, groups, size, keys.itemsize, overlap)
    target = query if ring is None else ring
    splits = max(1, triton.cdiv(capacity, blocks.chunk))
    wide = power_of_two(size)
    first, rest = parts(size) if blocks.halves else (wide, 0)
    lengths = (0, 0) if isinstance(length, int) or length.numel() == 1 else length.stride()
    starts = (0, 0) if start is None else start.stride()
    out = torch.empty(batch, heads, 1, size, dtype=query.dtype, device=query.device)
    part = torch.empty(batch * heads, splits, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch * heads, splits, dtype=torch.float32, device=query.device)
    scale = scaling * math.log2(math.e)
    split_kernel[(splits, batch * kv_heads)](
        query, keys, values, part, lse, length, query if start is None else start,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *lengths, *starts,
        scale, kv_heads, capacity,
        GROUPS=groups, SIZE=size, FIRST=first, REST=rest,
        CHUNK=blocks.chunk, BLOCK=blocks.block, STAGES=blocks.stages,
        DOT=blocks.dot or groups > 1, ROWS=max(16, power_of_two(groups)),
        TENSOR=not isinstance(length, int), HAS_START=start is not None, OVERLAP=blocks.overlap,
        num_warps=blocks.warps,
    )  # fmt: skip
    join_kernel[(batch * heads,)](
        part, lse, out, length, query if start is None else start, query, keys, values, new_key, new_value, target,
        *lengths, *starts, *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
        *new_key.stride()[:2], *new_value.stride()[:2], *target.stride()[:3],
        scale, splits, kv_heads, capacity, target.shape[2],
        GROUPS=groups, SIZE=size, CHUNK=blocks.chunk, PARTS=4096 // wide, WIDE=wide,
        TENSOR=not isinstance(length, int), HAS_START=start is not None, NEW=new is not None, RING=ring is not None,
        OVERLAP=blocks.overlap, num_warps=4, **({"launch_pdl": True} if blocks.overlap else {}),
    )  # fmt: skip
    return out
