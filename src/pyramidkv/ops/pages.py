"""Pages of keys and values: 64 slots of one row and KV head at one precision, the pages of a head one behind another.

Every row has room for the same number of pages, whose keys and values are tensors (B, pages, ...); a head of a row has
`count` of them, the first at `first`. Slots are counted from the newest backwards, so that a row has the same pages in
any batch: the empty slots, `start` of them, lie at the front of a head's first pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyramidkv.ops.packing import pack
from pyramidkv.ops.quantize import PAGE, Codes, dequantize_keys, dequantize_values


@dataclass(frozen=True)
class Pages:
    """Keys and values of (B, H) heads in pages; see the head of this file."""

    keys: Codes  # of (B, pages, 64, D)
    values: Codes  # of (B, pages, 64, Dv)
    first: Tensor  # (B, H) int32: a head's first page in its row
    count: Tensor  # (B, H) int32: its pages
    start: Tensor  # (B, H) int32: empty slots in front of its first token
    even: bool  # all heads have the same number of pages, and those of a row the same slots in use

    @classmethod
    def gather(cls, key: Tensor, value: Tensor, index: Tensor, bits: int, pages: int | None = None) -> Pages:
        """Pages of the slots `index` (B, H, W) of (B, H, K, *) keys and values; -1s, in front, for none.

        With `pages`, each head gets those that its slots need, and a row has room for that many. Without, every head
        gets the pages that W slots need. Nothing is read back from the device.
        """
        rows, heads, width = index.shape
        device = index.device
        used = (index >= 0).sum(-1)
        each = -(-width // PAGE)
        even = pages is None
        if pages is None:
            pages = heads * each
            count = torch.full_like(used, each)
        else:
            count = (used + PAGE - 1) // PAGE
            if device.type == "cpu" and rows and int(count.sum(1).max()) > pages:  # elsewhere looking would take time
                raise ValueError(f"pages={pages}: the heads of a row need {int(count.sum(1).max())}")
        first = count.cumsum(-1) - count
        keys, values = pack(key.detach(), value.detach(), index, count, pages, bits)
        first, count, start = (t.to(torch.int32) for t in (first, count, count * PAGE - used))
        return cls(keys, values, first, count, start, even)

    @property
    def bits(self) -> int:
        """Of a number; 16: numbers are as computed."""
        return self.keys.bits

    @property
    def row_pages(self) -> int:
        """Pages of a row, those of no head included."""
        return self.keys.codes.shape[1]

    @cached_property
    def most(self) -> int:
        """Pages of the head that has most; where heads differ, this is read back from the device, once."""
        return self.row_pages // self.first.shape[1] if self.even else int(self.count.max())

    def valid(self) -> Tensor:
        """(B, H, 64 * most) bool, False for empty slots."""
        slot = torch.arange(self.most * PAGE, device=self.start.device)
        return slot >= ((self.most - self.count) * PAGE + self.start)[..., None]

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as (B, H, 64 * most, *), each head's slots at its end; the empty ones are finite."""
        rows, heads = self.first.shape
        if self.even:
            keys, values = dequantize_keys(self.keys, dtype), dequantize_values(self.values, dtype)
            return tuple(t.reshape(rows, heads, -1, t.shape[-1]) for t in (keys, values))  # type: ignore[return-value]
        missing = (self.most - self.count)[..., None]
        page = torch.arange(self.most, device=missing.device) - missing  # of the head
        page = (self.first[..., None] + page.clamp(min=0)).clamp(max=self.row_pages - 1).long()
        row = torch.arange(rows, device=page.device)[:, None, None]
        keys, values = dequantize_keys(self.keys, dtype), dequantize_values(self.values, dtype)
        return keys[row, page].flatten(2, 3), values[row, page].flatten(2, 3)

    def rows(self, index: Tensor) -> Pages:
        """A copy with the rows `index` (N,), in that order."""
        first, count, start = (t.index_select(0, index.to(t.device)) for t in (self.first, self.count, self.start))
        return Pages(self.keys.rows(index), self.values.rows(index), first, count, start, self.even)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        codes = {"keys": self.keys, "values": self.values}
        named = {f"{kind}.{name}": t for kind, c in codes.items() for name, t in c.tensors().items()}
        return named | {"first": self.first, "count": self.count, "start": self.start}
