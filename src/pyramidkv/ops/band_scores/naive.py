"""The plain torch definition. It never holds more than a block of queries' probabilities at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyramidkv.ops.turn.naive import turn
from pyramidkv.ops.valid import by_head

SPAN = 4  # tokens on each side of a key whose queries count
NEAR = 16  # tokens on each side of a query whose keys its normaliser takes in one by one
STRIDE = 16  # of the other keys one in so many, counted from the last
_BLOCK = 64  # queries: of a wider block most logits are of no key near


def band_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Root of the sum of squared attention that each key gets from the queries of the tokens around it.

    The queries lie behind the sequence and each sees every key: p(i, j) = min(1, exp(l(i, j)) / Z(i)), where l(i, j) is
    the logit of query i and key j. Z(i) is estimated, so that the work is a small part of attention's: the sum of
    exp(l) over the keys within `NEAR` of i, and `STRIDE` times that over every `STRIDE`th key. Key j scores the root of
    the sum of p(i, j)^2 over the tokens i within `SPAN` of it, averaged over the query heads of a KV head.

    Args:
        query: (B, Hq, K, D), of the same K tokens as the keys, but placed behind them all.
        key: (B, Hkv, K, D), Hq a multiple of Hkv; query head h reads KV head h // (Hq // Hkv).
        scaling: factor of the logits.
        valid: (B, K) or (B, Hkv, K) bool, False for padding and empty slots, as keys and as queries; None: all real.
        angles: cosines and sines, (B, R / 2) each, by which the keys are turned first (`ops/turn`); None: as they are.

    Returns:
        (B, Hkv, K) float32.
    """
    batch, heads, keys, _ = query.shape
    kv_heads = key.shape[1]
    same_tokens(query, key)
    key = key if angles is None else turn(key, *angles)
    groups = heads // kv_heads
    real = torch.ones(1, 1, keys, dtype=torch.bool, device=key.device) if valid is None else by_head(valid)
    real = real.expand(batch, kv_heads, keys)
    total = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=key.device)
    grouped = query.reshape(batch, kv_heads, groups, keys, -1)
    far = slice(keys % STRIDE, None, STRIDE)
    for start in range(0, keys, _BLOCK):
        block = (grouped[..., start : start + _BLOCK, :] * scaling).float()  # (B, Hkv, G, W, D)
        row = start + torch.arange(block.shape[-2], device=key.device)
        near = slice(max(start - NEAR, 0), start + block.shape[-2] + NEAR)
        apart = (row[:, None] - torch.arange(keys, device=key.device)[near]).abs()
        around = _logits(block, key[:, :, near], real[:, :, near]).masked_fill(apart > NEAR, float("-inf"))
        among = _logits(block, key[:, :, far], real[:, :, far]).logsumexp(-1, keepdim=True) + math.log(STRIDE)
        lse = torch.logaddexp(around.logsumexp(-1, keepdim=True), among)
        asks = real[:, :, None, row, None]
        share = torch.where(asks & (apart <= SPAN), (around - lse).exp(), 0.0).clamp(max=1.0)
        total[:, :, near] += share.nan_to_num(0.0).square().sum((2, 3))
    return (total / groups).sqrt()


def same_tokens(query: Tensor, key: Tensor) -> None:
    """Raises `ValueError` if there are not as many queries as keys."""
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"query has {query.shape[2]} tokens, key {key.shape[2]}: they must be of the same tokens")


def _logits(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """(B, Hkv, G, W, N); -inf for keys that are not real, whatever they hold."""
    logits = query @ key.float().unsqueeze(2).transpose(-1, -2)
    return logits.masked_fill(~real[:, :, None, None], float("-inf"))
