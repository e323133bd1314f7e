"""Where pages lie among the slots of heads that have unequal numbers of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramidkv.ops.quantize import PAGE


@dataclass(frozen=True)
class Places:
    """Of the pages of all rows, in order: whose they are, which 64 slots of that head, and which of those are empty.

    Pages without a token are nobody's. Those behind the last that has one are left out; if there are others, they lie
    in the first slots of one head more than there are.
    """

    head: Tensor  # (N,) int64, among those of all rows
    place: Tensor  # (N,) int64, in 64 slots
    spare: bool  # some are nobody's
    empty: Tensor  # (N,) int64, slots in front of its first token
    _among: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Tensor, pages: int, slots: int) -> Places:
        """Of rows of so many pages; a head's pages take the last of its slots. For `layout` see `Pages`."""
        first, count, start = layout.long()
        rows, heads = first.shape
        page = torch.arange(pages, device=layout.device)
        head = (page >= (first + count)[..., None]).sum(1)  # (B, pages), `heads` behind those of the last
        mine = head.clamp(max=heads - 1)
        nth = page - first.gather(1, mine)  # of its head
        empty = (start.gather(1, mine) - nth * PAGE).clamp(min=0)
        place = slots // PAGE - count.gather(1, mine) + nth
        nobodys = (head == heads) | (empty >= PAGE)
        head += heads * torch.arange(rows, device=layout.device)[:, None]
        somebodys = (~nobodys).flatten().nonzero()[:, 0].tolist()
        end = somebodys[-1] + 1 if somebodys else 0
        found = (t.masked_fill(nobodys, x).flatten()[:end] for t, x in ((head, rows * heads), (place, 0), (empty, 0)))
        head, place, empty = (t.clone() for t in found)
        return cls(head, place, end > len(somebodys), empty)

    def among(self, groups: int, width: int) -> tuple[Tensor, Tensor]:
        """Where the pages are among (heads, G, width) places, and their empty slots among the slots of those.

        Both are int64, the first (N * G,), as each page is there once for each of G queries. The last answer is
        remembered: `width` changes with every 64th token.
        """
        if (groups, width) not in self._among:
            group = torch.arange(groups, device=self.head.device)
            places = (self.head[:, None] * groups + group) * width + self.place[:, None]  # (N, G)
            slots = torch.arange(PAGE, device=self.head.device)
            hidden = (slots < self.empty[:, None])[:, None].expand(-1, groups, -1)
            self._among.clear()
            self._among[groups, width] = places.flatten(), (places[..., None] * PAGE + slots)[hidden]
        return self._among[groups, width]
