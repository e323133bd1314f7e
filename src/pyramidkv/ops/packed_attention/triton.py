"""The same as `naive.py`, reading the codes as they lie: no dequantised key or value is ever in memory.

A program takes some pages of a row and head, or some of its newest slots, and writes what they add up to and their
log2-sum-exp; a second kernel joins the parts of each query head. Codes become small whole numbers in float16, exact,
and go through the tensor cores: slots times channels times queries. A key's scale is per channel, so it is multiplied
into the query, once a page; its zero point adds the same number to all logits of a page. A value's scale is per slot,
so it is multiplied into the probabilities, and its zero points add up to one number. Where the channels of a value have
several scales, each gets a column of the queries, of which the tensor cores want 8 in any case, and only its own
channels are written ("row" below is such a pair of query head and scale). One warp a program keeps sums over slots and
channels within it; more would have to meet at every page.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, parts, power_of_two
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.partial_softmax import add_parts, joined, new_token, nothing, used
from pyramidkv.ops.quantize import value_group

INTERPRETED = triton.knobs.runtime.interpret
# What changes from layer to layer and token to token must not compile anything anew.
_COUNTS = ["length", "capacity", "splits", "items", "per_program", "chunk", "row_pages", "ring_slots"]


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up."""

    pages: int  # a program
    chunk: int  # newest slots a program, in steps of 32
    warps: int
    stages: int  # depth of the software pipeline
    overlap: bool = False  # launch the joining kernel before the first has ended (compute capability 9 and later)
    registers: int = 0  # most that a thread may have, so that more programs run at once; 0: no limit


def choose(heads: int, pages: int, columns: int, size: int, itemsize: int, overlap: bool) -> Blocks:
    """For (B * Hkv) `heads` of `pages` pages each, on average, and pairs of query head and scale as `columns`."""
    per_program = 1
    while per_program < 8 and heads * pages > 2048 * per_program:
        per_program *= 2  # each program costs a partial result
    sums = power_of_two(size) * power_of_two(columns) * (4 if itemsize == 4 else 1)  # what one warp can hold of them
    # Of 16 bits two at most: with four, Triton (3.6) takes warp-group products, which read past their memory here.
    warps = 1 if sums <= 1024 else 2 if sums <= 2048 or itemsize == 2 else 4
    return Blocks(per_program, 64, warps, 1, overlap, 128 if warps == 1 else 0)


@triton.constexpr_function
def _unpacking(bits, plane, offset):
    """Assembly for four bytes of codes to four float16: 0x6400 + n is 1024 + n.

    `prmt` picks bytes, the lowest by the last digit: 0 to 3 are those of the codes, 5 is 0x64.
    """
    return (
        f"{{ .reg .b32 t, c; shr.u32 t, $2, {bits * plane}; and.b32 t, t, {(2**bits - 1) * 0x01010101};"
        " mov.b32 c, 0x64006400; prmt.b32 $0, t, c, 0x5150; prmt.b32 $1, t, c, 0x5352;"
        + ("" if offset else " sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c;")
        + " }"
    )


