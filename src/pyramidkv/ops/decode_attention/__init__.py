"""Attention of one new token a row over static buffers: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.kernels import why_naive

__all__ = ["decode_attention", "why_naive"]


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
    ring: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over the slots in use of buffers that may be longer.

    The definition, arguments and result are those of `naive.decode_attention`; the kernel takes values as wide as keys.
    With a tensor for `length`, its launch depends on the capacity alone and nothing is read back from the device: a
    CUDA graph that holds the call stays right as the length grows.
    """
    alike = query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
    if alike and query.shape[1] <= 64 * keys.shape[1] and kernels.why_naive(query) is None:
        from pyramidkv.ops.decode_attention import triton

        with kernels.on(query.device):
            return triton.decode_attention(query, keys, values, length, start, scaling, new, ring)
    return naive.decode_attention(query, keys, values, length, start, scaling, new, ring)
