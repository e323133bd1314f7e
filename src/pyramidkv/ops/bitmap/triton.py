"""The same as `naive.py` in one launch. Positions rise, so those of a byte lie together, and the first writes it."""
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


def pack_positions(positions: Tensor, index: Tensor, tokens: int) -> Tensor:
    """As `naive.pack_positions`."""
    index = dense(index)
    bitmap = torch.zeros(*index.shape[:2], -(-tokens // 8), dtype=torch.uint8, device=index.device)
    _launch(index.shape, positions.stride(), index.stride(), bitmap.shape[2])(positions, index, bitmap)
    return bitmap


@lru_cache(maxsize=KNOWN)
def _launch(shape: tuple[int, ...], positions: tuple[int, ...], index: tuple[int, ...], width: int) -> Launch:
    """For this shape of an index, and strides of positions and index."""
    rows, heads, slots = shape
    grid = tiles(slots, _BLOCK), rows * heads
    return Launch(bitmap_kernel, grid, *positions, *index[:2], heads, slots, width, BLOCK=_BLOCK)
