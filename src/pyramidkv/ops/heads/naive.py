"""The plain torch definition: whole pages of a row go to its heads by their scores, found by two sorts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE

FLOOR = 0.2  # of an even share: no head has less (the safeguard of Ada-KV)


def row_pages(heads: int, share: int, available: int, recent: int, even: bool = True) -> int:
    """Pages that the heads of a row may fill together if an even share is `share` slots of `available`.

    The newest `recent` slots of each head are not in pages. Heads that are not `even` hold `available` on average; all
    of that may take a page more for each head.
    """
    if share >= available:
        old = max(available - recent, 0)
        return heads * -(-old // PAGE) if even else heads * (old + PAGE - 1) // PAGE
    return heads * max(share - recent, 0) // PAGE


def head_limits(scores: Tensor, shares: Sequence[int], available: Sequence[int], recent: int) -> Tensor:
    """Slots of each head: together no more than even shares would give, spent where the scores are highest.

    Each head gets its newest `recent` slots and the pages of `FLOOR` of an even share. The other pages go, one by one,
    to the head whose next best 64 slots have the highest mean score (Ada-KV, arXiv 2407.11550, section 4, which hands
    out single slots). So scores must mean the same in every head.

    Args:
        scores: (B, H, K) float32; +inf for the newest `recent` slots, -inf for slots that can't be kept.
        shares: slots of an even share in each row.
        available: slots of a head that can be kept, in each row; the average of its heads, at least.
        recent: slots of each head that are kept in any case.

    Returns:
        (B, H) int32.
    """
    rows, heads, _ = scores.shape
    device = scores.device
    own, pages, everything = row_facts(heads, shares, available, recent, device)[..., None]
    best = scores.masked_fill(scores == float("inf"), float("-inf")).sort(dim=-1, descending=True).values
    best = torch.nn.functional.pad(best, (0, -best.shape[-1] % PAGE), value=float("-inf"))
    groups = best.reshape(rows, heads, -1, PAGE)  # (B, H, G, 64): the slots of a head's first page, second, ...
    real = groups > float("-inf")
    worth = groups.where(real, 0.0)
    while worth.shape[-1] > 1:  # in an order that no device changes
        first, second = worth.chunk(2, dim=-1)
        worth = first + second
    worth = (worth[..., 0] / real.sum(-1).clamp(min=1)).clamp(min=torch.finfo(torch.float32).min)
    worth = worth.masked_fill(~real.any(-1), float("-inf"))
    place = torch.arange(worth.shape[2], device=device)
    others = worth.masked_fill(place < own[..., None], float("-inf")).flatten(1)
    order = others.sort(dim=-1, descending=True, stable=True).indices  # equal ones: the earlier head first
    won = torch.arange(order.shape[1], device=device) < pages - heads * own
    counts = torch.zeros(rows, heads, dtype=torch.int64, device=device)
    counts.scatter_add_(1, order // max(worth.shape[2], 1), won.long())
    held = (scores > float("-inf")).sum(-1)
    limits = (recent + PAGE * (counts + own)).minimum(held)
    return torch.where(everything > 0, held, limits).int()


def row_facts(heads: int, shares: Sequence[int], available: Sequence[int], recent: int, device: torch.device) -> Tensor:
    """(3, B) int32: pages that each head of a row has in any case; pages of the row; 1 if it keeps everything."""
    pages = [row_pages(heads, share, most, recent) for share, most in zip(shares, available, strict=True)]
    own = [min(int(FLOOR * max(share - recent, 0)) // PAGE, n // heads) for share, n in zip(shares, pages, strict=True)]
    everything = [int(share >= most) for share, most in zip(shares, available, strict=True)]
    # Not pinned: so small a copy is taken along at once, and new pinned memory would have to wait for the device.
    return torch.tensor([own, pages, everything], dtype=torch.int32).to(device, non_blocking=True)
