"""The same as `naive.py`, in two passes and without atomics.

Pass 1, that of the window scores, finds each query's log-sum-exp over the sample of keys. In pass 2 a program takes a
tile of neighbouring queries and all keys that are near to one of them: one product gives those queries the other part
of their normalisers, exactly, and every key but those at the ends all that it scores. Tiles overlap by 2 `SPAN` queries
and 2 (`SPAN` + `NEAR`) keys. As `SPAN` is not over `NEAR`, no share can be above 1.
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

from pyramidkv.ops.band_scores.naive import NEAR, SPAN, STRIDE, same_tokens
from pyramidkv.ops.kernels import dense, parts, power_of_two, tiles
from pyramidkv.ops.launch import KNOWN, Launch, Shapes
from pyramidkv.ops.turn.triton import turn
from pyramidkv.ops.valid import by_head
from pyramidkv.ops.window_scores.triton import _product, _tile, log_sum_exp


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of pass 2."""

    queries: int  # they score 2 SPAN keys fewer
    warps: int
    stages: int = 2  # depth of the software pipeline over the query heads
    registers: int = 0  # most that a thread may have; 0: no limit

    def options(self) -> dict[str, int]:
        """For the launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


def choose(size: int, itemsize: int) -> Blocks:
    """Tiles for a head size and bytes a number."""
    if itemsize == 4:
        return Blocks(32, 4)
    return Blocks(32, 2, 2, 128) if size <= 128 else Blocks(32, 4)


@triton.jit
def _turned(
    x, base, offset, ok, cos, sin, AT: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Channels AT to AT + WIDE of the rows at base + offset, turned; those from 2 HALF on stay."""
    if AT < 2 * HALF:
        channel = AT + tl.arange(0, WIDE)
        paired = channel < 2 * HALF
        upper = channel >= HALF
        pair = tl.where(upper, channel - HALF, channel)
        x_part = tl.load(cos + pair, mask=paired, other=1.0).to(tl.float32)
        y_part = tl.load(sin + pair, mask=paired, other=0.0).to(tl.float32)
        y_part = tl.where(upper, y_part, -y_part)
        other = tl.where(upper, pair, channel + HALF)
        y = tl.load(base + offset[:, None] + other[None, :], mask=ok[:, None] & paired[None, :], other=0.0)
        x = (x.to(tl.float32) * x_part[None, :] + y.to(tl.float32) * y_part[None, :]).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["keys"])
