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
from pyramidkv.ops.kernels import dense, parts, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch


@dataclass(frozen=True)
class Blocks:
    """What a program copies."""

    rows: int = 32  # slots
    warps: int = 4
    halves: bool = True  # read a head size like 80 as 64 + 16 rather than as a masked 128


@triton.jit
def _copy(source, target, step, target_step, row, there, START: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    """Channels START to START + WIDE of the rows."""
    channel = START + tl.arange(0, WIDE)[None, :]
    inside = there[:, None]
    if START + WIDE > SIZE:
        inside = inside & (channel < SIZE)
    x = tl.load(source + row[:, None] * step + channel, mask=inside, other=0.0)
    tl.store(target + row[:, None] * target_step + channel, x, mask=inside)


@triton.jit
def _both(
    key, value, keys, values, skn, svn, tkn, tvn, row, there,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    V_SIZE: tl.constexpr, V_FIRST: tl.constexpr, V_REST: tl.constexpr,
):  # fmt: skip
    _copy(key, keys, skn, tkn, row, there, 0, FIRST, SIZE)
    _copy(value, values, svn, tvn, row, there, 0, V_FIRST, V_SIZE)
    if REST > 0:
        _copy(key, keys, skn, tkn, row, there, FIRST, REST, SIZE)
    if V_REST > 0:
        _copy(value, values, svn, tvn, row, there, V_FIRST, V_REST, V_SIZE)


@triton.jit(do_not_specialize=["past", "count"])
def append_kernel(
    old_key, old_value, key, value, keys, values,
    okb, okh, okn, ovb, ovh, ovn, skb, skh, skn, svb, svh, svn, tkb, tkh, tkn, tvb, tvh, tvn, heads, past, count,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    V_SIZE: tl.constexpr, V_FIRST: tl.constexpr, V_REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(tiles of old and of new slots, B * H) programs."""
    program = tl.program_id(1).to(tl.int64)  # offsets pass 2^31 in long prompts
    batch, head = program // heads, program % heads
    tile, old_tiles = tl.program_id(0).to(tl.int64), tl.cdiv(past, ROWS)
    keys += batch * tkb + head * tkh
    values += batch * tvb + head * tvh
    if tile < old_tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        _both(
            old_key + batch * okb + head * okh, old_value + batch * ovb + head * ovh, keys, values,
            okn, ovn, tkn, tvn, row, row < past, SIZE, FIRST, REST, V_SIZE, V_FIRST, V_REST,
        )  # fmt: skip
    else:
        row = (tile - old_tiles) * ROWS + tl.arange(0, ROWS)
        _both(
            key + batch * skb + head * skh, value + batch * svb + head * svh,
            keys + past.to(tl.int64) * tkn, values + past.to(tl.int64) * tvn,
            skn, svn, tkn, tvn, row, row < count, SIZE, FIRST, REST, V_SIZE, V_FIRST, V_REST,
        )  # fmt: skip


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
    (first, rest), (v_first, v_rest) = (parts(n) if blocks.halves else (power_of_two(n), 0) for n in (size, value_size))
    return Launch(
        append_kernel, (tiles(past, blocks.rows) + tiles(slots - past, blocks.rows), batch * heads),
        *(n for tensor in strides for n in tensor[:3]), heads, past, slots - past,
        SIZE=size, FIRST=first, REST=rest, V_SIZE=value_size, V_FIRST=v_first, V_REST=v_rest,
        ROWS=blocks.rows, num_warps=blocks.warps,
    )  # fmt: skip
