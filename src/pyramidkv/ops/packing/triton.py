"""The same as `naive.py` in one launch: a program writes some channels of a page, keys or values, from one reading.

Those channels share a scale if they are values; keys are cut the same way. A head size like 80 is read as 64 + 16, so
that a thread reads 16 bytes at once. What goes into a word of 4 bytes is a sum along the axes of a tile that a thread
holds whole: nothing is exchanged byte by byte. One warp needs no barriers, so a page has as few as its registers allow.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated,unreachable"
# ruff: noqa: N803, N806

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, parts, power_of_two
from pyramidkv.ops.launch import KNOWN, Launch
from pyramidkv.ops.quantize import PAGE, Codes, Paged, room_for, value_group
from pyramidkv.ops.select.naive import spread

_TINY = tl.constexpr(2.0**-14)  # the least normal float16
# 1.5 * 2^23: what is added to it is rounded to a whole number, halves to even, which is in the lowest bits of the sum.
_ROUND = tl.constexpr(12582912.0)


REGISTERS = 168  # of a thread, so that 12 warps fit on a multiprocessor; more of them are wanted, and few are spilled


def warps(group: int, itemsize: int) -> int:
    """Warps of a program for groups of that many channels: at most 80 registers a thread for what it has read."""
    return power_of_two(-(-PAGE * group * itemsize // (32 * 80 * 4)))


@triton.jit
def _scale(low, high, BITS: tl.constexpr):
    """Scale and zero point of a range, float16, and the inverse of the scale."""
    low = tl.where(tl.abs(low) < float("inf"), low, 0.0)  # of empty slots alone, if it is not
    high = tl.where(tl.abs(high) < float("inf"), high, 0.0)
    zero = low.to(tl.float16)
    scale = tl.div_rn(high - zero.to(tl.float32), tl.full(low.shape, 2**BITS - 1, tl.float32)).to(tl.float16)
    scale = tl.maximum(scale.to(tl.float32), _TINY)
    return scale.to(tl.float16), zero, tl.div_rn(tl.full(low.shape, 1.0, tl.float32), scale)


@triton.jit
def _code(x, inverse, zero, BITS: tl.constexpr):
    x = (x - zero.to(tl.float32)) * inverse
    x = tl.minimum(tl.maximum(x, 0.0), 2.0**BITS - 1)  # before rounding: the same, and what is rounded is small
    return (x + _ROUND).to(tl.int32, bitcast=True) & (2**BITS - 1)


@triton.jit
def _slots(index, column, width):
    """Where the tokens of a page are, and which are there."""
    slot = tl.load(index + column, mask=(column >= 0) & (column < width), other=-1)
    real = slot >= 0
    return tl.where(real, slot, 0).to(tl.int64), real


@triton.jit
def _read(base, slot, real, stride, OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """Channels OFFSET to OFFSET + WIDE of the slots, (*, *, WIDE); zeros for empty ones and from GROUP on."""
    channel = OFFSET + tl.arange(0, WIDE)
    there = real[:, :, None]
    if OFFSET + WIDE > GROUP:
        there = there & (channel < GROUP)[None, None, :]
    return tl.load(base + slot[:, :, None] * stride + channel[None, None, :], mask=there, other=0.0)


@triton.jit
def _copy_part(base, slot, real, stride, token, target, OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
               SIZE: tl.constexpr):  # fmt: skip
    x = _read(base, slot, real, stride, OFFSET, WIDE, GROUP)
    channel = OFFSET + tl.arange(0, WIDE)
    there = (token >= 0)[:, :, None] & (channel < GROUP)[None, None, :]
    tl.store(target + token[:, :, None] * SIZE + channel[None, None, :], x, mask=there)


@triton.jit
def _copy(base, index, column, width, stride, target, FIRST: tl.constexpr, REST: tl.constexpr, GROUP: tl.constexpr,
          SIZE: tl.constexpr):  # fmt: skip
    """A page as it is."""
    token = tl.arange(0, 2)[:, None] * 32 + tl.arange(0, 32)[None, :]
    slot, real = _slots(index, column + token, width)
    _copy_part(base, slot, real, stride, token, target, 0, FIRST, GROUP, SIZE)
    if REST > 0:
        _copy_part(base, slot, real, stride, token, target, FIRST, REST, GROUP, SIZE)


@triton.jit
def _key_part(
    x, real, codes, scale, zero, OFFSET: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Some channels of a page of keys, (8 * BITS, 8 / BITS, WIDE): the bytes of a channel, the codes of each."""
    ROWS: tl.constexpr = 8 * BITS
    x = x.to(tl.float32)
    there = real[:, :, None]
    low = tl.min(tl.min(tl.where(there, x, float("inf")), 1, keep_dims=True), 0, keep_dims=True)
    high = tl.max(tl.max(tl.where(there, x, float("-inf")), 1, keep_dims=True), 0, keep_dims=True)
    step, origin, inverse = _scale(low, high, BITS)
    channel = OFFSET + tl.arange(0, WIDE)
    tl.store(scale + channel, tl.reshape(step, [WIDE]), mask=channel < GROUP)
    tl.store(zero + channel, tl.reshape(origin, [WIDE]), mask=channel < GROUP)
    code = _code(x, inverse, origin, BITS) << (tl.arange(0, 8 // BITS) * BITS)[None, :, None]
    four = tl.reshape(tl.sum(code, 1), [ROWS, WIDE // 4, 4])
    word = tl.sum(four << (tl.arange(0, 4) * 8)[None, None, :], 2)
    place = OFFSET // 4 + tl.arange(0, WIDE // 4)
    where = codes + tl.arange(0, ROWS)[:, None] * (SIZE // 4) + place[None, :]
    tl.store(where, word, mask=(tl.arange(0, ROWS) >= 0)[:, None] & (place < GROUP // 4)[None, :])


@triton.jit
def _keys(base, index, column, width, stride, codes, scale, zero, FIRST: tl.constexpr, REST: tl.constexpr,
          GROUP: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """A group of channels of a page of keys."""
    token = tl.arange(0, 8 * BITS)[:, None] + (8 * BITS) * tl.arange(0, 8 // BITS)[None, :]
    slot, real = _slots(index, column + token, width)
    one = _read(base, slot, real, stride, 0, FIRST, GROUP)
    if REST > 0:
        two = _read(base, slot, real, stride, FIRST, REST, GROUP)
    _key_part(one, real, codes, scale, zero, 0, FIRST, GROUP, SIZE, BITS)
    if REST > 0:
        _key_part(two, real, codes, scale, zero, FIRST, REST, GROUP, SIZE, BITS)


@triton.jit
def _values(base, index, column, width, stride, codes, scale, zero, PIECE: tl.constexpr,
            GROUP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """One of `GROUPS` groups of channels of a page of values: tiles (2 * BITS, 32 / BITS, PIECE), words by codes."""
    j = tl.arange(0, 32 // BITS)  # the plane, and the byte in a word
    token = 4 * tl.arange(0, 2 * BITS)[:, None] + (j // 4 * (8 * BITS) + j % 4)[None, :]
    shift = (j // 4 * BITS + j % 4 * 8)[None, :, None]
    slot, real = _slots(index, column + token, width)
    pieces = ()
    for offset in tl.static_range(0, GROUP, PIECE):
        pieces += (_read(base, slot, real, stride, offset, PIECE, GROUP),)
    low = tl.full([2 * BITS, 32 // BITS, PIECE], float("inf"), tl.float32)
    high = -low
    for i in tl.static_range((GROUP + PIECE - 1) // PIECE):
        x = pieces[i].to(tl.float32)
        inside = (i * PIECE + tl.arange(0, PIECE) < GROUP)[None, None, :]
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
    step, origin, inverse = _scale(tl.min(low, 2), tl.max(high, 2), BITS)
    tl.store(scale + token * GROUPS, step)
    tl.store(zero + token * GROUPS, origin)
    for i in tl.static_range((GROUP + PIECE - 1) // PIECE):
        code = _code(pieces[i].to(tl.float32), inverse[:, :, None], origin[:, :, None], BITS)
        word = tl.sum(code << shift, 1)
        channel = i * PIECE + tl.arange(0, PIECE)
        where = codes + channel[None, :] * (2 * BITS) + tl.arange(0, 2 * BITS)[:, None]
        tl.store(where, word, mask=(tl.arange(0, 2 * BITS) >= 0)[:, None] & (channel < GROUP)[None, :])


@triton.jit(do_not_specialize=["width", "pages", "room", "limit", "recent", "sol"])
def pack_kernel(
    key, value, index, limits, layout, key_codes, key_scale, key_zero, value_codes, value_scale, value_zero,
    skb, skh, skn, svb, svh, svn, sib, sih, slb, slh, sol, limit, recent,
    heads, width, pages, room, HEADS: tl.constexpr,
    SIZE: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, BITS: tl.constexpr,
    V_SIZE: tl.constexpr, V_GROUP: tl.constexpr, V_FIRST: tl.constexpr, V_REST: tl.constexpr,
    PIECE: tl.constexpr, EVEN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """(pages * groups of keys and values, B) programs; the first of each row also writes where the pages lie.

    A row has room for `room` pages, of which `pages` are written.
    """
    GROUPS: tl.constexpr = SIZE // GROUP
    V_GROUPS: tl.constexpr = V_SIZE // V_GROUP
    group = tl.program_id(0) % (GROUPS + V_GROUPS)
    page, row = tl.program_id(0) // (GROUPS + V_GROUPS), tl.program_id(1).to(tl.int64)
    head_lane = tl.arange(0, HEADS)
    if EACH:
        limit = tl.load(limits + row * slb + head_lane * slh, mask=head_lane < heads, other=0)
    used = tl.maximum(limit - recent, 0)
    count = tl.where(head_lane < heads, tl.cdiv(width if EVEN else used, 64), 0)
    last = tl.cumsum(count, 0)
    if tl.program_id(0) == 0:
        mine = layout + row * heads + head_lane
        tl.store(mine, last - count, mask=head_lane < heads)
        tl.store(mine + sol, count, mask=head_lane < heads)
        tl.store(mine + 2 * sol, count * 64 - used, mask=head_lane < heads)
    owner = tl.minimum(tl.sum(((last <= page) & (head_lane < heads)).to(tl.int32), 0), heads - 1)
    column = width - 64 * (tl.sum(tl.where(head_lane == owner, last, 0), 0) - page)
    at = row * room + page
    index += row * sib + owner.to(tl.int64) * sih
    if group < GROUPS:
        key += row * skb + owner.to(tl.int64) * skh + group * GROUP
        if BITS == 16:
            target = key_codes + at * (64 * SIZE) + group * GROUP
            _copy(key, index, column, width, skn, target, FIRST, REST, GROUP, SIZE)
        else:
            codes = key_codes + (at * (8 * BITS) * SIZE + group * GROUP) // 4
            place = at * SIZE + group * GROUP
            _keys(
                key, index, column, width, skn, codes, key_scale + place, key_zero + place,
                FIRST, REST, GROUP, SIZE, BITS,
            )  # fmt: skip
    else:
        group -= GROUPS
        value += row * svb + owner.to(tl.int64) * svh + group * V_GROUP
        if BITS == 16:
            target = value_codes + at * (64 * V_SIZE) + group * V_GROUP
            _copy(value, index, column, width, svn, target, V_FIRST, V_REST, V_GROUP, V_SIZE)
        else:
            codes = value_codes + (at * V_SIZE + group * V_GROUP) * (2 * BITS)
            place = at * (64 * V_GROUPS) + group
            _values(
                value, index, column, width, svn, codes, value_scale + place, value_zero + place,
                PIECE, V_GROUP, V_GROUPS, BITS,
            )  # fmt: skip


def pack(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    limits: Sequence[int] | Tensor,
    recent: int,
    pages: int,
    bits: int,
    even: bool,
    into: Paged | None = None,
) -> Paged:
    """As `naive.pack`, for groups of channels (`value_group`) that are a multiple of 4, and at least one page.

    `into` is where to write: pages of B rows, as `room_for` gives them, `pages` or more a row.
    """
    rows, heads, _ = index.shape
    key, value, index = dense(key), dense(value), dense(index)
    sizes = key.shape[-1], value.shape[-1]
    keys, values, layout = into or room_for(rows, pages, heads, sizes, bits, key.dtype, key.device)
    room = keys.codes.shape[1], layout.stride(0)
    limit, each = spread(limits, heads, key.device)
    strides = key.stride(), value.stride(), index.stride(), None if each is None else each.stride()
    launch = _launch(index.shape, sizes, strides, limit, recent, pages, room, bits, even, key.itemsize)
    pointers = *_arguments(keys), *_arguments(values)
    launch(key, value, index, layout if each is None else each, layout, *pointers)
    return keys, values, layout


@lru_cache(maxsize=KNOWN)
def _launch(
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    strides: tuple[tuple[int, ...] | None, ...],
    limit: int,
    recent: int,
    pages: int,
    room: tuple[int, int],
    bits: int,
    even: bool,
    itemsize: int,
) -> Launch:
    """For this shape of an index, these head sizes, and these strides of keys, values, index and limits.

    `room`: the pages that a row has room for, and the stride of the layout.
    """
    rows, heads, width = shape
    group, v_group = map(value_group, sizes)
    (first, rest), (v_first, v_rest) = parts(group), parts(v_group)
    key, value, index, each = strides
    assert key is not None and value is not None and index is not None
    return Launch(
        pack_kernel, (pages * (sizes[0] // group + sizes[1] // v_group), rows),
        *key[:3], *value[:3], *index[:2], *each or (0, 0), room[1],
        limit, recent, heads, width, pages, room[0],
        HEADS=power_of_two(heads), SIZE=sizes[0], GROUP=group, FIRST=first, REST=rest, BITS=bits,
        V_SIZE=sizes[1], V_GROUP=v_group, V_FIRST=v_first, V_REST=v_rest,
        PIECE=max(16, v_group & -v_group), EVEN=even, EACH=each is not None,
        num_warps=warps(max(group, v_group), itemsize), maxnreg=REGISTERS,
    )  # fmt: skip


def _arguments(pages: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as words of 4 bytes, scales and zero points; numbers as they are stand for all three."""
    if pages.scale is None or pages.zero is None:
        return pages.codes, pages.codes, pages.codes
    return pages.codes.view(torch.int32), pages.scale, pages.zero
