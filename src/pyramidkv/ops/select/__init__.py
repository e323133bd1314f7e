"""Which slots survive an eviction: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.select import naive

__all__ = ["select", "why_naive"]


def why_naive(scores: Tensor) -> str | None:
    """Why a call with these scores runs in plain torch; None if the Triton kernel can serve it."""
    if scores.dtype not in kernels.READ:
        return f"the kernel does not read {str(scores.dtype).removeprefix('torch.')}"
    return kernels.why_no_triton(scores.device)


def select(
    scores: Tensor,
    limits: Sequence[int] | Tensor,
    width: int,
    *,
    recent: int = 0,
    valid: Tensor | None = None,
    finite: bool = False,
) -> Tensor:
    """The slots with the highest scores, in their old order: (B, H, K) scores give (B, H, width) int64.

    The definition and the arguments are those of `naive.select`; the kernel's result is the same to the last index.
    """
    if why_naive(scores) is None:
        from pyramidkv.ops.select import triton

        with kernels.on(scores.device):
            return triton.select(scores, limits, width, recent=recent, valid=valid, finite=finite)
    return naive.select(scores, limits, width, recent=recent, valid=valid, finite=finite)
