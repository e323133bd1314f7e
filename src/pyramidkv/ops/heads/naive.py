"""The plain torch definition: whole pages of a row go to its heads by their scores, found by two sorts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE
from pyramidkv.ops.select.naive import mark

FLOOR = 0.2  # of an even share: no head has less (the safeguard of Ada-KV)
_LEAST = -(2**15)  # below all numbers in 16 bits


def row_pages(heads: int, share: int, available: int, recent: int, even: bool = True) -> int:
    """Pages that the heads of a row may fill together if an even share is `share` slots of `available`.

    The newest `recent` slots of each head are not in pages. Heads that are not `even` hold `available` on average; all
    of that may take a page more for each head.
    """
    if share >= available:
        old = max(available - recent, 0)
        return heads * -(-old // PAGE) if even else heads * (old + PAGE - 1) // PAGE
    return heads * max(share - recent, 0) // PAGE


def head_limits(
    scores: Tensor, shares: Sequence[int], available: Sequence[int], recent: int, valid: Tensor | None = None
) -> Tensor:
    """Slots of each head: together no more than even shares would give, spent where the scores are highest.

    Each head gets its newest `recent` slots and the pages of `FLOOR` of an even share. The other pages go, one by one,
    to the head whose best slot that is not in a page yet scores highest (Ada-KV, arXiv 2407.11550, section 4, which
    hands out single slots); scores are compared in 16 bits, and of equal ones the earlier head's comes first. So scores
    must mean the same in every head.

    Args:
        scores: (B, H, K). Infinite ones count as the largest finite ones, NaN as the least.
        shares: slots of an even share in each row.
        available: slots of a head that can be kept, in each row; the average of its heads, at least.
        recent: slots of each head that are kept in any case: its newest valid ones.
        valid: (B, K) or (B, H, K) bool, False for slots that can't be kept; None: all can.

    Returns:
        (B, H) int32.
    """
    rows, heads, _ = scores.shape
    facts = torch.tensor(row_facts(heads, shares, available, recent), dtype=torch.int64, device=scores.device)
    own, pages, everything = facts.reshape(rows, 3).T[..., None]
    marked = mark(scores, recent=recent, valid=valid, finite=True)
    held = (marked > float("-inf")).sum(-1)
    old = marked.masked_fill(marked == float("inf"), float("-inf"))
    worth = in_16_bits(old.sort(dim=-1, descending=True).values[..., ::PAGE])  # (B, H, G), of each page's best slot
    place = torch.arange(worth.shape[2], device=scores.device)
    others = worth.masked_fill(place < own[..., None], _LEAST).flatten(1)
    order = others.sort(dim=-1, descending=True, stable=True).indices
    won = torch.arange(order.shape[1], device=scores.device) < pages - heads * own
    counts = torch.zeros(rows, heads, dtype=torch.int64, device=scores.device)
    counts.scatter_add_(1, order // max(worth.shape[2], 1), won.long())
    return torch.where(everything > 0, held, (recent + PAGE * (counts + own)).minimum(held)).int()


def in_16_bits(numbers: Tensor) -> Tensor:
    """Integers in the order of float32 numbers: sign, exponent and the first 7 bits of the fraction, rounded down."""
    bits = (numbers + 0.0).view(torch.int32)  # -0.0 equals 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16


def row_facts(heads: int, shares: Sequence[int], available: Sequence[int], recent: int) -> list[tuple[int, int, int]]:
    """Of each row: pages that each of its heads has in any case; pages of the row; 1 if it keeps everything."""
    facts = []
    for share, most in zip(shares, available, strict=True):
        pages = row_pages(heads, share, most, recent)
        own = min(int(FLOOR * max(share - recent, 0)) // PAGE, pages // heads)
        facts.append((own, pages, int(share >= most)))
    return facts
