"""How many slots each KV head of a layer may keep where heads need not keep the same: whole pages, by their scores."""

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
    best = scores.sort(dim=-1, descending=True, stable=True).values[..., recent:]
    best = torch.nn.functional.pad(best, (0, -best.shape[-1] % PAGE), value=float("-inf"))
    groups = best.reshape(rows, heads, -1, PAGE)  # (B, H, G, 64): the slots of a head's first page, second, ...
    real = groups > float("-inf")
    worth = groups.where(real, 0.0).sum(-1) / real.sum(-1).clamp(min=1)
    worth = worth.masked_fill(~real.any(-1), float("-inf"))
    own, pages = [], []
    for share, most in zip(shares, available, strict=True):
        pages.append(row_pages(heads, share, most, recent))
        own.append(min(int(FLOOR * max(share - recent, 0)) // PAGE, pages[-1] // heads))
    everything = [share >= most for share, most in zip(shares, available, strict=True)]
    facts = torch.tensor([own, pages, everything], pin_memory=scores.is_cuda)
    own_, pages_, everything_ = facts.to(device, non_blocking=True)[..., None]
    place = torch.arange(worth.shape[2], device=device)
    others = worth.masked_fill(place < own_[..., None], float("-inf")).flatten(1)
    order = others.sort(dim=-1, descending=True, stable=True).indices  # equal ones: the earlier head first
    won = torch.arange(order.shape[1], device=device) < pages_ - heads * own_
    counts = torch.zeros(rows, heads, dtype=torch.int64, device=device)
    counts.scatter_add_(1, order // max(worth.shape[2], 1), won.long())
    held = (scores > float("-inf")).sum(-1)
    limits = (recent + PAGE * (counts + own_)).minimum(held)
    return torch.where(everything_ > 0, held, limits).int()
