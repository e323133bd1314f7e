"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops.valid import by_head


def level(older: Tensor, new: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scores of older keys, scaled so that each head's mean is that of the new ones, and the new ones behind them.

    Args:
        older: (B, H, P) float32, not negative.
        new: (B, H, Q) float32, not negative.
        valid: (B, P + Q) or (B, H, P + Q) bool, False for slots whose scores do not count, whatever they are; None: all
            do.

    Returns:
        (B, H, P + Q) float32.
    """
    past = older.shape[2]
    before, after = (None, None) if valid is None else (valid[..., :past], valid[..., past:])
    return torch.cat([older * (_mean(new, after) / _mean(older, before)), new], dim=2)


def _mean(scores: Tensor, valid: Tensor | None) -> Tensor:
    """(B, H, 1): the mean of each head's scores (B, H, K) that are valid; never 0."""
    if valid is None:
        mean = scores.mean(-1, keepdim=True)
    else:
        real = by_head(valid)
        mean = scores.where(real, 0.0).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return mean.clamp(min=torch.finfo(torch.float32).tiny)
