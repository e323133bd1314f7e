"""The plain torch definition. It never holds more than `_BLOCK` queries' probabilities at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.ops.valid import by_head

_BLOCK = 256


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
    """Power mean of the attention probability that the last queries of a sequence give to each key.

    With p(i, j) the causal softmax of query i over the keys, key j scores (sum of p(i, j)^power / n(j))^(1/power); the
    sum runs over the queries, and over the query heads of a KV head, and n(j) counts its terms.

    Args:
        query: (B, Hq, W, D), the queries of the last W of the K tokens, in order.
        key: (B, Hkv, K, D), Hq a multiple of Hkv; query head h reads KV head h // (Hq // Hkv).
        scaling: factor of the logits.
        valid: (B, K) or (B, Hkv, K) bool, False for keys that are padding or empty slots; None means that all are real.
            Queries of invalid tokens do not count.
        power: 1 for the mean, 2 for the root mean square.
        per_visible: let n(j) count only the queries that can see key j, so that the newest keys, which few queries can
            see, are not scored lower for it. False: n(j) is the number of queries for all keys.
        behind: the queries are not those of the last tokens: they lie behind the sequence, and each sees every key.
        asking: (B, W) bool, with `behind`: False for queries that do not count; None: all do.

    Returns:
        (B, Hkv, K) float32.
    """
    batch, heads, window, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    grouped = query.reshape(batch, kv_heads, groups, window, -1)
    wide_key = key.unsqueeze(2).transpose(-1, -2)  # (B, Hkv, 1, D, K)
    column = torch.arange(keys, device=key.device)
    total = torch.zeros(batch, kv_heads, keys, dtype=torch.float32, device=key.device)
    for start in range(0, window, _BLOCK):
        block = grouped[..., start : start + _BLOCK, :]
        row = keys - window * (not behind) + start + torch.arange(block.shape[-2], device=key.device)
        seen = column <= row[:, None]  # (W, K)
        if valid is not None:
            seen = seen & by_head(valid)[:, :, None, None, :]
        # Scaled before the product: float16 ends at 65504, which raw products of large keys can pass.
        logits = ((block * scaling) @ wide_key).float()
        probability = logits.masked_fill(~seen, float("-inf")).softmax(-1)  # (B, Hkv, G, W, K)
        counted = askers(valid, window, behind, asking)
        if counted is not None:  # padding queries see nothing: their softmax is NaN
            counts = counted[:, None, None, start : start + block.shape[-2], None]
            probability = torch.where(counts, probability, 0.0)
        total += probability.pow(power).sum((2, 3))
    counted = askers(valid, window, behind, asking)
    mean = total / (groups * terms(counted, keys, window, per_visible and not behind, key.device))
    return mean if power == 1 else mean.pow(1 / power)


def askers(valid: Tensor | None, window: int, behind: bool, asking: Tensor | None) -> Tensor | None:
    """(B, W) bool: which queries count; None: all of them. New tokens are real in all heads or in none."""
    if behind:
        return asking
    return None if valid is None else by_head(valid)[:, 0, valid.shape[-1] - window :]


def terms(asking: Tensor | None, keys: int, window: int, per_visible: bool, device: torch.device) -> Tensor:
    """How many queries each key's sum runs over, broadcastable to (B, Hkv, K); at least 1."""
    if asking is None:
        counted = torch.full((1, 1, keys), window, device=device)
        return counted.minimum(keys - torch.arange(keys, device=device)) if per_visible else counted
    after = pad(asking, (keys - window, 0)) if per_visible else asking
    after = after.flip(-1).cumsum(-1).flip(-1)  # queries at or behind each key
    return (after if per_visible else after[:, :1])[:, None].clamp(min=1)
