"""How much attention a set of queries pays to each key.

This is the plain torch definition. It never holds more than `_BLOCK` queries' probabilities at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256


def window_scores(query: Tensor, key: Tensor, scaling: float, valid: Tensor | None = None) -> Tensor:
    """Mean attention probability that the last queries of a sequence give to each key.

    Args:
        query: (B, Hq, W, D), the queries of the last W of the K tokens, in order.
        key: (B, Hkv, K, D), Hq a multiple of Hkv; query head h reads KV head h // (Hq // Hkv).
        scaling: factor of the logits.
        valid: (B, K) bool, False for keys that are padding or empty slots; None means that all are real.
            Queries of invalid tokens do not count.

    Returns:
        (B, Hkv, K) float32: softmax over the visible keys (causal), then the mean over the W queries and over the
        query heads of each KV head.
    """
    batch, heads, window, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, window, -1)  # (B, Hkv, G, W, D)
    wide_key = key.unsqueeze(2).transpose(-1, -2)  # (B, Hkv, 1, D, K)
    column = torch.arange(keys, device=key.device)
    total = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=key.device)
    for start in range(0, window, _BLOCK):
        block = grouped[..., start : start + _BLOCK, :]
        row = keys - window + start + torch.arange(block.shape[-2], device=key.device)
        seen = column <= row[:, None]  # (W, K)
        if valid is not None:
            seen = seen & valid[:, None, None, None, :]
        # Scaled before the product: float16 ends at 65504, which raw products of large keys can pass.
        logits = ((block * scaling) @ wide_key).float()
        probability = logits.masked_fill(~seen, float("-inf")).softmax(-1)  # (B, Hkv, G, W, K)
        if valid is not None:
            counted = valid[:, None, None, row, None]  # padding queries see nothing: their softmax is NaN
            probability = torch.where(counted, probability, 0.0)
        total += probability.sum(3).mean(2)
    if valid is None:
        return total / window
    return total / valid[:, -window:].sum(-1).clamp(min=1)[:, None, None]
