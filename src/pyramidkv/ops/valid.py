"""Which slots hold a token: (B, K) bool where the heads of a row are alike, (B, Hkv, K) where they are not."""

from __future__ import annotations

import torch
from torch import Tensor


def by_head(valid: Tensor) -> Tensor:
    """(B, K) or (B, Hkv, K) as (B, 1 or Hkv, K)."""
    return valid if valid.ndim == 3 else valid[:, None]


def joined(past: Tensor, new: Tensor) -> Tensor:
    """Slots and those behind them: (B, K) or (B, Hkv, K), by heads if one of them is."""
    if past.ndim == new.ndim:
        return torch.cat([past, new], dim=-1)
    past, new = by_head(past), by_head(new)
    heads = max(past.shape[1], new.shape[1])
    return torch.cat([t.expand(-1, heads, -1) for t in (past, new)], dim=-1)
