"""Pages of keys and values: 64 slots of one row and KV head at one precision, the pages of a head one behind another.

Every row has room for the same number of pages, whose keys and values are tensors (B, pages, ...); a head of a row has
`count` of them, the first at `first`. Slots are counted from the newest backwards, so that a row has the same pages in
any batch: the empty slots, `start` of them, lie at the front of a head's first pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyramidkv.ops import strips
from pyramidkv.ops.append import append
from pyramidkv.ops.packing import pack
from pyramidkv.ops.places import Places
from pyramidkv.ops.quantize import PAGE, Codes, room_for
from pyramidkv.ops.read_back import ReadBack
from pyramidkv.ops.strips import Strips
from pyramidkv.ops.unpacking import unpack

SPARE = 2  # steps, of which there are 8 in a doubling


class PageShape(NamedTuple):
    """What the pages of a layer are, however many rows there are."""

    heads: int
    pages: int  # that a row has room for
    even: bool  # as in `Pages`
    bits: int
    sizes: tuple[int, int]  # channels of keys and of values
    dtype: torch.dtype  # of what is stored: uint8, or in 16 bits that of the numbers
    device: torch.device

    def room(self, rows: int) -> Pages:
        """Pages of so many rows, yet to be written."""
        if strips.why_not(self.sizes, self.bits, self.device) is None:
            layout = torch.empty(3, rows, self.heads, dtype=torch.int32)
            return Pages(*Strips.room(rows, self.pages, self.sizes, self.bits), layout, self.even)
        made = room_for(rows, self.pages, self.heads, self.sizes, self.bits, self.dtype, self.device)
        return Pages(*made, self.even)


@dataclass(frozen=True)
class Pages:
    """Keys and values of (B, H) heads in pages; see the head of this file."""

    keys: Codes | Strips  # of (B, pages, 64, D)
    values: Codes | Strips  # of (B, pages, 64, Dv)
    layout: Tensor  # (3, B, H) int32: `first`, `count` and `start`
    even: bool  # all heads have the same number of pages, and those of a row the same slots in use
    asked: ReadBack | None = None  # `count` on its way to the host
    least: int = 0  # slots of each head when unpacked, at least; 0: as many as there are

    @classmethod
    def gather(
        cls,
        key: Tensor,
        value: Tensor,
        index: Tensor,
        limits: Sequence[int] | Tensor,
        recent: int,
        bits: int,
        pages: int | None = None,
        found: Callable[[PageShape, int], Pages | None] | None = None,
        ask: bool = False,
    ) -> Pages:
        """Pages of the slots `index` (B, H, W) of (B, H, K, *) keys and values; -1s, in front, for none.

        `limits` says how many there are, one number a row or (B, H) int32, `recent` others of each head included, which
        go elsewhere. With `pages`, each head gets those that its slots need, and a row has room for that many. Without,
        every head gets the pages that W slots need. They are written into what `found` has for a shape and a number of
        rows, if anything. Nothing waits for the device; with `ask`, nor will `most`.
        """
        rows, heads, width = index.shape
        even = pages is None
        if pages is None:
            pages = heads * -(-width // PAGE)
        dtype = key.dtype if bits == 16 else torch.uint8
        shape = PageShape(heads, pages, even, bits, (key.shape[3], value.shape[3]), dtype, key.device)
        into = (None if found is None else found(shape, rows)) or shape.room(rows)
        pack(
            key.detach(),
            value.detach(),
            index,
            limits,
            recent,
            pages,
            bits,
            even,
            (into.keys, into.values, into.layout),
        )
        asked = ReadBack(into.count) if ask and not even else None
        return cls(into.keys, into.values, into.layout, even, asked)  # what lay there knew other numbers

    def for_device(self) -> Pages:
        """The same in the order of bytes that is read fastest on their device; the other way from `plain`."""
        shape = self.shape
        if strips.why_not(shape.sizes, shape.bits, shape.device) is not None:
            return self
        made = shape.room(self.layout.shape[1])
        made.keys.put(self.keys.plain())
        made.values.put(self.values.plain())
        return replace(self, keys=made.keys, values=made.values)

    def written_over(self, asked: ReadBack | None = None) -> Pages:
        """What lies in the same place now: other tokens, of which each head has other numbers.

        Unpacked, they take no fewer slots: what is launched over them is the same from one eviction to the next.
        `asked`: those numbers, if they are on their way to the host already.
        """
        if asked is None and not self.even:
            asked = ReadBack(self.count)
        return Pages(self.keys, self.values, self.layout, self.even, asked, self.slots)

    def with_spare(self) -> Pages:
        """The same, with slots for a few more pages than heads have if there were too few until now.

        Heads that keep unequal numbers exchange pages from one eviction to the next, and one may come to have more.
        """
        if self.even or self.slots <= self.least:
            return self
        return replace(self, least=self.slots + SPARE * self._step * PAGE)

    @property
    def shape(self) -> PageShape:
        """All of it but the rows."""
        codes, sizes = self.keys.codes, (self.keys.channels, self.values.channels)
        return PageShape(self.layout.shape[2], codes.shape[1], self.even, self.bits, sizes, codes.dtype, codes.device)

    def serves(self, shape: PageShape, rows: int) -> bool:
        """Whether `rows` rows of that shape can be written here; of the pages of a row some may be left over.

        Twice as many pages as needed serve, where heads need not have the same number.
        """
        spare = self.row_pages - shape.pages
        alike = self.shape == shape._replace(pages=self.row_pages) and self.layout.shape[1] == rows
        return alike and 0 <= spare <= (0 if shape.even else shape.pages)

    def part(self, rows: slice) -> Pages:
        """Those of some rows, where they lie."""
        keys, values = (c.each(lambda t: t[rows]) for c in (self.keys, self.values))
        return Pages(keys, values, self.layout[:, rows], self.even, least=self.least)

    @property
    def first(self) -> Tensor:
        """(B, H) int32: a head's first page in its row."""
        return self.layout[0]

    @property
    def count(self) -> Tensor:
        """(B, H) int32: pages of a head."""
        return self.layout[1]

    @property
    def start(self) -> Tensor:
        """(B, H) int32: empty slots in front of a head's first token."""
        return self.layout[2]

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
        if self.even:
            return self.row_pages // self.layout.shape[2]
        return int((self.count if self.asked is None else self.asked.get()).max())

    @cached_property
    def places(self) -> Places:
        """Where the pages of all rows lie among the `slots` of all heads."""
        return Places.of(self.layout, self.row_pages, self.slots)

    @cached_property
    def slots(self) -> int:
        """Slots that each head has when unpacked: those of `most` pages or, where heads differ, of a few more.

        Numbers of pages that differ from layer to layer, and from one eviction to the next, would be new shapes again
        and again, and what is launched over a new shape takes the host several times as long (`launch.py`). So they are
        rounded up, to one of 8 numbers in every doubling.
        """
        if self.even:
            return self.most * PAGE
        return max(-(-self.most // self._step) * self._step * PAGE, self.least)

    @property
    def _step(self) -> int:
        """Pages: numbers of slots are multiples of so many."""
        return max((1 << self.most.bit_length()) // 16, 1)

    def valid(self, more: int = 0) -> Tensor:
        """(B, H, slots + more) bool, False for empty slots; `more` others behind them are all in use."""
        slot = torch.arange(-self.slots, more, device=self.start.device)
        return slot >= torch.sub(self.start, self.count, alpha=PAGE)[..., None]

    def followed_by(
        self, newest: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values unpacked, (B, H, slots, *), and behind them others and new ones, in the dtype of these.

        Each head's slots lie at the end of its pages; the empty ones in front are zeros.
        """
        front = self.slots
        key, value = append(newest, new or (newest[0][:, :, :0], newest[1][:, :, :0]), front=front)
        unpack(self.keys, self.values, self.layout, (key[:, :, :front], value[:, :, :front]))
        return key, value

    def rows(self, index: Tensor) -> Pages:
        """A copy with the rows `index` (N,), in that order."""
        layout = self.layout.index_select(1, index.to(self.layout.device))
        return Pages(self.keys.rows(index), self.values.rows(index), layout, self.even, least=self.least)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        codes = {"keys": self.keys, "values": self.values}
        named = {f"{kind}.{name}": t for kind, c in codes.items() for name, t in c.tensors().items()}
        return named | {"layout": self.layout}

    def plain(self) -> Pages:
        """The same in the order of bytes that all devices know; on a CPU a copy, where there are strips."""
        return replace(self, keys=self.keys.plain(), values=self.values.plain())
