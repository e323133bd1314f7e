"""Rotary position embedding of queries and keys: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.rotate import naive, one_token

__all__ = ["rotate", "why_naive"]


def why_naive(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why a call runs in plain torch; None if the Triton kernel can serve it."""
    if reason := kernels.why_no_triton(query.device):
        return reason
    if query.dtype not in kernels.READ:
        return f"the kernel does not read {str(query.dtype).removeprefix('torch.')}"
    if not query.dtype == key.dtype == cos.dtype == sin.dtype:
        return "vectors and angles have unequal dtypes"
    if query.shape[-1] > kernels.LARGEST:
        return f"head size {query.shape[-1]} is over {kernels.LARGEST}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "a gradient is asked for"
    return None


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, plain: Callable[..., Any] = naive.rotate
) -> tuple[Tensor, Tensor]:
    """(B, Hq, T, D) queries and (B, Hkv, T, D) keys with their first R channels rotated; cos and sin (1 or B, T, R).

    The definition is that of `naive.rotate`; what the kernel gives, and `one_token` where it decodes on a CPU, is the
    same to the last bit. Where they can't serve, `plain` does, a function of the same. The kernel's queries lie in
    memory as (B, T, Hq, D): attention gives its output the layout of its queries, and that is the one which the output
    projection reads without a copy.
    """
    alike = query.dtype == key.dtype == cos.dtype == sin.dtype
    if query.shape[2] == 1 and query.device.type == "cpu" and alike and not torch.is_grad_enabled():
        return one_token.rotate(query, key, cos, sin)
    if why_naive(query, key, cos, sin) is None:
        from pyramidkv.ops.rotate import triton

        with kernels.on(query.device):
            return triton.rotate(query, key, cos, sin)
    out: tuple[Tensor, Tensor] = plain(query, key, cos, sin)
    return out
