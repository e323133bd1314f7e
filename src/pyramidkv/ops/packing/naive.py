"""The plain torch definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE, Codes, quantize_keys, quantize_values
from pyramidkv.ops.select.naive import row_limits


def pack(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    limits: Sequence[int] | Tensor,
    recent: int,
    pages: int,
    bits: int,
    even: bool,
) -> tuple[Codes, Codes, Tensor]:
    """Pages of codes of the slots `index` of keys and values, and where they lie.

    Args:
        key, value: (B, H, K, D) and (B, H, K, Dv).
        index: (B, H, W) into K, -1 for none; the last slots of a head are the last of its last page.
        limits: slots of each row, or (B, H) of each row and head, beside which `index` may have -1s.
        recent: of the slots in `limits`, those that are not in `index`.
        pages: of each row, those of no head included; those of a head lie behind those of the head before.
        bits: of a number, 16, 8, 4 or 2.
        even: each head has the pages that W slots need, whatever `limits` says; else those that its slots need.

    Returns:
        Codes of keys (B, pages, 64, D) and of values (B, pages, 64, Dv), empty slots being zeros; (3, B, H) int32: the
        first page of each head in its row, how many pages it has, and the empty slots in front of its first token.
    """
    rows, heads, width = index.shape
    device = index.device
    limit = limits if isinstance(limits, Tensor) else row_limits(limits, device)[:, None].expand(rows, heads)
    used = (limit.long() - recent).clamp(min=0)
    count = torch.full_like(used, -(-width // PAGE)) if even else (used + PAGE - 1) // PAGE
    if device.type == "cpu" and rows and int(count.sum(1).max()) > pages:  # elsewhere looking would take time
        raise ValueError(f"pages={pages}: the heads of a row need {int(count.sum(1).max())}")
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
    layout = torch.stack([last - count, count, count * PAGE - used]).int()
    return quantize_keys(keys, bits, slot >= 0), quantize_values(values, bits), layout
