"""Attention of one new token a row over packed keys and values: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.kernels import why_naive
from pyramidkv.ops.packed_attention import by_pages, naive
from pyramidkv.ops.pages import Pages

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
    and so does what takes its place on a CPU (`by_pages`).
    With a tensor for `length`, its launch depends on capacities alone and nothing is read back from the device: a CUDA
    graph that holds the call stays right as the length grows.
    """
    alike = query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
    alike &= pages.bits != 16 or pages.keys.codes.dtype == query.dtype
    if alike and query.shape[1] <= 64 * keys.shape[1] and kernels.why_naive(query) is None:
        from pyramidkv.ops.packed_attention import triton

        with kernels.on(query.device):
            return triton.packed_attention(query, pages, keys, values, length, start, scaling, new, ring)
    if isinstance(length, int) and new is None and query.device.type == "cpu":
        return by_pages.packed_attention(query, pages, keys, values, length, start, scaling)
    return naive.packed_attention(query, pages, keys, values, length, start, scaling, new, ring)
