"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE, Codes, dequantize_keys, dequantize_values
from pyramidkv.ops.strips import Strips


def unpack(keys: Codes | Strips, values: Codes | Strips, layout: Tensor, targets: tuple[Tensor, Tensor]) -> None:
    """Write the numbers in pages into slots: code * scale + zero point in float32, rounded to the dtype of the targets.

    Args:
        keys, values: codes of (B, pages, 64, D) and (B, pages, 64, Dv).
        layout: (3, B, H) int32, as `packing.naive.pack` gives it: a head's first page, its pages, its empty slots.
        targets: (B, H, 64 * N, D) and (B, H, 64 * N, Dv), which may be parts of larger tensors; no head has more than N
            pages. A head's pages lie at its end. Every element is written: those of empty slots become zeros.
    """
    pages, most = keys.codes.shape[1], targets[0].shape[2] // PAGE
    first, count, start = layout[..., None].long()
    behind = torch.arange(most, device=layout.device) - (most - count)  # pages of the head before each
    page = (first + behind.clamp(min=0)).clamp(max=pages - 1)
    page += pages * torch.arange(layout.shape[1], device=layout.device)[:, None, None]
    slot = torch.arange(most * PAGE, device=layout.device)
    empty = (slot < (most - count) * PAGE + start).nonzero(as_tuple=True)  # few: a mask of all would cost more
    for codes, dequantize, target in ((keys, dequantize_keys, targets[0]), (values, dequantize_values, targets[1])):
        mine = codes.each(lambda t: t.flatten(0, 1).index_select(0, page.flatten()))  # codes are moved, not numbers
        target.copy_(dequantize(mine.plain(), target.dtype).reshape(target.shape))
        target[empty] = 0
