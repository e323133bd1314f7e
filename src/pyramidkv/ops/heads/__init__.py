"""How many slots each KV head of a layer may keep: Triton kernels where they can run, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.heads import naive
from pyramidkv.ops.heads.naive import FLOOR, row_pages
from pyramidkv.ops.kernels import power_of_two
from pyramidkv.ops.quantize import PAGE

__all__ = ["FLOOR", "head_limits", "row_pages", "why_naive"]

SORTED = 8192  # most slots that one program sorts; with more, attention takes so long that a sort does not matter
HANDED = 32768  # most pages of a row that one program hands out


def why_naive(scores: Tensor) -> str | None:
    """Why a call with these scores runs in plain torch; None if the Triton kernels can serve it."""
    _, heads, slots = scores.shape
    if scores.dtype != torch.float32:
        return f"the kernel does not read {str(scores.dtype).removeprefix('torch.')}"
    if slots > SORTED:
        return f"{slots} slots are more than {SORTED}"
    if power_of_two(heads) * power_of_two(slots) > HANDED * PAGE:
        return f"{heads} heads of {slots} slots are too many"
    return kernels.why_no_triton(scores.device)


def head_limits(scores: Tensor, shares: Sequence[int], available: Sequence[int], recent: int) -> Tensor:
    """Slots of each head, (B, H) int32, of (B, H, K) scores.

    The definition and the arguments are those of `naive.head_limits`; the kernels' result is the same.
    """
    if scores.numel() and why_naive(scores) is None:
        from pyramidkv.ops.heads import triton

        with kernels.on(scores.device):
            return triton.head_limits(scores, shares, available, recent)
    return naive.head_limits(scores, shares, available, recent)
