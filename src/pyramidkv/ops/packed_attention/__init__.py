"""Attention of one new token a row over packed keys and values: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.kernels import why_naive
from pyramidkv.ops.packed_attention import by_heads, by_strips, naive
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.strips import Strips

__all__ = ["packed_attention", "why_naive"]


def packed_attention(
    query: Tensor,
    pages: Pages,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
    ring: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over pages and the newest slots.

    The definition, arguments and result are those of `naive.packed_attention`. The kernel reads the codes as they lie,
    and so does what takes its place on a CPU (`by_strips`).
    With a tensor for `length`, its launch depends on capacities alone and nothing is read back from the device: a CUDA
    graph that holds the call stays right as the length grows.
    """
    plain = isinstance(length, int) and new is None and not (torch.is_grad_enabled() and query.requires_grad)
    if plain and isinstance(pages.keys, Strips):
        return by_strips.packed_attention(query, pages, keys, values, int(length), start, scaling)
    alike = query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
    alike &= pages.bits != 16 or pages.keys.codes.dtype == query.dtype
    if alike and query.shape[1] <= 64 * keys.shape[1] and kernels.why_naive(query) is None:
        from pyramidkv.ops.packed_attention import triton

        with kernels.on(query.device):
            return triton.packed_attention(query, pages, keys, values, length, start, scaling, new, ring)
    if plain and query.device.type == "cpu":
        return by_heads.packed_attention(query, pages, keys, values, int(length), start, scaling)
    return naive.packed_attention(query, pages, keys, values, length, start, scaling, new, ring)