def band_kernel(
    q, k, valid, lse, cos, sin, out, sqb, sqh, sqw, skb, skh, skn, svb, svh, scale, keys, kv_heads, groups,
    SPAN: tl.constexpr, NEAR: tl.constexpr, STRIDE: tl.constexpr, HALF: tl.constexpr,
    SIZE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Pass 2: (tiles of QUERIES - 2 SPAN keys, B * Hkv) programs. Writes the scores."""
    far = tl.full([], 1, tl.int64)  # offsets pass 2^31 in long prompts
    head = tl.program_id(1)
    batch = far * (head // kv_heads)
    kv_head = far * (head % kv_heads)
    begin = tl.program_id(0) * (QUERIES - 2 * SPAN) - SPAN  # the token of the first query, NEAR behind the first key
    a, b = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    row, column = begin + a, begin - NEAR + b
    asks = (row >= 0) & (row < keys)
    there = (column >= 0) & (column < keys) & (b < QUERIES + 2 * NEAR)
    if HAS_VALID:  # padding may hold anything, NaN too: it is not read
        valid += batch * svb + kv_head * svh
        there = there & (tl.load(valid + column, mask=there, other=0) != 0)
        asks = asks & (tl.load(valid + row, mask=asks, other=0) != 0)
    k += batch * skb + kv_head * skh + (far * begin - NEAR) * skn
    key, key_rest = _tile(k, b * skn, there, FIRST, REST, SIZE)
    if HALF > 0:
        cos += batch * HALF
        sin += batch * HALF
        key = _turned(key, k, b * skn, there, cos, sin, 0, FIRST, HALF)
        if REST > 0:
            key_rest = _turned(key_rest, k, b * skn, there, cos, sin, FIRST, REST, HALF)
    q += batch * sqb + kv_head * groups * sqh + far * begin * sqw
    lse += far * head * groups * keys + begin
    apart = b[None, :] - NEAR - a[:, None]
    near = (apart >= -NEAR) & (apart <= NEAR) & there[None, :]
    counts = (apart >= -SPAN) & (apart <= SPAN)
    total = tl.zeros([KEYS], tl.float32)
    for group in range(groups):
        query, query_rest = _tile(q + group * sqh, a * sqw, asks, FIRST, REST, SIZE)
        among = tl.load(lse + far * group * keys + a, mask=asks, other=float("-inf"))
        logit = tl.where(near, _product(query, query_rest, key, key_rest, REST), float("-inf"))
        top = tl.max(logit, 1) * scale
        top = tl.where(top == float("-inf"), 0.0, top)
        share = tl.exp2(logit * scale - top[:, None])
        norm = tl.sum(share, 1) + STRIDE * tl.exp2(among - top)  # infinite: the keys near get nothing
        share *= tl.where(asks, 1.0 / norm, 0.0)[:, None]
        total += tl.sum(tl.where(counts, share * share, 0.0), 0)
    score = tl.sqrt(total / groups)
    scored = (b >= NEAR + SPAN) & (b < QUERIES + NEAR - SPAN) & (column < keys)
    tl.store(out + far * head * keys + column, score, mask=scored)


def band_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `naive.band_scores`: (B, Hq, K, D) queries, (B, Hkv, K, D) keys; (B, Hkv, K) float32.

    `scaling` must be positive. Any strides do, as long as the channels lie side by side.
    """
    same_tokens(query, key)
    query, key = dense(query), dense(key)
    real = None if valid is None else by_head(valid).contiguous().view(torch.uint8)
    lse = sampled_log_sum_exp(query, key, scaling, real, angles)
    return near_scores(query, key, scaling, lse, real, angles)


def sampled_log_sum_exp(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None, angles: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Pass 1: the log2-sum-exp of each query's logits over every `STRIDE`th key, (B, Hq, K) float32.

    `real`, uint8: which keys are, (B, 1 or Hkv, K).
    """
    batch, heads, keys, _ = query.shape
    if keys < STRIDE:  # the sample is empty
        return query.new_full((batch, heads, keys), float("-inf"), dtype=torch.float32)
    far = slice(keys % STRIDE, None, STRIDE)
    masks = None
    if real is not None:  # what padding asks is left to pass 2: it may differ between heads
        masks = real[..., far].contiguous(), real.new_ones(batch, keys)
    sample = key[:, :, far] if angles is None else turn(key[:, :, far], *angles)
    return log_sum_exp(query, sample, scaling, masks, behind=True)


def near_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    lse: Tensor,
    real: Tensor | None,
    angles: tuple[Tensor, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Pass 2: the scores, (B, Hkv, K) float32, from the log2-sum-exps of pass 1."""
    cos, sin = (t.contiguous() for t in angles) if angles else (lse, lse)  # the latter are not read
    half = cos.shape[-1] if angles else 0
    passing = _second_pass(Shapes.of(query, key, real), scaling, half, blocks)
    out = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    passing(query, key, key if real is None else real, lse, cos, sin, out)
    return out


@lru_cache(maxsize=KNOWN)
def _second_pass(
    shapes: Shapes,
    scaling: float,
    half: int,
    blocks: Blocks | None,
) -> Launch:
    """The launch of pass 2 for these shapes and strides; `half` pairs of channels are turned."""
    batch, heads, keys, size = shapes.query
    kv_heads = shapes.key[1]
    blocks = blocks or choose(size, shapes.itemsize)
    first, rest = parts(size)
    return Launch(
        band_kernel, (tiles(keys, blocks.queries - 2 * SPAN), batch * kv_heads),
        *shapes.strides, scaling * math.log2(math.e),
        keys, kv_heads, heads // kv_heads,
        SPAN=SPAN, NEAR=NEAR, STRIDE=STRIDE, HALF=half,
        SIZE=size, FIRST=first, REST=rest, QUERIES=blocks.queries, KEYS=power_of_two(blocks.queries + 2 * NEAR),
        HAS_VALID=shapes.mask_strides is not None, **blocks.options(),
    )  # fmt: skip
