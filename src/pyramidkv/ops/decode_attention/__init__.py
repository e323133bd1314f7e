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

    The definition is `naive.decode_attention`. With a tensor for `length`, the kernel's launch depends on the capacity
    alone and nothing is read back from the device: a CUDA graph that holds the call stays right as the length grows.

    Args:
        query: (B, Hq, 1, D).
        keys, values: (B, Hkv, C, D), Hq a multiple of Hkv. Slots outside [start, length) are not read.
        length: slots in use; a number, or an int32 tensor of shape (1,) or (B, Hkv).
        start: (B, Hkv) int32, the first slot of each row and head that holds a token; None: 0.
        scaling: factor of the logits.
        new: key and value, (B, Hkv, 1, D) each, of a token to attend to as well and to write into slot `length`; None:
            the slots in use are all there is.
        ring: (B, Hq, R, D), into slot `length` modulo R of which the query is written; only with `new`. None: nowhere.

    Returns:
        (B, Hq, 1, D) in the dtype of the query; zeros for rows with no slots.
    """
    alike = query.dtype == keys.dtype == values.dtype and keys.shape[-1] == values.shape[-1]
    if alike and query.shape[1] <= 64 * keys.shape[1] and kernels.why_naive(query) is None:
        from pyramidkv.ops.decode_attention import triton

        with kernels.on(query.device):
            return triton.decode_attention(query, keys, values, length, start, scaling, new, ring)
    return naive.decode_attention(query, keys, values, length, start, scaling, new, ring)
