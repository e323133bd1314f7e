"""Where pages lie among the slots of heads that have unequal numbers of them; worked out once, not at every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE


class Moves(NamedTuple):
    """What attention of G queries a head reads and sums; of the N pages there are G, each with a query of its head."""

    queries: Tensor  # (G * N,) int64: a page's query among (heads, G)
    keys: Tensor  # (G * heads * most + 1,) int32: the first channel of each place among (G, N, channels), and the end
    weights: Tensor  # (G * parts * N,) int64: a page's place among (G, heads, width)
    values: Tensor  # (G * parts * heads * 2 + 1,) int32: the first token of each sum among (G, parts, N, 64); the end


@dataclass(frozen=True)
class Places:
    """Of the pages of all rows, in order: whose they are, and which 64 slots of that head.

    A head's pages lie side by side and take its last places; others have no page. Pages without a token are nobody's:
    those between two heads take a place that all heads then have in front, those behind the last head are left out.
    """

    head: Tensor  # (N,) int64, among those of all rows
    place: Tensor  # (N,) int64
    begins: Tensor  # (heads, most) int64: the first page from which on pages are in this place or behind it
    begin: Tensor  # (heads, 2) int64: the first of nobody's pages in front of a head, and the head's first
    hidden: Tensor  # (heads, most * 64) bool: slots without a token
    _moves: dict[tuple[int, ...], Moves] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Tensor, pages: int, slots: int) -> Places:
        """Of rows of so many pages, whose heads have so many slots and, maybe, 64 more. For `layout` see `Pages`."""
        first, count, start = (t.flatten() for t in layout.long())  # (heads,) of all rows
        row = torch.arange(layout.shape[1], device=layout.device).repeat_interleave(layout.shape[2])
        end = row * pages + first + count
        begin = end - (count - start // PAGE).clamp(min=0)
        total = max(end[begin < end].tolist(), default=0)
        begin, end = begin.clamp(max=total), end.clamp(max=total)
        before = torch.cat([end.new_zeros(1), end])[:-1]
        most = slots // PAGE + bool((before < begin).any())
        ahead = torch.arange(-most, 0, device=layout.device)
        page = torch.arange(total, device=layout.device)
        head = torch.searchsorted(end, page, right=True)
        begins = torch.max(end[:, None] + ahead, begin[:, None])
        begins[:, :1] = before[:, None]
        hidden = torch.arange(-most * PAGE, 0, device=layout.device) < (start - count * PAGE)[:, None]
        place = (page - end[head] + most).clamp(min=0)
        return cls(head, place, begins, torch.stack([before, begin], 1), hidden)

    def moves(self, groups: int, parts: int, channels: int, newest: int) -> Moves:
        """For so many queries a head, groups of channels of values, channels of a key, and places behind all of these.

        The last answer is remembered: `newest` changes with every 64th token.
        """
        asked = groups, parts, channels, newest
        if asked not in self._moves:
            (heads, most), pages = self.begins.shape, len(self.head)
            group = torch.arange(groups, device=self.head.device)[:, None]
            weights = (group * heads + self.head) * (most + newest) + self.place  # (G, N)
            self._moves.clear()
            self._moves[asked] = Moves(
                (self.head * groups + group).flatten(),
                _repeated(self.begins, groups, pages, channels),
                weights[:, None].expand(-1, parts, -1).flatten(),
                _repeated(self.begin, groups * parts, pages, PAGE),
            )
        return self._moves[asked]


def _repeated(begins: Tensor, times: int, pages: int, strips: int) -> Tensor:
    """First strips of what begins at some of so many pages, which are there so many times, and the end."""
    again = torch.arange(times, device=begins.device)[:, None] * pages + begins.flatten()
    return (torch.cat([again.flatten(), again.new_tensor([times * pages])]) * strips).int()
