"""The plain torch definition, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[
    Tensor, Tensor
]  # attention over some keys (B, H, Q, D), and the log-sum-exp of its logits (B, H, Q) float32


def part(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Part:
    """Attention over some keys, and its log-sum-exp: what a kernel must give for `merge`.

    Args:
        query: (B, Hq, Q, D).
        key, value: (B, Hkv, K, D), Hq a multiple of Hkv.
        scaling: factor of the logits.
        causal: query i sees the keys up to i; else all of them.

    Returns:
        (B, Hq, Q, D) in the dtype of the query, and (B, Hq, Q) float32.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(groups, dim=1) for t in (key, value))
    logits = query.float() @ key.transpose(2, 3) * scaling
    if causal:
        seen = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ value).to(query.dtype), logits.logsumexp(-1)


def merge(parts: Sequence[Part], out: Tensor) -> None:
    """Write the attention over all keys into `out`, from that over parts of them.

    A softmax over all keys is the mean of those over the parts, each weighted by the exponential of its log-sum-exp.

    Args:
        parts: over keys of which none is in two parts. A part in which a query sees nothing has a log-sum-exp of
            -inf or +inf there (torch's flash kernel gives +inf).
        out: (B, H, Q, D) of any dtype; zeros where a query sees nothing in any part.
    """
    lse = torch.stack([lse for _, lse in parts]).float()
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    top = lse.amax(0)
    weights = (lse - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    out.copy_(sum(part.float() * weight[..., None] for (part, _), weight in zip(parts, weights, strict=True)))
