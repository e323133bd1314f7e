"""Token positions as one bit a token: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.bitmap import naive

__all__ = ["pack_positions", "unpack_positions", "why_naive"]


def why_naive(positions: Tensor, index: Tensor) -> str | None:
    """Why a call with these tensors runs in plain torch; None if the Triton kernel can serve it."""
    if positions.dtype != torch.int32 or index.dtype != torch.int64:
        return "the kernel reads positions as int32 and indices as int64"
    return kernels.why_no_triton(index.device)


def pack_positions(positions: Tensor, index: Tensor, into: Tensor) -> None:
    """Write the positions of the slots `index` into a bitmap (B, H, bytes).

    The definition and the arguments are those of `naive.pack_positions`; the kernel's result is the same.
    """
    if index.numel() and why_naive(positions, index) is None:
        from pyramidkv.ops.bitmap import triton

        with kernels.on(index.device):
            triton.pack_positions(positions, index, into)
        return
    naive.pack_positions(positions, index, into)


def unpack_positions(bitmap: Tensor, slots: int) -> Tensor:
    """(B, H, slots) int32: the positions in a bitmap; the definition is that of `naive.unpack_positions`."""
    if bitmap.numel() and slots and kernels.why_no_triton(bitmap.device) is None:
        from pyramidkv.ops.bitmap import triton

        with kernels.on(bitmap.device):
            return triton.unpack_positions(bitmap, slots)
    return naive.unpack_positions(bitmap, slots)
