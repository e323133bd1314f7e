"""The plain torch definition. It never holds more than the probabilities of a few blocks of queries at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.ops.turn.naive import turn
from pyramidkv.ops.valid import by_head

SPAN = 4  # tokens on each side of a key whose queries count
NEAR = 16  # tokens on each side of a query whose keys its normaliser takes in one by one
STRIDE = 16  # of the other keys one in so many, counted from the last
_BLOCK = 32  # queries whose near keys are one window
_WINDOW = NEAR + _BLOCK + NEAR
_TOGETHER = 8  # windows


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
    more = -keys % _BLOCK
    windows = pad(key, (0, 0, NEAR, NEAR + more)).unfold(2, _WINDOW, _BLOCK).mT  # (B, Hkv, N, window, D)
    there = pad(real, (NEAR, NEAR + more)).unfold(2, _WINDOW, _BLOCK)  # (B, Hkv, N, window)
    asking = torch.unflatten(pad(query.reshape(batch, kv_heads, groups, keys, -1), (0, 0, 0, more)), 3, (-1, _BLOCK))
    inside = torch.arange(_WINDOW, device=key.device)
    column = _BLOCK * torch.arange(windows.shape[2], device=key.device)[:, None] + inside
    apart = (inside[NEAR:-NEAR, None] - inside).abs()  # (block, window)
    far = slice(keys % STRIDE, None, STRIDE)
    total = torch.zeros(batch, kv_heads, NEAR + keys + more + NEAR, dtype=torch.float32, device=key.device)
    for start in range(0, windows.shape[2], _TOGETHER):
        some = slice(start, start + _TOGETHER)
        block = (asking[:, :, :, some] * scaling).float()  # (B, Hkv, G, N, block, D)
        near, held = windows[:, :, None, some].float(), there[:, :, None, some, None]
        around = (block @ near.mT).masked_fill(~held | (apart > NEAR), float("-inf"))
        among = _logits(block.flatten(3, 4), key[:, :, far], real[:, :, far]).logsumexp(-1) + math.log(STRIDE)
        lse = torch.logaddexp(around.logsumexp(-1), among.view(block.shape[:-1]))[..., None]
        asks = held[..., NEAR:-NEAR].mT
        share = torch.where(asks & (apart <= SPAN), (around - lse).exp(), 0.0).clamp(max=1.0)
        sums = share.nan_to_num(0.0).square().sum((2, 4))  # (B, Hkv, N, window)
        total.index_add_(2, column[some].flatten(), sums.flatten(2))
    return (total[:, :, NEAR : NEAR + keys] / groups).sqrt()


def same_tokens(query: Tensor, key: Tensor) -> None:
    """Raises `ValueError` if there are not as many queries as keys."""
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"query has {query.shape[2]} tokens, key {key.shape[2]}: they must be of the same tokens")


def _logits(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """(B, Hkv, G, W, N); -inf for keys that are not real, whatever they hold."""
    logits = query @ key.float().unsqueeze(2).transpose(-1, -2)
    return logits.masked_fill(~real[:, :, None, None], float("-inf"))
