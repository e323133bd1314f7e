"""Two scores of each slot as one: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.over_mean import naive

__all__ = ["over_mean"]


def over_mean(newer: Tensor, scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """The larger of two scores of each slot, each as a multiple of its mean over the head, (B, H, K) float32.

    The definition and the arguments are those of `naive.over_mean`; the kernel adds in another order.
    """
    if scores.numel() and newer.dtype == scores.dtype == torch.float32 and kernels.why_no_triton(scores.device) is None:
        from pyramidkv.ops.over_mean import triton

        with kernels.on(scores.device):
            return triton.over_mean(newer, scores, valid)
    return naive.over_mean(newer, scores, valid)
