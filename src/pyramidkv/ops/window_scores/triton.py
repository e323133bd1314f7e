"""The same as `naive.py`, in two passes over the keys and without ever holding the probabilities.

Pass 1 finds each query's log-sum-exp over the keys; with few rows of queries the keys are split over several programs,
and a small kernel joins their results. Pass 2 takes a block of keys, recomputes the probabilities of all queries that
can see it and adds them up. Both are bound by the exponentials as much as by the products, so the inner loops hold one
multiply-add and one exp2 an element (logarithms are to base 2 throughout), and masks only where a mask can matter.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, parts, power_of_two, processors, tiles
from pyramidkv.ops.launch import KNOWN, Launch, Shapes
from pyramidkv.ops.valid import by_head
from pyramidkv.ops.window_scores.naive import askers

# Of a prompt or of an eviction while decoding: no kernel is compiled anew for one that 16 divides.
_LENGTHS = ["window", "keys", "past", "span"]


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of one pass."""

    rows: int  # queries
    keys: int
    warps: int
    stages: int  # depth of the software pipeline
    registers: int = 0  # most that a thread may have, so that two programs fit on a multiprocessor; 0: no limit

    def options(self) -> dict[str, int]:
        """For the launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


def lse_blocks(rows: int, size: int, itemsize: int) -> Blocks:
    """Tiles of pass 1 for that many rows of queries, a head size and bytes a number."""
    if itemsize == 4:
        return Blocks(max(16, min(32, power_of_two(rows))), 32, 4, 2)
    if rows <= 64:
        return Blocks(max(16, power_of_two(rows)), 64, 4, 3 if size <= 128 else 2)
    if size > 128:
        return Blocks(128, 64, 8, 2)
    return Blocks(128, 128 if size <= 96 else 64, 8, 3, 128)


def sum_blocks(rows: int, size: int, itemsize: int) -> Blocks:
    """Tiles of pass 2; its products have the keys as rows, so small windows waste nothing."""
    if itemsize == 4:
        return Blocks(max(16, min(32, power_of_two(rows))), 32, 4, 2)
    if rows < 64:
        return Blocks(max(16, power_of_two(rows)), 128, 4, 2)
    return Blocks(64, 128, 8, 3, 128) if size <= 128 else Blocks(64, 128, 8, 2)


@triton.jit
def _tile(base, offset, ok, FIRST: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr):
    """Rows at base + offset as tiles of FIRST and REST channels; rows that are not ok are zeros."""
    channel = tl.arange(0, FIRST)
    one = tl.load(base + offset[:, None] + channel[None, :], mask=ok[:, None], other=0.0)
    two = one
    if REST > 0:
        channel = FIRST + tl.arange(0, REST)
        if FIRST + REST == SIZE:
            two = tl.load(base + offset[:, None] + channel[None, :], mask=ok[:, None], other=0.0)
        else:
            within = ok[:, None] & (channel < SIZE)[None, :]
            two = tl.load(base + offset[:, None] + channel[None, :], mask=within, other=0.0)
    return one, two


@triton.jit
def _product(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a b^T over both parts of the channels, float32."""
    if a.dtype == tl.float32:
        out = tl.dot(a, tl.trans(b), input_precision="ieee")
        if REST > 0:
            out = tl.dot(a_rest, tl.trans(b_rest), out, input_precision="ieee")
    else:
        out = tl.dot(a, tl.trans(b))
        if REST > 0:
            out = tl.dot(a_rest, tl.trans(b_rest), out)
    return out


@triton.jit
def _rows(tile, head, window, groups, sqh, sqw, ROWS: tl.constexpr, PACK: tl.constexpr):
    """The queries of a tile: where they lie, their index in the window, in the KV head's rows, and which exist.

    PACK puts the rows of all query heads of a KV head one behind the other, for windows shorter than a tile; otherwise
    the tile is of the query head `head`.
    """
    far = tl.full([], 1, tl.int64)  # offsets pass 2^31 in long prompts
    lane = tl.arange(0, ROWS)
    if PACK:
        row = tile * ROWS + lane
        group = row // window
        step = row - group * window
        offset = far * group * sqh + step * sqw
        start = far * 0
        ok = row < groups * window
    else:
        step = tile * ROWS + lane
        row = head * window + step
        offset = lane * sqw
        start = far * head * sqh + far * tile * ROWS * sqw
        ok = step < window
    return start, offset, step, row, ok


