"""Buffers that outlive a cache, so that the next prompt's cache lies where a captured graph looks for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidkv.ops.pages import Pages, PageShape

Buffers = tuple[Tensor, Tensor, Tensor]  # keys (B, H, C, D), values (B, H, C, Dv), positions (B, H, C) int32


class Lease:
    """Gives something back when nobody uses its holder any more."""

    def __init__(self, holder: object, back: Callable[[Any], None], what: object) -> None:
        self._back = back
        self._end = weakref.finalize(holder, back, what)
        self._end.atexit = False

    def instead(self, holder: object, what: object) -> Lease:
        """The lease of something else in the place of what was lent, which may go."""
        self._end.detach()
        return Lease(holder, self._back, what)


class Pool:
    """The buffers of one layer, lent to one holder at a time for as long as that is in use; and so what it packs."""

    def __init__(self) -> None:
        self._free: Buffers | None = None
        self._pages: Pages | None = None
        self._bitmap: Tensor | None = None
        self._open = True

    def take(self, key: torch.Size, value: torch.Size, dtype: torch.dtype, device: torch.device) -> Buffers | None:
        """The free buffers if they serve for shapes (B, H, C, D) and (B, H, C, Dv); if they do not, they are given up.

        A capacity up to twice what is asked for serves: prompts of a varying length share one graph.
        """
        free, self._free = self._free, None
        if free is None:
            return None
        keys, values, _ = free
        alike = keys.dtype == dtype and keys.device == device
        for have, want in ((keys.shape, key), (values.shape, value)):
            alike = alike and (*have[:2], have[3]) == (*want[:2], want[3]) and want[2] <= have[2] <= 2 * want[2]
        return free if alike else None

    def lend(self, holder: object, buffers: Buffers) -> Lease:
        """Have buffers back when nobody uses their holder any more."""
        return Lease(holder, self._give, buffers)

    def take_pages(self, shape: PageShape, rows: int) -> Pages | None:
        """The free pages if they have room for as many rows of that shape; if not, they are given up."""
        free, self._pages = self._pages, None
        return free if free is not None and free.serves(shape, rows) else None

    def take_bitmap(self, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """The free bitmap if it serves for (B, H, bytes), up to four times as many bytes; if not, it is given up."""
        free, self._bitmap = self._bitmap, None
        if free is None or free.device != device or free.shape[:2] != shape[:2]:
            return None
        return free if shape[2] <= free.shape[2] <= 4 * shape[2] else None

    def lend_packed(self, holder: object, pages: Pages, bitmap: Tensor) -> Lease:
        """Have pages and bitmap back when nobody uses their holder any more."""
        return Lease(holder, self._give_packed, (pages, bitmap))

    def close(self) -> None:
        """Keep nothing from now on."""
        self._free, self._pages, self._bitmap, self._open = None, None, None, False

    def __deepcopy__(self, _: object) -> Pool:
        return self  # a forked cache may take from it too

    def _give(self, buffers: Buffers) -> None:
        if self._open:
            self._free = buffers

    def _give_packed(self, packed: tuple[Pages, Tensor]) -> None:
        if self._open:
            self._pages, self._bitmap = packed
