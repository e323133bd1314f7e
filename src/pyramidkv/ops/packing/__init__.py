"""Slots of keys and values written into pages of codes: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.packing import naive
from pyramidkv.ops.quantize import Codes, value_group
from pyramidkv.ops.strips import Strips

__all__ = ["pack"]


def pack(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    limits: Sequence[int] | Tensor,
    recent: int,
    pages: int,
    bits: int,
    even: bool,
    into: tuple[Codes | Strips, Codes | Strips, Tensor],
) -> None:
    """Write pages of codes of the slots `index` of keys and values, and where they lie, into pages that are there.

    The definition and the other arguments are those of `naive.pack`; the kernel's result is the same to the last bit.
    `into` has B rows, with room for `pages` pages or more.
    """
    whole_words = all(value_group(t.shape[-1]) % 4 == 0 for t in (key, value))
    readable = key.dtype == value.dtype and key.dtype in kernels.READ
    keys, values, layout = into
    if whole_words and readable and pages and index.numel() and kernels.why_no_triton(key.device) is None:
        from pyramidkv.ops.packing import triton

        assert isinstance(keys, Codes) and isinstance(values, Codes)
        with kernels.on(key.device):
            triton.pack(key, value, index, limits, recent, pages, bits, even, (keys, values, layout))
        return
    made = naive.pack(key, value, index, limits, recent, pages, bits, even)
    keys.put(made[0])
    values.put(made[1])
    layout.copy_(made[2])