@triton.jit
def _lse_step(
    q, q_rest, top, total, k, valid, block, end, step, skn, scale, past,
    KEYS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr,
    MASK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One block of keys added to the running maximum and sum of each row."""
    column = block + tl.arange(0, KEYS)
    inside = column < end
    key, key_rest = _tile(
        k + tl.full([], 1, tl.int64) * block * skn, tl.arange(0, KEYS) * skn, inside, FIRST, REST, SIZE
    )
    logit = _product(q, q_rest, key, key_rest, REST)  # (ROWS, KEYS)
    if HAS_VALID:
        inside = inside & (tl.load(valid + column, mask=inside, other=0) != 0)
    if MASK:
        seen = inside[None, :] & (column[None, :] <= past + step[:, None])
        logit = tl.where(seen, logit, float("-inf"))
    elif HAS_VALID:
        logit = tl.where(inside[None, :], logit, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    shift = higher * scale
    if MASK or HAS_VALID:  # a row may have seen nothing yet
        shift = tl.where(higher == float("-inf"), 0.0, shift)
    total = total * tl.exp2(top * scale - shift) + tl.sum(tl.exp2(logit * scale - shift[:, None]), 1)
    return higher, total


@triton.jit(do_not_specialize=_LENGTHS)
def lse_kernel(
    q, k, valid, asking, out, sqb, sqh, sqw, skb, skh, skn, svb, svh, sab,
    scale, window, keys, past, kv_heads, groups, span,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PACK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Pass 1: (tiles of rows, splits, B * Hkv) programs. Writes log2-sum-exps of `span` keys; -inf: saw nothing."""
    tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    per_head = tl.cdiv(window, ROWS)
    query_head = 0
    if not PACK:
        query_head = tile // per_head
        tile -= query_head * per_head
    start, offset, step, row, ok = _rows(tile, query_head, window, groups, sqh, sqw, ROWS, PACK)
    q += batch * sqb + kv_head * groups * sqh + start
    k += batch * skb + kv_head * skh
    valid += batch * svb + kv_head * svh
    query, query_rest = _tile(q, offset, ok, FIRST, REST, SIZE)
    if PACK:
        lowest, highest = 0, window - 1
    else:
        lowest = tile * ROWS
        highest = tl.minimum(lowest + ROWS, window) - 1
    begin = split * span
    end = tl.minimum(begin + span, tl.minimum(past + highest + 1, keys))
    common = tl.minimum(past + lowest + 1, keys)  # keys that every row sees
    whole = tl.maximum(tl.minimum(common // KEYS * KEYS, end), begin)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(begin, whole, KEYS):
        top, total = _lse_step(
            query, query_rest, top, total, k, valid, block, keys, step, skn, scale, past,
            KEYS, FIRST, REST, SIZE, False, HAS_VALID,
        )  # fmt: skip
    for block in range(whole, end, KEYS):
        top, total = _lse_step(
            query, query_rest, top, total, k, valid, block, end, step, skn, scale, past,
            KEYS, FIRST, REST, SIZE, True, HAS_VALID,
        )  # fmt: skip
    lse = tl.where(total > 0, top * scale + tl.log2(total), float("-inf"))
    if HAS_VALID:  # padding asks nothing
        asks = tl.load(asking + batch * sab + step, mask=ok, other=0) != 0
        lse = tl.where(asks, lse, float("-inf"))
    heads = tl.num_programs(2).to(tl.int64)
    tl.store(out + (split * heads + head) * groups * window + row, lse, mask=ok)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_kernel(part, out, rows, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """The log2-sum-exp of (splits, rows) log2-sum-exps."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    there = (split < splits)[:, None] & (row < rows)[None, :]
    lse = tl.load(part + split[:, None].to(tl.int64) * rows + row[None, :], mask=there, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out + row, shift + tl.log2(tl.sum(tl.exp2(lse - shift[None, :]), 0)), mask=row < rows)


@triton.jit
def _sum_step(
    key, key_rest, total, q, lse, tile, head, block, past, window, groups, sqh, sqw, scale, power,
    KEYS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to what each key of the block has got."""
    start, offset, step, row, ok = _rows(tile, head, window, groups, sqh, sqw, ROWS, PACK)
    query, query_rest = _tile(q + start, offset, ok, FIRST, REST, SIZE)
    shift = tl.load(lse + row, mask=ok, other=float("-inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift) * power  # no mass: every probability is 0
    logit = _product(key, key_rest, query, query_rest, REST)  # (KEYS, ROWS): a key's sum stays within a few lanes
    share = tl.exp2(logit * (scale * power) - shift[None, :])
    if MASK:
        column = block + tl.arange(0, KEYS)
        share = tl.where(column[:, None] <= past + step[None, :], share, 0.0)
    if HAS_VALID:  # padding may hold anything, NaN too
        share = tl.where((shift < float("inf"))[None, :], share, 0.0)
    return total + tl.sum(share, 1)


@triton.jit
def _terms(
    asking, column, window, past, PER_VISIBLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """How many queries that count each key's sum runs over; at least 1."""
    found = tl.zeros([KEYS], tl.int32)
    for first in range(0, window, ROWS):
        step = first + tl.arange(0, ROWS)
        asks = tl.load(asking + step, mask=step < window, other=0) != 0
        if PER_VISIBLE:
            found += tl.sum((asks[None, :] & (column[:, None] <= past + step[None, :])).to(tl.int32), 1)
        else:
            found += tl.sum(asks.to(tl.int32), 0)
    return tl.maximum(found, 1).to(tl.float32)


@triton.jit(do_not_specialize=_LENGTHS)
def sum_kernel(
    q, k, valid, asking, lse, out, sqb, sqh, sqw, skb, skh, skn, svb, svh, sab, scale, window, keys, past, kv_heads,
    groups,
    POWER: tl.constexpr, PER_VISIBLE: tl.constexpr,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PACK: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Pass 2: (blocks of keys, B * Hkv) programs. Writes the power means."""
    block, head = tl.program_id(0) * KEYS, tl.program_id(1)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    q += batch * sqb + kv_head * groups * sqh
    k += batch * skb + kv_head * skh
    lse += head.to(tl.int64) * groups * window
    column = block + tl.arange(0, KEYS)
    there = column < keys
    key, key_rest = _tile(
        k + tl.full([], 1, tl.int64) * block * skn, tl.arange(0, KEYS) * skn, there, FIRST, REST, SIZE
    )
    reach = block + KEYS - 1 - past  # the first query that sees the whole block
    if PACK:
        heads = 1
        tiles = tl.cdiv(groups * window, ROWS)
        first = 0
        whole = tl.where(reach <= 0, 0, tiles)
    else:
        heads = groups
        tiles = tl.cdiv(window, ROWS)
        first = tl.maximum(block - past, 0) // ROWS
        whole = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(reach, 0), ROWS), first), tiles)
    total = tl.zeros([KEYS], tl.float32)
    for query_head in range(heads):
        for tile in range(first, whole):
            total = _sum_step(
                key, key_rest, total, q, lse, tile, query_head, block, past, window, groups, sqh, sqw, scale, POWER,
                KEYS, FIRST, REST, SIZE, ROWS, PACK, True, HAS_VALID,
            )  # fmt: skip
        for tile in range(whole, tiles):
            total = _sum_step(
                key, key_rest, total, q, lse, tile, query_head, block, past, window, groups, sqh, sqw, scale, POWER,
                KEYS, FIRST, REST, SIZE, ROWS, PACK, False, HAS_VALID,
            )  # fmt: skip
    if HAS_VALID:
        real = tl.load(valid + batch * svb + kv_head * svh + column, mask=there, other=0) != 0
        total = tl.where(real, total, 0.0) / groups
        total /= _terms(asking + batch * sab, column, window, past, PER_VISIBLE, ROWS, KEYS)
    elif PER_VISIBLE:
        total /= groups * tl.minimum(keys - column, window).to(tl.float32)
    else:
        total /= (groups * window).to(tl.float32)
    if POWER == 2:
        total = tl.sqrt(total)
    tl.store(out + head.to(tl.int64) * keys + column, total, mask=there)


def window_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    *,
    power: int = 1,
    per_visible: bool = False,
    behind: bool = False,
    asking: Tensor | None = None,
) -> Tensor:
    """As `naive.window_scores`: (B, Hq, W, D) queries, (B, Hkv, K, D) keys; (B, Hkv, K) float32.

    `scaling` must be positive and `power` 1 or 2. Any strides do, as long as the channels lie side by side.
    """
    query, key = dense(query), dense(key)
    window, keys = query.shape[2], key.shape[2]
    counted = askers(valid, window, behind, asking)
    if counted is not None and valid is None:
        valid = counted.new_ones(key.shape[0], keys)
    if valid is not None and counted is None:
        counted = valid.new_ones(key.shape[0], window)
    per_visible = per_visible and not behind
    masks = None
    if valid is not None and counted is not None:
        masks = by_head(valid).contiguous().view(torch.uint8), counted.contiguous().view(torch.uint8)
    lse = log_sum_exp(query, key, scaling, masks, behind)
    return probability_sums(query, key, scaling, lse, masks, power, per_visible, behind)


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    scaling: float,
    masks: tuple[Tensor, Tensor] | None,
    behind: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """Pass 1: the log2-sum-exp of each query's logits, (B, Hq, W) float32; -inf for padding.

    `masks`, uint8: which keys are real, (B, 1 or Hkv, K), and which queries count, (B, W).
    """
    shapes = Shapes.of(query, key, None if masks is None else masks[0])
    splits, passing, join = _first_pass(shapes, scaling, behind, blocks, processors(key.device))
    batch, heads, window, _ = query.shape
    part = torch.empty(*splits, batch, heads, window, dtype=torch.float32, device=key.device)
    passing(query, key, *((key, key) if masks is None else masks), part)
    if join is None:
        return part
    lse = torch.empty(batch, heads, window, dtype=torch.float32, device=key.device)
    join(part, lse)
    return lse


@lru_cache(maxsize=KNOWN)
def _first_pass(
    shapes: Shapes,
    scaling: float,
    behind: bool,
    blocks: Blocks | None,
    processors: int,
) -> tuple[tuple[int, ...], Launch, Launch | None]:
    """The launch of pass 1 for these shapes and strides; with splits, their number and the launch that joins them."""
    batch, heads, window, size = shapes.query
    kv_heads, keys = shapes.key[1:3]
    groups = heads // kv_heads
    blocks = blocks or lse_blocks(groups * window, size, shapes.itemsize)
    pack = window < blocks.rows
    row_tiles = tiles(groups * window, blocks.rows) if pack else groups * tiles(window, blocks.rows)
    # Enough programs for two on each multiprocessor, but at least four blocks of keys a program.
    splits = max(1, min(2 * processors // (row_tiles * batch * kv_heads), keys // (4 * blocks.keys), 64))
    span = tiles(tiles(keys, splits), blocks.keys) * blocks.keys
    splits = tiles(keys, span)
    first, rest = parts(size)
    launch = Launch(
        lse_kernel, (row_tiles, splits, batch * kv_heads),
        *shapes.strides, window if shapes.mask_strides else 0, scaling * math.log2(math.e),
        window, keys, keys if behind else keys - window, kv_heads, groups, span,
        SIZE=size, FIRST=first, REST=rest, ROWS=blocks.rows, KEYS=blocks.keys,
        PACK=pack, HAS_VALID=shapes.mask_strides is not None, **blocks.options(),
    )  # fmt: skip
    if splits == 1:
        return (), launch, None
    rows = batch * heads * window
    join = Launch(
        join_kernel, (tiles(rows, 128),), rows, splits, SPLITS=power_of_two(splits), ROWS=128, num_warps=4
    )  # fmt: skip
    return (splits,), launch, join


def probability_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    lse: Tensor,
    masks: tuple[Tensor, Tensor] | None,
    power: int,
    per_visible: bool,
    behind: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """Pass 2: the power means, (B, Hkv, K) float32."""
    shapes = Shapes.of(query, key, None if masks is None else masks[0])
    passing = _second_pass(shapes, scaling, power, per_visible, behind, blocks)
    out = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    passing(query, key, *((key, key) if masks is None else masks), lse, out)
    return out


@lru_cache(maxsize=KNOWN)
def _second_pass(
    shapes: Shapes,
    scaling: float,
    power: int,
    per_visible: bool,
    behind: bool,
    blocks: Blocks | None,
) -> Launch:
    """The launch of pass 2 for these shapes and strides."""
    batch, heads, window, size = shapes.query
    kv_heads, keys = shapes.key[1:3]
    groups = heads // kv_heads
    blocks = blocks or sum_blocks(groups * window, size, shapes.itemsize)
    first, rest = parts(size)
    return Launch(
        sum_kernel, (tiles(keys, blocks.keys), batch * kv_heads),
        *shapes.strides, window if shapes.mask_strides else 0, scaling * math.log2(math.e),
        window, keys, keys if behind else keys - window, kv_heads, groups,
        POWER=power, PER_VISIBLE=per_visible,
        SIZE=size, FIRST=first, REST=rest, ROWS=blocks.rows, KEYS=blocks.keys,
        PACK=window < blocks.rows, HAS_VALID=shapes.mask_strides is not None, **blocks.options(),
    )  # fmt: skip
