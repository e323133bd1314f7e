"""Pages of codes written back as keys and values: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.quantize import Codes
from pyramidkv.ops.strips import Strips
from pyramidkv.ops.unpacking import naive

__all__ = ["unpack"]


def unpack(keys: Codes | Strips, values: Codes | Strips, layout: Tensor, targets: tuple[Tensor, Tensor]) -> None:
    """Write the numbers in pages into slots.

    The definition and the arguments are those of `naive.unpack`; the kernel's result is the same to the last bit.
    """
    readable = all(t.dtype in kernels.READ and t.stride(-1) == 1 for t in targets)
    if readable and targets[0].numel() and kernels.why_no_triton(layout.device) is None:
        from pyramidkv.ops.unpacking import triton

        with kernels.on(layout.device):
            triton.unpack(keys.plain(), values.plain(), layout, targets)
        return
    naive.unpack(keys, values, layout, targets)