@triton.jit
def _numbers(
    codes, BITS: tl.constexpr, PLANE: tl.constexpr, OFFSET: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr
):
    """A plane of a tile of bytes as numbers, OFFSET (0 or 1024) added to each."""
    if ASM and NUMBER.is_fp16():
        return tl.inline_asm_elementwise(
            _unpacking(BITS, PLANE, OFFSET), "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    return ((codes >> (BITS * PLANE)) & (2**BITS - 1)).to(NUMBER) + OFFSET


@triton.jit
def _times(a, b):
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _query(base, group, real, stride, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Channels FIRST to FIRST + WIDE of the query heads `group`, as columns (WIDE, ROWS)."""
    channel = FIRST + tl.arange(0, WIDE)
    inside = (channel < SIZE)[:, None] & real[None, :]
    return tl.load(base + group[None, :] * stride + channel[:, None], mask=inside, other=0.0)


@triton.jit
def _tile(base, row, ok, stride, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Channels FIRST to FIRST + WIDE of rows; rows that are not ok and channels past SIZE are zeros."""
    channel = FIRST + tl.arange(0, WIDE)
    place = base + row[:, None] * stride + channel[None, :]
    if FIRST + WIDE <= SIZE:
        return tl.load(place, mask=ok[:, None], other=0)
    return tl.load(place, mask=ok[:, None] & (channel < SIZE)[None, :], other=0)


@triton.jit
def _key_bytes(base, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr):
    """The bytes of a page of keys, (BYTES, WIDE) of the channels from FIRST on; past SIZE zeros."""
    row = tl.arange(0, BYTES)
    channel = FIRST + tl.arange(0, WIDE)
    place = base + row[:, None] * SIZE + channel[None, :]
    if FIRST + WIDE <= SIZE:
        return tl.load(place)
    return tl.load(place, mask=(channel < SIZE)[None, :] & (row >= 0)[:, None], other=0)


@triton.jit
def _value_bytes(base, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr):
    """The bytes of a page of values, (WIDE, BYTES) of the channels from FIRST on; past SIZE zeros."""
    byte = tl.arange(0, BYTES)
    channel = FIRST + tl.arange(0, WIDE)
    place = base + channel[:, None] * BYTES + byte[None, :]
    if FIRST + WIDE <= SIZE:
        return tl.load(place)
    return tl.load(place, mask=(channel < SIZE)[:, None] & (byte >= 0)[None, :], other=0)


@triton.jit
def _scaled(q, key_scale, key_zero, NUMBER: tl.constexpr, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """The queries (WIDE, ROWS) times the scales of their channels, and their product with the zero points."""
    channel = FIRST + tl.arange(0, WIDE)
    s = tl.load(key_scale + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
    z = tl.load(key_zero + channel, mask=channel < SIZE, other=0.0).to(tl.float32)
    return (q * s[:, None]).to(NUMBER), tl.sum(q * z[:, None], 0)


@triton.jit
def _logits(
    key, key_rest, scaled, scaled_rest, constant, begin,
    AT: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, NUMBER: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Logits (STEP, ROWS) of the slots from AT on."""
    PLANE: tl.constexpr = AT // STEP
    logit = _times(_numbers(key, BITS, PLANE, 0, NUMBER, ASM), scaled)
    if REST > 0:
        logit += _times(_numbers(key_rest, BITS, PLANE, 0, NUMBER, ASM), scaled_rest)
    slot = AT + tl.arange(0, STEP)
    return tl.where((slot >= begin)[:, None], logit + constant[None, :], float("-inf"))


@triton.jit
def _weights(value_scale, value_zero, column, AT: tl.constexpr, STEP: tl.constexpr, SCALES: tl.constexpr):
    """The scales and zero points of the values of the slots from AT on, (STEP, 1) or (STEP, ROWS)."""
    slot = AT + tl.arange(0, STEP)
    place = slot[:, None] if SCALES == 1 else slot[:, None] * SCALES + column[None, :]
    return tl.load(value_scale + place).to(tl.float32), tl.load(value_zero + place).to(tl.float32)


@triton.jit
def _sums(
    value, value_rest, share, sums, sums_rest,
    PLANE: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, OFFSET: tl.constexpr, NUMBER: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The slots of a plane, (STEP, ROWS) `share` of each, added to sums (channels, ROWS)."""
    sums += _times(_numbers(value, BITS, PLANE, OFFSET, NUMBER, ASM), share)
    if REST > 0:
        sums_rest += _times(_numbers(value_rest, BITS, PLANE, OFFSET, NUMBER, ASM), share)
    return sums, sums_rest


@triton.jit
def _coded_page(
    q, q_rest, keys, key_scale, key_zero, values, value_scale, value_zero, column, begin,
    top, total, zeros, acc, acc_rest,
    BITS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    SIZE: tl.constexpr, SCALES: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A page of codes added to the running softmax; its slots before `begin` are empty."""
    STEP: tl.constexpr = 8 * BITS  # slots at a time: those of a plane
    # All is loaded at once, before any of it is used.
    key = _key_bytes(keys, 0, FIRST, SIZE, STEP)
    value = _value_bytes(values, 0, FIRST, SIZE, STEP)
    key_rest, value_rest = key, value
    if REST > 0:
        key_rest = _key_bytes(keys, FIRST, REST, SIZE, STEP)
        value_rest = _value_bytes(values, FIRST, REST, SIZE, STEP)
    s_0, z_0 = _weights(value_scale, value_zero, column, 0, STEP, SCALES)
    if BITS <= 4:
        s_1, z_1 = _weights(value_scale, value_zero, column, STEP, STEP, SCALES)
    if BITS == 2:
        s_2, z_2 = _weights(value_scale, value_zero, column, 2 * STEP, STEP, SCALES)
        s_3, z_3 = _weights(value_scale, value_zero, column, 3 * STEP, STEP, SCALES)
    scaled, constant = _scaled(q, key_scale, key_zero, NUMBER, 0, FIRST, SIZE)
    scaled_rest = scaled
    if REST > 0:
        scaled_rest, constant_rest = _scaled(q_rest, key_scale, key_zero, NUMBER, FIRST, REST, SIZE)
        constant += constant_rest
    x_0 = _logits(key, key_rest, scaled, scaled_rest, constant, begin, 0, STEP, BITS, REST, NUMBER, ASM)
    higher = tl.maximum(top, tl.max(x_0, 0))
    largest = tl.max(s_0, 0)
    if BITS <= 4:
        x_1 = _logits(key, key_rest, scaled, scaled_rest, constant, begin, STEP, STEP, BITS, REST, NUMBER, ASM)
        higher = tl.maximum(higher, tl.max(x_1, 0))
        largest = tl.maximum(largest, tl.max(s_1, 0))
    if BITS == 2:
        x_2 = _logits(key, key_rest, scaled, scaled_rest, constant, begin, 2 * STEP, STEP, BITS, REST, NUMBER, ASM)
        x_3 = _logits(key, key_rest, scaled, scaled_rest, constant, begin, 3 * STEP, STEP, BITS, REST, NUMBER, ASM)
        higher = tl.maximum(higher, tl.maximum(tl.max(x_2, 0), tl.max(x_3, 0)))
        largest = tl.maximum(largest, tl.maximum(tl.max(s_2, 0), tl.max(s_3, 0)))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(top - shift)
    # Divided by the page's largest, so that small scales of values do not take small shares below what float16 holds.
    inverse = (1.0 / largest)[None, :]
    # Values are multiplied with 1024 added to their codes, which saves taking it off each; it comes off their sum.
    OFFSET: tl.constexpr = 1024 if NUMBER.is_fp16() else 0
    lifted = (largest * OFFSET)[None, :]
    sums = tl.zeros([FIRST, ROWS], tl.float32)
    sums_rest = total
    if REST > 0:
        sums_rest = tl.zeros([REST, ROWS], tl.float32)
    x_0 = tl.exp2(x_0 - shift[None, :])
    total = total * fade + tl.sum(x_0, 0)
    share = (x_0 * (s_0 * inverse)).to(NUMBER)
    zero = x_0 * z_0 - share.to(tl.float32) * lifted
    sums, sums_rest = _sums(value, value_rest, share, sums, sums_rest, 0, BITS, REST, OFFSET, NUMBER, ASM)
    if BITS <= 4:
        x_1 = tl.exp2(x_1 - shift[None, :])
        total += tl.sum(x_1, 0)
        share = (x_1 * (s_1 * inverse)).to(NUMBER)
        zero += x_1 * z_1 - share.to(tl.float32) * lifted
        sums, sums_rest = _sums(value, value_rest, share, sums, sums_rest, 1, BITS, REST, OFFSET, NUMBER, ASM)
    if BITS == 2:
        x_2 = tl.exp2(x_2 - shift[None, :])
        x_3 = tl.exp2(x_3 - shift[None, :])
        total += tl.sum(x_2 + x_3, 0)
        share = (x_2 * (s_2 * inverse)).to(NUMBER)
        zero += x_2 * z_2 - share.to(tl.float32) * lifted
        sums, sums_rest = _sums(value, value_rest, share, sums, sums_rest, 2, BITS, REST, OFFSET, NUMBER, ASM)
        share = (x_3 * (s_3 * inverse)).to(NUMBER)
        zero += x_3 * z_3 - share.to(tl.float32) * lifted
        sums, sums_rest = _sums(value, value_rest, share, sums, sums_rest, 3, BITS, REST, OFFSET, NUMBER, ASM)
    zeros = zeros * fade + tl.sum(zero, 0)
    acc = acc * fade[None, :] + sums * largest[None, :]
    if REST > 0:
        acc_rest = acc_rest * fade[None, :] + sums_rest * largest[None, :]
    return higher, total, zeros, acc, acc_rest


@triton.jit
def _plain_slots(
    q, q_rest, keys, values, slot, begin, end, skn, svn, top, total, zeros, acc, acc_rest, scale,
    FIRST: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Slots as the model computed them, those in [begin, end), added to the running softmax."""
    ok = (slot >= begin) & (slot < end)
    key = _tile(keys, slot, ok, skn, 0, FIRST, SIZE)
    value = _tile(values, slot, ok, svn, 0, FIRST, SIZE)
    logit = _times(key, q)
    if REST > 0:
        logit += _times(_tile(keys, slot, ok, skn, FIRST, REST, SIZE), q_rest)
    logit = tl.where(ok[:, None], logit * scale, float("-inf"))  # (BLOCK, ROWS)
    higher = tl.maximum(top, tl.max(logit, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    fade = tl.exp2(top - shift)
    share = tl.exp2(logit - shift[None, :])
    total = total * fade + tl.sum(share, 0)
    share = share.to(value.dtype)
    acc = acc * fade[None, :] + _times(tl.trans(value), share)
    if REST > 0:
        value = _tile(values, slot, ok, svn, FIRST, REST, SIZE)
        acc_rest = acc_rest * fade[None, :] + _times(tl.trans(value), share)
    return higher, total, zeros * fade, acc, acc_rest


@triton.jit
def _put(
    part, where, row, real, x, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, SCALES: tl.constexpr
):  # fmt: skip
    """Write (WIDE, ROWS) to the channels from FIRST on, each row its own."""
    channel = FIRST + tl.arange(0, WIDE)
    mine = (channel < SIZE)[:, None] & real[None, :]
    if SCALES > 1:
        mine = mine & ((channel // (SIZE // SCALES))[:, None] == (row % SCALES)[None, :])
    tl.store(part + where[None, :] * SIZE + channel[:, None], x, mask=mine)


@triton.jit
def _shares(count, row, heads, per_program, HEADS: tl.constexpr):
    """How many programs each head of a row has, (HEADS,), where heads differ."""
    head = tl.arange(0, HEADS)
    return tl.cdiv(tl.load(count + row * heads + head, mask=head < heads, other=0), per_program)


@triton.jit
def _owner(item, count, first, row, heads, row_pages, per_program, HEADS: tl.constexpr, EVEN: tl.constexpr):
    """Of a program of a row: its head, the page of that head that it begins with, the first page of the head in
    the row, and the pages of the head. A head of `heads` is none."""
    if EVEN:
        pages = row_pages // heads
        each = tl.cdiv(pages, per_program)
        head = item // each
        return head, (item % each) * per_program, head * pages, pages
    programs = _shares(count, row, heads, per_program, HEADS)
    last = tl.cumsum(programs, 0)
    head = tl.sum((last <= item).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, HEADS) < head, programs, 0), 0)
    there = head < heads
    page = tl.load(first + row * heads + head, mask=there, other=0)
    pages = tl.load(count + row * heads + head, mask=there, other=0)
    return tl.minimum(head, heads), (item - before) * per_program, page, pages


@triton.jit(do_not_specialize=_COUNTS)
def split_kernel(
    q, part, lse, keys, values, length, start,
    key_codes, key_scale, key_zero, value_codes, value_scale, value_zero, count, first, empty, row_pages,
    sqb, sqh, skb, skh, skn, svb, svh, svn, slb, slh, ssb, ssh,
    scale, heads, capacity, splits, items, per_program, chunk,
    BITS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr, SIZE: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, TENSOR: tl.constexpr, HAS_START: tl.constexpr, OVERLAP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """(items, B) programs: first `splits` a head over the newest slots, then those over the pages."""
    item, batch = tl.program_id(0), tl.program_id(1)
    NUMBER: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    row = tl.arange(0, ROWS)
    real = row < GROUPS * SCALES
    group = row // SCALES
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    far = batch.to(tl.int64)
    head = item // splits  # of the newest slots' programs; the others find theirs
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    zeros = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([FIRST, ROWS], tl.float32)
    acc_rest = total
    if REST > 0:
        acc_rest = tl.zeros([REST, ROWS], tl.float32)
    if item < heads * splits:
        begin, end = used(length, start, batch, head, capacity, slb, slh, ssb, ssh, TENSOR, HAS_START)
        base = (item % splits) * chunk
        begin -= base
        end = tl.minimum(end - base, chunk)
        query = q + far * sqb + head.to(tl.int64) * GROUPS * sqh
        one = _query(query, group, real, sqh, 0, FIRST, SIZE)
        two = one
        if REST > 0:
            two = _query(query, group, real, sqh, FIRST, REST, SIZE)
        k = keys + far * skb + head.to(tl.int64) * skh + base.to(tl.int64) * skn
        v = values + far * svb + head.to(tl.int64) * svh + base.to(tl.int64) * svn
        for step in tl.range(0, end, BLOCK, num_stages=STAGES):
            top, total, zeros, acc, acc_rest = _plain_slots(
                one, two, k, v, step + tl.arange(0, BLOCK), begin, end, skn, svn,
                top, total, zeros, acc, acc_rest, scale, FIRST, REST, SIZE,
            )  # fmt: skip
    else:
        head, begin_page, first_page, pages = _owner(
            item - heads * splits, count, first, batch, heads, row_pages, per_program, HEADS, EVEN
        )
        if head < heads:
            query = q + far * sqb + head.to(tl.int64) * GROUPS * sqh
            one = _query(query, group, real, sqh, 0, FIRST, SIZE)
            two = one
            if REST > 0:
                two = _query(query, group, real, sqh, FIRST, REST, SIZE)
            if BITS != 16:  # what a code is worth is found once a page, in logits to base 2
                one = one.to(tl.float32) * scale
                if REST > 0:
                    two = two.to(tl.float32) * scale
            begin = tl.load(empty + batch * heads + head)
            end_page = tl.minimum(begin_page + per_program, pages)
            page_of_row = far * row_pages + first_page
            for page in tl.range(tl.maximum(begin_page, begin // 64), end_page, num_stages=STAGES):
                at = page_of_row + page
                if BITS == 16:
                    k = key_codes + at * (64 * SIZE)
                    v = value_codes + at * (64 * SIZE)
                    for step in tl.static_range(0, 64, BLOCK):
                        top, total, zeros, acc, acc_rest = _plain_slots(
                            one, two, k, v, step + tl.arange(0, BLOCK), begin - page * 64, 64, SIZE, SIZE,
                            top, total, zeros, acc, acc_rest, scale, FIRST, REST, SIZE,
                        )  # fmt: skip
                else:
                    top, total, zeros, acc, acc_rest = _coded_page(
                        one, two,
                        key_codes + at * (8 * BITS * SIZE), key_scale + at * SIZE, key_zero + at * SIZE,
                        value_codes + at * (8 * BITS * SIZE),
                        value_scale + at * (64 * SCALES), value_zero + at * (64 * SCALES),
                        row % SCALES, begin - page * 64, top, total, zeros, acc, acc_rest,
                        BITS, ROWS, FIRST, REST, SIZE, SCALES, NUMBER, ASM,
                    )  # fmt: skip
    if head < heads:
        some = tl.where(total > 0, total, 1.0)
        where = (far * items + item) * GROUPS + group
        _put(part, where, row, real, (acc + zeros[None, :]) / some[None, :], 0, FIRST, SIZE, SCALES)
        if REST > 0:
            _put(part, where, row, real, (acc_rest + zeros[None, :]) / some[None, :], FIRST, REST, SIZE, SCALES)
        tl.store(lse + where, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=real & (row % SCALES == 0))


@triton.jit(do_not_specialize=_COUNTS)
def join_kernel(
    q, part, lse, out, keys, values, new_key, new_value, ring, length, start, count, row_pages,
    sqb, sqh, skb, skh, skn, svb, svh, svn, slb, slh, ssb, ssh, snkb, snkh, snvb, snvh, srb, srh, srn,
    ring_slots, scale, heads, capacity, splits, items, per_program, chunk,
    EVEN: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, TENSOR: tl.constexpr, HAS_START: tl.constexpr, NEW: tl.constexpr, RING: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """(Hq, B) programs: each joins the parts of one query head and a new token, and writes that into its slot."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # a product behind may ask for its weights meanwhile
    query_head, batch = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUPS
    group = query_head % GROUPS
    begin, end = used(length, start, batch, head, capacity, slb, slh, ssb, ssh, TENSOR, HAS_START)
    channel = tl.arange(0, WIDE)
    inside = channel < SIZE
    far, far_head = batch.to(tl.int64), head.to(tl.int64)
    far_query = query_head.to(tl.int64)
    top, total, mean = new_token(  # while the first kernel still runs
        q + far * sqb + far_query * sqh, new_key + far * snkb + far_head * snkh,
        new_value + far * snvb + far_head * snvh, keys + far * skb + far_head * skh,
        values + far * svb + far_head * svh, ring + far * srb + far_query * srh,
        end, capacity, skn, svn, srn, ring_slots, group == 0, scale, channel, inside, WIDE, NEW, RING,
    )  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    tops, totals, sums = nothing(PARTS, WIDE)
    place = far * items * GROUPS + group
    offset = heads * splits
    if EVEN:
        each = tl.cdiv(row_pages // heads, per_program)
        low = offset + head * each
        high = low + each
    else:
        programs = _shares(count, batch, heads, per_program, HEADS)
        index = tl.arange(0, HEADS)
        low = offset + tl.sum(tl.where(index < head, programs, 0), 0)
        high = low + tl.sum(tl.where(index == head, programs, 0), 0)
    tops, totals, sums = add_parts(
        part, lse, place, low, high, channel, inside, tops, totals, sums, GROUPS, SIZE, PARTS
    )  # fmt: skip
    low = head * splits + begin // chunk
    high = head * splits + tl.cdiv(end, chunk)
    tops, totals, sums = add_parts(
        part, lse, place, low, high, channel, inside, tops, totals, sums, GROUPS, SIZE, PARTS
    )  # fmt: skip
    mean = joined(tops, totals, sums, top, total, mean)
    out += (far * (heads * GROUPS) + query_head) * SIZE
    tl.store(out + channel, mean.to(out.dtype.element_ty), mask=inside)


def packed_attention(
    query: Tensor,
    pages: Pages,
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
    """As `naive.packed_attention`: (B, Hq, 1, D) over pages and (B, Hkv, C, D) newest slots; (B, Hq, 1, D)."""
    batch, query_heads, _, size = query.shape
    heads, capacity = keys.shape[1], keys.shape[2]
    groups = query_heads // heads
    scales = size // value_group(size)
    columns = max(8, groups * scales)
    query = dense(query)
    new_key, new_value = (query, query) if new is None else (dense(new[0]), dense(new[1]))
    target = query if ring is None else ring
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("the newest slots need their channels side by side")
    if blocks is None:
        overlap = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
        blocks = choose(batch * heads, pages.row_pages // heads, columns, size, query.itemsize, overlap)
    splits = max(1, triton.cdiv(capacity, blocks.chunk))
    # Programs of the newest slots, and of the pages: where heads differ, those that none needs end at once.
    each = triton.cdiv(pages.row_pages // heads, blocks.pages)
    items = heads * splits + (heads * each if pages.even else pages.row_pages // blocks.pages + heads)
    first, rest = parts(size)
    lengths = (0, 0) if isinstance(length, int) or length.numel() == 1 else length.stride()
    starts = (0, 0) if start is None else start.stride()
    no_start = query if start is None else start
    out = torch.empty(batch, query_heads, 1, size, dtype=query.dtype, device=query.device)
    part = torch.empty(batch, items, groups, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, items, groups, dtype=torch.float32, device=query.device)
    strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *lengths, *starts)
    numbers = (scaling * math.log2(math.e), heads, capacity, splits, items, blocks.pages, blocks.chunk)
    shared = {
        "EVEN": pages.even, "GROUPS": groups, "SIZE": size, "HEADS": power_of_two(heads + 1),
        "TENSOR": not isinstance(length, int), "HAS_START": start is not None, "OVERLAP": blocks.overlap,
    }  # fmt: skip
    split_kernel[(items, batch)](
        query, part, lse, keys, values, length, no_start, *_arguments(pages), pages.row_pages, *strides, *numbers,
        BITS=pages.bits, SCALES=scales, FIRST=first, REST=rest, ROWS=power_of_two(columns),
        BLOCK=32, STAGES=blocks.stages, ASM=not INTERPRETED, num_warps=blocks.warps, **shared,
        **({"maxnreg": blocks.registers} if blocks.registers else {}),
    )  # fmt: skip
    wide = power_of_two(size)
    join_kernel[(query_heads, batch)](
        query, part, lse, out, keys, values, new_key, new_value, target, length, no_start, pages.count,
        pages.row_pages, *strides, *new_key.stride()[:2], *new_value.stride()[:2], *target.stride()[:3],
        target.shape[2], *numbers,
        WIDE=wide, PARTS=max(4, 4096 // wide // 2), NEW=new is not None, RING=ring is not None, num_warps=4, **shared,
        **({"launch_pdl": True} if blocks.overlap else {}),
    )  # fmt: skip
    return out


def _arguments(pages: Pages) -> tuple[Tensor, ...]:
    """The tensors of pages as the kernel takes them; where numbers are stored as they are, they stand for scales."""
    keys, values = pages.keys.plain(), pages.values.plain()
    key_scale, key_zero = (keys.codes if t is None else t for t in (keys.scale, keys.zero))
    value_scale, value_zero = (values.codes if t is None else t for t in (values.scale, values.zero))
    return (
        keys.codes, key_scale, key_zero, values.codes, value_scale, value_zero, pages.count, pages.first, pages.start
    )  # fmt: skip
