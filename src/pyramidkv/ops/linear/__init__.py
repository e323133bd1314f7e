"""Products of a few rows with a weight, as decoding has them: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.linear import naive

__all__ = ["LARGEST", "linear", "why_torch"]

LARGEST = 16  # rows


def why_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the product of x, (M, K), with (N, K) and (N,) is left to torch; None if the kernel serves it.

    It depends on shapes, strides and dtypes alone.
    """
    if reason := kernels.why_no_triton(x.device):
        return reason
    given = [x, weight] if bias is None else [x, weight, bias]
    if x.dtype not in (torch.float16, torch.bfloat16) or any(t.dtype != x.dtype for t in given):
        return "the tensors are not all float16 or all bfloat16"
    if any(t.device != x.device for t in given):
        return "the tensors lie on several devices"
    if weight.ndim != 2 or x.ndim != 2 or not 1 <= x.shape[0] <= LARGEST:
        return f"x is {tuple(x.shape)}, not 1 to {LARGEST} rows"
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.shape[1] % 8:
        return "rows of the weight do not lie on borders of 16 bytes"
    if bias is not None and (bias.ndim != 1 or bias.stride(0) != 1):
        return "the bias is no vector of numbers side by side"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "a gradient is asked for"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of the weight, plus the bias, for 1 to 16 rows.

    The definition, arguments and result are those of `naive.linear`. Products are added in float32 and rounded once;
    results do not depend on the run.
    """
    if why_torch(x, weight, bias) is None:
        from pyramidkv.ops.linear import triton

        with kernels.on(x.device):
            return triton.linear(x, weight, bias)
    return naive.linear(x, weight, bias)
