"""How many slots each KV head of a layer may keep: Triton kernels where they can run, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.heads import naive
from pyramidkv.ops.heads.naive import FLOOR, row_pages
from pyramidkv.ops.select import why_naive

__all__ = ["FLOOR", "head_limits", "row_pages", "why_naive"]


def head_limits(
    scores: Tensor, shares: Sequence[int], available: Sequence[int], recent: int, valid: Tensor | None = None
) -> Tensor:
    """Slots of each head, (B, H) int32, of (B, H, K) scores.

    The definition and the arguments are those of `naive.head_limits`; the kernels' result is the same.
    """
    if scores.numel() and why_naive(scores) is None:
        from pyramidkv.ops.heads import triton

        with kernels.on(scores.device):
            return triton.head_limits(scores, shares, available, recent, valid)
    return naive.head_limits(scores, shares, available, recent, valid)
