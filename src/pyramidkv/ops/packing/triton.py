"""The same as `naive.py` in one launch: a program reads the 64 slots of a page once and writes its codes and scales."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two
from pyramidkv.ops.quantize import Codes, value_group

_TINY = tl.constexpr(2.0**-14)  # the least normal float16
# 1.5 * 2^23: what is added to it is rounded to a whole number, halves to even, which is in the lowest bits of the sum.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _scale(low, high, BITS: tl.constexpr):
    """Scale and zero point of a range, float16, and the inverse of the scale."""
    zero = low.to(tl.float16)
    scale = tl.div_rn(high - zero.to(tl.float32), low * 0.0 + (2**BITS - 1)).to(tl.float16)
    scale = tl.maximum(scale.to(tl.float32), _TINY)
    return scale.to(tl.float16), zero, tl.div_rn(scale * 0.0 + 1.0, scale)


@triton.jit
def _code(x, inverse, zero, BITS: tl.constexpr):
    x = (x - zero.to(tl.float32)) * inverse
    x = tl.minimum(tl.maximum(x, 0.0), 2.0**BITS - 1)  # before rounding: the same, and what is rounded is small
    return (x + _ROUND).to(tl.int32, bitcast=True) & (2**BITS - 1)


@triton.jit(do_not_specialize=["width", "pages"])
def pack_kernel(
    key, value, index, count, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
    skb, skh, skn, svb, svh, svn, heads, width, pages,
    SIZE: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
):  # fmt: skip
    """(pages, B) programs."""
    page, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head_lane = tl.arange(0, HEADS)
    last = tl.cumsum(tl.load(count + row * heads + head_lane, mask=head_lane < heads, other=0).to(tl.int32), 0)
    owner = tl.minimum(tl.sum(((last <= page) & (head_lane < heads)).to(tl.int32), 0), heads - 1)
    behind = tl.sum(tl.where(head_lane == owner, last, 0), 0) - page
    at = row * pages + page
    column = width - 64 * behind
    index += (row * heads + owner) * width
    key += row * skb + owner.to(tl.int64) * skh
    value += row * svb + owner.to(tl.int64) * svh

    whole = column + tl.arange(0, 64)
    slot = tl.load(index + whole, mask=(whole >= 0) & (whole < width), other=-1)
    real = slot >= 0
    line = tl.maximum(slot, 0).to(tl.int64)
    KEY_ROWS: tl.constexpr = 8 * KEY_BITS
    for first in tl.static_range(0, SIZE, 64):
        channel = first + tl.arange(0, 64)
        inside = channel < SIZE
        x = tl.load(key + line[:, None] * skn + channel[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        low = tl.min(tl.where(real[:, None], x, float("inf")), 0)
        high = tl.max(tl.where(real[:, None], x, float("-inf")), 0)
        some = low <= high  # else a page of empty slots alone
        scale, zero, inverse = _scale(tl.where(some, low, 0.0), tl.where(some, high, 0.0), KEY_BITS)
        tl.store(key_scale + at * SIZE + channel, scale, mask=inside)
        tl.store(key_zero + at * SIZE + channel, zero, mask=inside)
        byte = tl.arange(0, KEY_ROWS)
        packed = tl.zeros([KEY_ROWS, 64], tl.int32)
        for plane in tl.static_range(8 // KEY_BITS):
            there = column + plane * KEY_ROWS + byte
            line_ = tl.maximum(tl.load(index + there, mask=(there >= 0) & (there < width), other=-1), 0).to(tl.int64)
            x = tl.load(key + line_[:, None] * skn + channel[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            packed |= _code(x, inverse[None, :], zero[None, :], KEY_BITS) << (plane * KEY_BITS)
        place = key_codes + (at * KEY_ROWS + byte[:, None]) * SIZE + channel[None, :]
        tl.store(place, packed.to(tl.uint8), mask=inside[None, :])

    VALUE_ROWS: tl.constexpr = 8 * VALUE_BITS
    byte = tl.arange(0, VALUE_ROWS)
    for group in tl.static_range(SIZE // GROUP):
        lane = tl.arange(0, WIDE)
        channel = group * GROUP + lane
        inside = lane < GROUP
        packed = tl.zeros([VALUE_ROWS, WIDE], tl.int32)
        for plane in tl.static_range(8 // VALUE_BITS):
            there = column + plane * VALUE_ROWS + byte
            line_ = tl.maximum(tl.load(index + there, mask=(there >= 0) & (there < width), other=-1), 0).to(tl.int64)
            x = tl.load(value + line_[:, None] * svn + channel[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            low = tl.min(tl.where(inside[None, :], x, float("inf")), 1)
            high = tl.max(tl.where(inside[None, :], x, float("-inf")), 1)
            scale, zero, inverse = _scale(low, high, VALUE_BITS)
            place = (at * 64 + plane * VALUE_ROWS + byte) * (SIZE // GROUP) + group
            tl.store(value_scale + place, scale)
            tl.store(value_zero + place, zero)
            packed |= _code(x, inverse[:, None], zero[:, None], VALUE_BITS) << (plane * VALUE_BITS)
        place = value_codes + (at * SIZE + channel[:, None]) * VALUE_ROWS + byte[None, :]
        tl.store(place, tl.trans(packed).to(tl.uint8), mask=inside[:, None])


def pack(
    key: Tensor, value: Tensor, index: Tensor, count: Tensor, pages: int, key_bits: int, value_bits: int
) -> tuple[Codes, Codes]:
    """As `naive.pack`, for heads of one size and 8, 4 or 2 bits."""
    rows, heads, width = index.shape
    size = key.shape[-1]
    group = value_group(size)
    key, value = dense(key), dense(value)

    def codes(bits: int, shape: tuple[int, int], scales: tuple[int, ...]) -> Codes:
        scale, zero = (torch.empty(rows, pages, *scales, dtype=torch.float16, device=key.device) for _ in range(2))
        return Codes(torch.empty(rows, pages, *shape, dtype=torch.uint8, device=key.device), scale, zero, bits)

    keys = codes(key_bits, (8 * key_bits, size), (size,))
    values = codes(value_bits, (size, 8 * value_bits), (64, size // group))
    if pages:
        pack_kernel[(pages, rows)](
            key, value, index.contiguous(), count.contiguous(),
            keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero,
            *key.stride()[:3], *value.stride()[:3], heads, width, pages,
            SIZE=size, GROUP=group, WIDE=power_of_two(group), HEADS=power_of_two(heads),
            KEY_BITS=key_bits, VALUE_BITS=value_bits, num_warps=4,
        )  # fmt: skip
    return keys, values
