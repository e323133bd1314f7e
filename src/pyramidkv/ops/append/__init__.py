"""Keys and values with new ones behind them: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.append import naive

__all__ = ["append", "why_naive"]


def why_naive(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> str | None:
    """Why a call with these tensors runs in plain torch; None if the Triton kernel can serve it."""
    given = (*old, *new)
    if any(t.dtype not in kernels.READ or t.dtype != new[0].dtype for t in given):
        return "the kernel reads float16, bfloat16 and float32, all tensors alike"
    if any(t.shape[-1] > kernels.LARGEST for t in given):
        return f"a head size is above {kernels.LARGEST}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "a gradient is asked for"
    return kernels.why_no_triton(new[0].device)


def append(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], *, by_token: bool = False, front: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values with new ones behind them, copies.

    The definition, arguments and result are those of `naive.append`; the kernel copies all in one launch.
    """
    if why_naive(old, new) is None:
        from pyramidkv.ops.append import triton

        with kernels.on(new[0].device):
            return triton.append(old, new, by_token=by_token, front=front)
    return naive.append(old, new, by_token=by_token, front=front)
