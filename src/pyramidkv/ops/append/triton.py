"""The same as `naive.py` in one launch, bound by the bytes that it moves."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.append.naive import room
from pyramidkv.ops.kernels import dense, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch


@dataclass(frozen=True)
class Blocks:
    """What a program copies."""

    rows: int = 16  # slots
    warps: int = 4


@triton.jit
def _copy(source, target, step, target_step, row, there, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The rows' SIZE channels, in WIDE lanes."""
    channel = tl.arange(0, WIDE)[None, :]
    inside = there[:, None] & (channel < SIZE)
    x = tl.load(source + row[:, None] * step + channel, mask=inside, other=0.0)
    tl.store(target + row[:, None] * target_step + channel, x, mask=inside)


@triton.jit(do_not_specialize=["past", "count"])
def append_kernel(
    old_key, old_value, key, value, keys, values,
    okb, okh, okn, ovb, ovh, ovn, skb, skh, skn, svb, svh, svn, tkb, tkh, tkn, tvb, tvh, tvn, heads, past, count,
    SIZE: tl.constexpr, WIDE: tl.constexpr, V_SIZE: tl.constexpr, V_WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(tiles of old and of new slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)  # offsets pass 2^31 in long prompts
    batch, head = program // heads, program % heads
    tile, old_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(past, ROWS)
    keys += batch * tkb + head * tkh
    values += batch * tvb + head * tvh
    if tile < old_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        there = row < past
        _copy(old_key + batch * okb + head * okh, keys, okn, tkn, row, there, SIZE, WIDE)
        _copy(old_value + batch * ovb + head * ovh, values, ovn, tvn, row, there, V_SIZE, V_WIDE)
    else:
        row = (tile - old_tiles) * ROWS + tl.arange(0, ROWS)
        there = row < count
        first = past.to(tl.int64)
        _copy(key + batch * skb + head * skh, keys + first * tkn, skn, tkn, row, there, SIZE, WIDE)
        _copy(value + batch * svb + head * svh, values + first * tvn, svn, tvn, row, there, V_SIZE, V_WIDE)


def append(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    *,
    by_token: bool = False,
    front: int = 0,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.append`. Any strides do for what is given, as long as the channels lie side by side."""
    given = [dense(t) for t in (*old, *new)]
    past = given[0].shape[2]
    slots = past + given[2].shape[2]
    keys, values = (room(t, front + slots, by_token) for t in given[2:])
    if slots and keys.numel():
        moved = *given, keys[:, :, front:], values[:, :, front:]
        shape = *keys.shape[:2], slots, keys.shape[3]
        _launch(shape, values.shape[-1], past, tuple(t.stride() for t in moved), blocks or Blocks())(*moved)
    return keys, values


@lru_cache(maxsize=KNOWN)
def _launch(
    shape: tuple[int, ...], value_size: int, past: int, strides: tuple[tuple[int, ...], ...], blocks: Blocks
) -> Launch:
    """For these keys as they become, of which `past` are old, and these strides of all tensors."""
    batch, heads, slots, size = shape
    return Launch(
        append_kernel, (tiles(past, blocks.rows) + tiles(slots - past, blocks.rows), batch * heads),
        *(n for tensor in strides for n in tensor[:3]), heads, past, slots - past,
        SIZE=size, WIDE=power_of_two(size), V_SIZE=value_size, V_WIDE=power_of_two(value_size),
        ROWS=blocks.rows, num_warps=blocks.warps,
    )  # fmt: skip
