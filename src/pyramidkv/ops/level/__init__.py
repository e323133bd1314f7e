"""Scores of older keys at the level of those of new ones: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.level import naive

__all__ = ["level", "why_naive"]


def why_naive(older: Tensor, new: Tensor) -> str | None:
    """Why a call with these scores runs in plain torch; None if the Triton kernel can serve it."""
    if older.dtype != torch.float32 or new.dtype != torch.float32:
        return "the kernel reads float32"
    return kernels.why_no_triton(new.device)


def level(older: Tensor, new: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, H, P) scores of older keys, scaled to the mean of those of new ones, and (B, H, Q) of these behind them.

    The definition and the arguments are those of `naive.level`; the kernel adds in another order.
    """
    if new.numel() and older.numel() and why_naive(older, new) is None:
        from pyramidkv.ops.level import triton

        with kernels.on(new.device):
            return triton.level(older, new, valid)
    return naive.level(older, new, valid)
