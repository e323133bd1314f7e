"""Which slots survive an eviction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select(scores: Tensor, limits: Sequence[int], width: int) -> Tensor:
    """The slots with the highest scores, in their old order.

    Args:
        scores: (B, H, K) float32; -inf marks a slot that must not be kept, +inf one that must.
        limits: tokens that each row may keep, one number a row.
        width: slots of the result, at least the largest number that any row keeps.

    Returns:
        (B, H, width) int64 indices into K, rising; rows that keep fewer than `width` begin with -1.
        Equal scores are settled in favour of the earlier slot, so that a selection does not depend on the device.
    """
    order = scores.sort(dim=-1, descending=True, stable=True)
    index, best = order.indices[..., :width], order.values[..., :width]
    kept = best > float("-inf")
    if min(limits) < width:
        limit = torch.tensor(limits, device=scores.device)[:, None, None]
        kept &= torch.arange(width, device=scores.device) < limit
    return index.masked_fill(~kept, -1).sort(dim=-1).values
