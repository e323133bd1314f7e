"""Rotated vectors turned further: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.turn import naive

__all__ = ["turn", "why_naive"]


def why_naive(vectors: Tensor) -> str | None:
    """Why a call with these vectors runs in plain torch; None if the Triton kernel can serve it."""
    if reason := kernels.why_no_triton(vectors.device):
        return reason
    if vectors.dtype not in kernels.READ:
        return f"the kernel does not read {str(vectors.dtype).removeprefix('torch.')}"
    if vectors.shape[-1] > kernels.LARGEST:
        return f"head size {vectors.shape[-1]} is over {kernels.LARGEST}"
    if torch.is_grad_enabled() and vectors.requires_grad:
        return "a gradient is asked for"
    return None


def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, N, D) vectors with their first R channels rotated by the angles of their row, (B, R / 2) cos and sin.

    The definition is that of `naive.turn`; the kernel's result is the same to the last bit.
    """
    if why_naive(vectors) is None:
        from pyramidkv.ops.turn import triton

        with kernels.on(vectors.device):
            return triton.turn(vectors, cos, sin)
    return naive.turn(vectors, cos, sin)
