"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor


def append(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], *, by_token: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values with new ones behind them.

    Args:
        old: keys (B, H, P, D) and values (B, H, P, Dv).
        new: keys (B, H, Q, D) and values (B, H, Q, Dv), of the same dtype.
        by_token: in memory the result is (B, P + Q, H, D), so that the strides of a row say nothing of how many tokens
            there are; else (B, H, P + Q, D).

    Returns:
        Keys (B, H, P + Q, D) and values (B, H, P + Q, Dv), copies.
    """
    if by_token:
        key, value = (torch.cat([a.transpose(1, 2), b.transpose(1, 2)], dim=1) for a, b in zip(old, new, strict=True))
        return key.transpose(1, 2), value.transpose(1, 2)
    key, value = (torch.cat(both, dim=2) for both in zip(old, new, strict=True))
    return key, value
