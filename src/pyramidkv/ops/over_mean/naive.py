"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.ops.valid import by_head


def over_mean(newer: Tensor, scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """The larger of two scores of each slot, each as a multiple of its mean over the slots of the head.

    Args:
        newer: (B, H, N) float32, of the last N of the K slots; that of older ones is 0.
        scores: (B, H, K) float32.
        valid: (B, K) or (B, H, K) bool, False for slots that are left out of the means and score 0; None: all count.

    Returns:
        (B, H, K) float32.
    """
    newer = pad(newer, (scores.shape[2] - newer.shape[2], 0))
    return torch.maximum(_multiples(newer, valid), _multiples(scores, valid))


def _multiples(scores: Tensor, valid: Tensor | None) -> Tensor:
    least = torch.finfo(torch.float32).tiny
    if valid is None:
        return scores / scores.mean(-1, keepdim=True).clamp(min=least)
    real = by_head(valid)
    shown = scores.masked_fill(~real, 0.0)
    return shown / (shown.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)).clamp(min=least)
