"""Scores pooled with those of their neighbours: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.pooling import naive

__all__ = ["pool", "why_naive"]


def why_naive(scores: Tensor) -> str | None:
    """Why a call with these scores runs in plain torch; None if the Triton kernel can serve it."""
    if scores.dtype != torch.float32:
        return f"the kernel does not read {str(scores.dtype).removeprefix('torch.')}"
    return kernels.why_no_triton(scores.device)


def pool(scores: Tensor, kernel: int, kind: str, valid: Tensor | None = None, old: int | None = None) -> Tensor:
    """Each score averaged ("avg") or maximised ("max") with its neighbours, `kernel` slots wide.

    The definition and the arguments are those of `naive.pool`; the kernel's result is the same but for rounding.
    """
    if scores.numel() and kernel > 1 and why_naive(scores) is None:
        from pyramidkv.ops.pooling import triton

        with kernels.on(scores.device):
            return triton.pool(scores, kernel, kind, valid, old)
    return naive.pool(scores, kernel, kind, valid, old)
