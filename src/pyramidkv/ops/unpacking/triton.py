"""The same as `naive.py` in one launch, bound by the bytes that it writes.

A program writes some channels of 64 slots, keys or values: those of a page, cut as `packing` cuts them, or zeros where
a head has fewer pages than another. A code becomes a number by an exponent put in front of it, which costs less than a
conversion; a code times a scale is exact in float32, so the result is rounded as if it were computed in one step.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import parts
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.quantize import PAGE, Codes, value_group

WARPS = 2  # of a program: 80 numbers a thread at head size 80, in 72 registers
# 2^23: with a code in its lowest bits it is that much and the code.
_LIFT = tl.constexpr(8388608.0)
_LIFT_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _put(target, slot, empty, stride, x, OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Write (slots, WIDE) to the channels from OFFSET on; slots before `empty` become zeros."""
    channel = OFFSET + tl.arange(0, WIDE)
    x = tl.where((slot >= empty)[:, None], x, 0.0)
    place = target + slot[:, None] * stride + channel[None, :]
    if OFFSET + WIDE <= GROUP:
        tl.store(place, x.to(target.dtype.element_ty))
    else:
        tl.store(place, x.to(target.dtype.element_ty), mask=(slot >= 0)[:, None] & (channel < GROUP)[None, :])


@triton.jit
def _part(
    target, stride, codes, scale, zero, empty, per_slot, per_channel,
    KEYS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The channels OFFSET to OFFSET + WIDE of a page; its codes lie `per_slot` and `per_channel` apart."""
    ROWS: tl.constexpr = 64 if BITS == 16 else 8 * BITS
    row = tl.arange(0, ROWS)
    channel = OFFSET + tl.arange(0, WIDE)
    inside = channel < GROUP
    place = codes + row[:, None] * per_slot + channel[None, :] * per_channel
    code = tl.load(place, mask=(row >= 0)[:, None] & inside[None, :], other=0)
    if BITS == 16:
        _put(target, row, empty, stride, code, OFFSET, WIDE, GROUP)
    else:
        if KEYS:
            step = tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            origin = tl.load(zero + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        for plane in tl.static_range(8 // BITS):
            slot = plane * ROWS + row
            if not KEYS:
                step = tl.load(scale + slot * SCALES).to(tl.float32)[:, None]
                origin = tl.load(zero + slot * SCALES).to(tl.float32)[:, None]
            lifted = ((code.to(tl.int32) >> (plane * BITS)) & (2**BITS - 1)) | _LIFT_BITS
            number = lifted.to(tl.float32, bitcast=True) - _LIFT
            _put(target, slot, empty, stride, number * step + origin, OFFSET, WIDE, GROUP)


@triton.jit
def _nothing(target, stride, OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Zeros in 64 slots."""
    x = tl.zeros([64, WIDE], tl.float32)
    _put(target, tl.arange(0, 64), 64, stride, x, OFFSET, WIDE, GROUP)


@triton.jit
def _group(
    target, stride, codes, scale, zero, empty, per_slot, per_channel,
    KEYS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A group of channels of a page, or of none where all is empty."""
    if empty >= 64:
        _nothing(target, stride, 0, FIRST, GROUP)
        if REST > 0:
            _nothing(target, stride, FIRST, REST, GROUP)
    else:
        _part(target, stride, codes, scale, zero, empty, per_slot, per_channel, KEYS, BITS, SCALES, 0, FIRST, GROUP)
        if REST > 0:
            _part(
                target, stride, codes, scale, zero, empty, per_slot, per_channel, KEYS, BITS, SCALES,
                FIRST, REST, GROUP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["pages", "most"])
def unpack_kernel(
    keys, values, layout, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
    tkb, tkh, tkn, tvb, tvh, tvn, pages, most,
    SIZE: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    V_SIZE: tl.constexpr, V_GROUP: tl.constexpr, V_FIRST: tl.constexpr, V_REST: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """(most * groups of keys and values, H, B) programs."""
    GROUPS: tl.constexpr = SIZE // GROUP
    V_GROUPS: tl.constexpr = V_SIZE // V_GROUP
    ROWS: tl.constexpr = 64 if BITS == 16 else 8 * BITS
    page, group = tl.program_id(0) // (GROUPS + V_GROUPS), tl.program_id(0) % (GROUPS + V_GROUPS)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    owners = tl.num_programs(1) * tl.num_programs(2)
    mine = layout + row * tl.num_programs(1) + head
    first, count, start = tl.load(mine), tl.load(mine + owners), tl.load(mine + 2 * owners)
    behind = page - (most - count)  # pages of the head before this one
    empty = start - behind * 64
    at = row * pages + first + behind
    if group < GROUPS:
        channel = group * GROUP
        _group(
            keys + row * tkb + head * tkh + page.to(tl.int64) * 64 * tkn + channel, tkn,
            key_codes + at * (ROWS * SIZE) + channel, key_scale + at * SIZE + channel, key_zero + at * SIZE + channel,
            empty, SIZE, 1, True, BITS, 1, FIRST, REST, GROUP,
        )  # fmt: skip
    else:
        group -= GROUPS
        channel = group * V_GROUP
        place = at * (64 * V_GROUPS) + group
        if BITS == 16:
            codes = value_codes + at * (64 * V_SIZE) + channel
        else:
            codes = value_codes + (at * V_SIZE + channel) * ROWS
        _group(
            values + row * tvb + head * tvh + page.to(tl.int64) * 64 * tvn + channel, tvn,
            codes, value_scale + place, value_zero + place,
            empty, V_SIZE if BITS == 16 else 1, 1 if BITS == 16 else ROWS, False, BITS, V_GROUPS,
            V_FIRST, V_REST, V_GROUP,
        )  # fmt: skip


def unpack(keys: Codes, values: Codes, layout: Tensor, targets: tuple[Tensor, Tensor], *, warps: int = WARPS) -> None:
    """As `naive.unpack`; the channels of the targets must lie side by side."""
    if any(t.stride(-1) != 1 for t in targets):
        raise ValueError("targets: the channels must lie side by side")
    strides = targets[0].stride(), targets[1].stride()
    launch = _launch(
        layout.shape, targets[0].shape, targets[1].shape[-1], strides, keys.codes.shape[1], keys.bits, warps
    )
    launch(*targets, layout.contiguous(), *_arguments(keys), *_arguments(values))


@lru_cache(maxsize=KNOWN)
def _launch(
    layout: tuple[int, ...],
    keys: tuple[int, ...],
    v_size: int,
    strides: tuple[tuple[int, ...], ...],
    pages: int,
    bits: int,
    warps: int,
) -> Launch:
    """For these shapes of a layout and of keys, head size of values, strides of both, and pages of a row."""
    _, rows, heads = layout
    size, most = keys[3], keys[2] // PAGE
    group, v_group = value_group(size), value_group(v_size)
    (first, rest), (v_first, v_rest) = parts(group), parts(v_group)
    return Launch(
        unpack_kernel, (most * (size // group + v_size // v_group), heads, rows),
        *strides[0][:3], *strides[1][:3], pages, most,
        SIZE=size, GROUP=group, FIRST=first, REST=rest,
        V_SIZE=v_size, V_GROUP=v_group, V_FIRST=v_first, V_REST=v_rest, BITS=bits, num_warps=warps,
    )  # fmt: skip


def _arguments(pages: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points; numbers as they are stand for all three."""
    scale, zero = (pages.codes if t is None else t for t in (pages.scale, pages.zero))
    return pages.codes, scale, zero
