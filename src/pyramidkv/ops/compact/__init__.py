"""Copying the slots that survive into a buffer: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.compact import naive
from pyramidkv.ops.compact.naive import Slots

__all__ = ["Slots", "compact", "why_naive"]


def why_naive(sources: Slots, targets: Slots) -> str | None:
    """Why a call with these tensors runs in plain torch; None if the Triton kernel can serve it."""
    for tensor in (*sources[:2], *targets[:2]):
        if tensor.dtype not in kernels.READ:
            return f"the kernel does not read {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.shape[-1] > kernels.LARGEST:
            return f"head size {tensor.shape[-1]} is above {kernels.LARGEST}"
    return kernels.why_no_triton(sources[0].device)


def compact(sources: Slots, index: Tensor, targets: Slots) -> None:
    """Copy the slots `index` (B, H, N) of the sources into the first N slots of the targets; -1 becomes zeros.

    The definition and the arguments are those of `naive.compact`; the kernel copies all three tensors in one launch.
    """
    if why_naive(sources, targets) is None:
        from pyramidkv.ops.compact import triton

        with kernels.on(index.device):
            triton.compact(sources, index, targets)
        return
    naive.compact(sources, index, targets)
