"""The same as `naive.py` in one launch, bound by the bytes that it moves.

A program copies some slots of one row and head: all loads are under way before the first store. A head size like 80 is
read as 64 + 16 channels, so that every thread moves 16 bytes at once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.compact.naive import Slots
from pyramidkv.ops.kernels import dense, parts, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch


@dataclass(frozen=True)
class Blocks:
    """What a program copies."""

    rows: int  # slots
    warps: int
    halves: bool = True  # read a head size like 80 as 64 + 16 rather than as a masked 128


def choose(row_bytes: int) -> Blocks:
    """Tiles for keys or values, whichever is larger, of that many bytes a slot: 16 kB of each a program."""
    rows = 1 << ((16384 // row_bytes).bit_length() - 1)
    return Blocks(min(64, rows), 4)


@triton.jit
def _read(base, offset, ok, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Channels FIRST to FIRST + WIDE of the rows at base + offset; rows that are not ok are zeros."""
    channel = FIRST + tl.arange(0, WIDE)
    within = ok[:, None]
    if FIRST + WIDE > SIZE:
        within = within & (channel < SIZE)[None, :]
    return tl.load(base + offset[:, None] + channel[None, :], mask=within, other=0.0)


@triton.jit
def _put(base, offset, ok, x, FIRST: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """The opposite of `_read`, in the dtype of the target."""
    channel = FIRST + tl.arange(0, WIDE)
    within = ok[:, None]
    if FIRST + WIDE > SIZE:
        within = within & (channel < SIZE)[None, :]
    tl.store(base + offset[:, None] + channel[None, :], x.to(base.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["kept"])
def compact_kernel(
    key, value, position, index, keys, values, positions,
    skb, skh, skn, svb, svh, svn, spb, sph, spn, sib, sih, tkb, tkh, tkn, tvb, tvh, tvn, tpb, tph, tpn, heads, kept,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    V_SIZE: tl.constexpr, V_FIRST: tl.constexpr, V_REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(tiles of slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)  # offsets pass 2^31 in long prompts
    batch, head = program // heads, program % heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < kept
    slot = tl.load(index + batch * sib + head * sih + row, mask=there, other=-1)
    real = slot >= 0
    slot = tl.where(real, slot, 0)
    key += batch * skb + head * skh
    value += batch * svb + head * svh
    one = _read(key, slot * skn, real, 0, FIRST, SIZE)
    two = _read(value, slot * svn, real, 0, V_FIRST, V_SIZE)
    if REST > 0:
        one_rest = _read(key, slot * skn, real, FIRST, REST, SIZE)
    if V_REST > 0:
        two_rest = _read(value, slot * svn, real, V_FIRST, V_REST, V_SIZE)
    where = tl.load(position + batch * spb + head * sph + slot * spn, mask=real, other=-1)
    keys += batch * tkb + head * tkh
    values += batch * tvb + head * tvh
    _put(keys, row * tkn, there, one, 0, FIRST, SIZE)
    _put(values, row * tvn, there, two, 0, V_FIRST, V_SIZE)
    if REST > 0:
        _put(keys, row * tkn, there, one_rest, FIRST, REST, SIZE)
    if V_REST > 0:
        _put(values, row * tvn, there, two_rest, V_FIRST, V_REST, V_SIZE)
    tl.store(positions + batch * tpb + head * tph + row * tpn, where, mask=there)


def compact(sources: Slots, index: Tensor, targets: Slots, *, blocks: Blocks | None = None) -> None:
    """As `naive.compact`. Any strides do; channels that do not lie side by side cost a copy of the source."""
    if index.numel() == 0:
        return
    key, value, position = dense(sources[0]), dense(sources[1]), sources[2]
    index = dense(index)
    keys, values, positions = targets
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError("targets: the channels of the buffers must lie side by side")
    moved = key, value, position, index, keys, values, positions
    sizes = key.shape[-1], value.shape[-1]
    bytes_a_slot = max(t.shape[-1] * t.itemsize for t in (key, value))
    _launch(index.shape, sizes, tuple(t.stride() for t in moved), bytes_a_slot, blocks)(*moved)


@lru_cache(maxsize=KNOWN)
def _launch(
    index: tuple[int, ...],
    sizes: tuple[int, int],
    strides: tuple[tuple[int, ...], ...],
    bytes_a_slot: int,
    blocks: Blocks | None,
) -> Launch:
    """For these head sizes of keys and values, and these strides of all tensors."""
    batch, heads, kept = index
    blocks = blocks or choose(bytes_a_slot)
    (first, rest), (v_first, v_rest) = (parts(n) if blocks.halves else (power_of_two(n), 0) for n in sizes)
    key, value, position, chosen, keys, values, positions = strides
    return Launch(
        compact_kernel, (tiles(kept, blocks.rows), batch * heads),
        *key[:3], *value[:3], *position, *chosen[:2], *keys[:3], *values[:3], *positions, heads, kept,
        SIZE=sizes[0], FIRST=first, REST=rest, V_SIZE=sizes[1], V_FIRST=v_first, V_REST=v_rest,
        ROWS=blocks.rows, num_warps=blocks.warps,
    )  # fmt: skip
