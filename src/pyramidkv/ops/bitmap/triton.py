"""The same as `naive.py` in one launch each.

Positions rise, so those of a byte lie together when they are packed, and the first writes it. To unpack them, a program
counts the bits of a whole head, a few kilobytes, and writes the positions of some of them.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, tiles
from pyramidkv.ops.launch import KNOWN, Launch

_BLOCK = 1024


@triton.jit
def _positions(position, index, slot, slots, spn):
    """Positions of the slots `index[slot]`; -1 for none."""
    chosen = tl.load(index + slot, mask=(slot >= 0) & (slot < slots), other=-1)
    return tl.load(position + chosen * spn, mask=chosen >= 0, other=-1)


@triton.jit(do_not_specialize=["slots", "width"])
def bitmap_kernel(position, index, bitmap, spb, sph, spn, sib, sih, heads, slots, width, BLOCK: tl.constexpr):
    """(blocks of slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // heads, program % heads
    position += batch * spb + head * sph
    index += batch * sib + head * sih
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = _positions(position, index, slot, slots, spn)
    before = _positions(position, index, slot - 1, slots, spn)
    byte = place >> 3
    bits = 1 << (place & 7)
    for ahead in tl.static_range(1, 8):
        other = _positions(position, index, slot + ahead, slots, spn)
        bits |= tl.where(other >> 3 == byte, 1 << (other & 7), 0)
    tl.store(bitmap + program * width + byte, bits.to(tl.uint8), mask=(place >= 0) & (before >> 3 != byte))


def pack_positions(positions: Tensor, index: Tensor, into: Tensor) -> None:
    """As `naive.pack_positions`, into a contiguous bitmap."""
    if not into.is_contiguous():
        raise ValueError("into: the bitmap must be contiguous")
    index = dense(index)
    into.zero_()
    _packing(index.shape, positions.stride(), index.stride(), into.shape[2])(positions, index, into)


@lru_cache(maxsize=KNOWN)
def _packing(shape: tuple[int, ...], positions: tuple[int, ...], index: tuple[int, ...], width: int) -> Launch:
    """For this shape of an index, and strides of positions and index."""
    rows, heads, slots = shape
    grid = tiles(slots, _BLOCK), rows * heads
    return Launch(bitmap_kernel, grid, *positions, *index[:2], heads, slots, width, BLOCK=_BLOCK)


@triton.jit
def _ones(byte):
    """Bits that are set."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit(do_not_specialize=["slots", "width"])
def positions_kernel(bitmap, positions, slots, width, BLOCK: tl.constexpr):
    """(blocks of positions or slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)
    bitmap += program * width
    positions += program * slots
    begin = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    ends = tl.zeros([BLOCK], tl.int32)  # set bits of all bytes, and of those behind this block
    behind = tl.zeros([BLOCK], tl.int32)
    for at in range(0, width, BLOCK):
        byte = at + lane
        ones = _ones(tl.load(bitmap + byte, mask=byte < width, other=0).to(tl.int32))
        ends += ones
        behind += tl.where(byte >= (begin + BLOCK) // 8, ones, 0)
    place = begin + lane
    byte = tl.load(bitmap + place // 8, mask=place // 8 < width, other=0).to(tl.int32)
    bit = (byte >> (place % 8)) & 1
    total = tl.sum(ends, 0)
    slot = slots - tl.sum(behind, 0) - tl.sum(bit, 0) + tl.cumsum(bit, 0) - 1
    tl.store(positions + slot, place, mask=(bit == 1) & (slot >= 0))
    tl.store(positions + place, tl.full([BLOCK], -1, tl.int32), mask=place < slots - total)


def unpack_positions(bitmap: Tensor, slots: int) -> Tensor:
    """As `naive.unpack_positions`."""
    positions = torch.empty(*bitmap.shape[:2], slots, dtype=torch.int32, device=bitmap.device)
    _unpacking(bitmap.shape, slots)(bitmap.contiguous(), positions)
    return positions


@lru_cache(maxsize=KNOWN)
def _unpacking(shape: tuple[int, ...], slots: int) -> Launch:
    """For this shape of a bitmap."""
    rows, heads, width = shape
    grid = tiles(max(8 * width, slots), _BLOCK), rows * heads
    return Launch(positions_kernel, grid, slots, width, BLOCK=_BLOCK)
