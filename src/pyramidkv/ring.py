"""The queries of the newest decoded tokens: what a scorer looks through when a layer evicts while decoding.

The query of the token in slot s of the newest storage lies at s modulo the ring's size, so that where to write follows
from a length that a captured graph has on the device, and taking tokens back is forgetting how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 2  # what the two warm-ups of a graph may write ahead of the newest query without touching the oldest


class QueryRing:
    """(B, Hq, size + SPARE, D) queries, of which the newest `count` are to be read."""

    def __init__(self, queries: Tensor, count: int = 0) -> None:
        self.queries = queries
        self.count = count

    @classmethod
    def allocate(cls, like: Tensor, size: int, dtype: torch.dtype) -> QueryRing:
        """An empty ring of `size` queries, for rows, heads and width of (B, Hq, *, D)."""
        rows, heads, _, width = like.shape
        return cls(like.new_zeros(rows, heads, size + SPARE, width, dtype=dtype))

    @property
    def size(self) -> int:
        """The most queries that can be read."""
        return self.queries.shape[2] - SPARE

    @property
    def nbytes(self) -> int:
        return self.queries.untyped_storage().nbytes()

    def push(self, query: Tensor, slot: int) -> None:
        """Take the (B, Hq, T, D) queries of the tokens in the slots from `slot` on."""
        new = query.shape[2]
        if new == 1:  # decoding: one launch
            self.queries[:, :, slot % self.queries.shape[2]] = query[:, :, 0].detach()
            self.pushed(1)
            return
        fits = min(new, self.queries.shape[2])
        places = torch.arange(slot + new - fits, slot + new, device=query.device) % self.queries.shape[2]
        self.queries.index_copy_(2, places, query[:, :, new - fits :].detach().to(self.queries.dtype))
        self.pushed(new)

    def pushed(self, tokens: int) -> None:
        """Count queries that a captured graph has written."""
        self.count = min(self.count + tokens, self.size)

    def drop(self, tokens: int) -> None:
        """Forget the newest queries; their tokens have been taken back."""
        self.count = max(self.count - tokens, 0)

    def newest(self, length: int) -> Tensor:
        """(B, Hq, count, D): the queries to be read, oldest first, where `length` slots are in use."""
        first = (length - self.count) % self.queries.shape[2]
        return self.queries.roll(-first, 2)[:, :, : self.count]

    def rows(self, index: Tensor) -> QueryRing:
        """A copy with the rows `index` (N,), in that order."""
        return QueryRing(self.queries.index_select(0, index.to(self.queries.device)), self.count)
