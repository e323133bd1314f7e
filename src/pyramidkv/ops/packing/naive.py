"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE, Codes, quantize_keys, quantize_values


def pack(key: Tensor, value: Tensor, index: Tensor, count: Tensor, pages: int, bits: int) -> tuple[Codes, Codes]:
    """Pages of codes of the slots `index` of keys and values.

    Args:
        key, value: (B, H, K, D) and (B, H, K, Dv).
        index: (B, H, W) into K, -1 for none; the last slots of a head are the last of its last page.
        count: (B, H), the pages of each head; those of a head lie behind those of the head before.
        pages: of each row, those of no head included.
        bits: of a number, 16, 8, 4 or 2.

    Returns:
        Codes of keys (B, pages, 64, D) and of values (B, pages, 64, Dv). Empty slots are zeros.
    """
    rows, heads, width = index.shape
    device = index.device
    last = count.cumsum(-1)
    page = torch.arange(pages, device=device)
    owner = (page >= last[..., None]).sum(1).clamp(max=heads - 1)  # (B, pages)
    behind = last.gather(1, owner) - page  # pages from this one to the head's last
    column = width - PAGE * behind[..., None] + torch.arange(PAGE, device=device)  # (B, pages, 64), of `index`
    there = (column >= 0) & (column < width)
    place = owner[..., None] * width + column.clamp(0, max(width - 1, 0))
    slot = index.flatten(1).gather(1, place.flatten(1)).view_as(place).masked_fill(~there, -1)
    row = torch.arange(rows, device=device)[:, None, None]
    taken = (row, owner[..., None], slot.clamp(min=0))
    empty = (slot < 0)[..., None]
    keys, values = (t[taken].masked_fill_(empty, 0) for t in (key, value))
    return quantize_keys(keys, bits, slot >= 0), quantize_values(values, bits)
