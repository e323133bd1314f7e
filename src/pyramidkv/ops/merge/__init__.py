"""Attention over all keys from that over two or three parts of them: a Triton kernel where it can run, else torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.merge import naive
from pyramidkv.ops.merge.naive import Part

__all__ = ["Part", "merge", "why_naive"]


def why_naive(parts: Sequence[Part], out: Tensor) -> str | None:
    """Why a call with these parts runs in plain torch; None if the Triton kernel can serve it."""
    if not 2 <= len(parts) <= 3:
        return f"the kernel merges 2 or 3 parts, not {len(parts)}"
    if any(t.dtype not in kernels.READ for t in (out, *(part for part, _ in parts))):
        return "the kernel reads float16, bfloat16 and float32"
    return kernels.why_naive(out)


def merge(parts: Sequence[Part], out: Tensor) -> None:
    """Write the attention over all keys into `out`, (B, H, Q, D) of any strides, from that over parts of them.

    The definition and the arguments are those of `naive.merge`.
    """
    if why_naive(parts, out) is None:
        from pyramidkv.ops.merge import triton

        with kernels.on(out.device):
            triton.merge(parts, out)
        return
    naive.merge(parts, out)
