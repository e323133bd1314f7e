"""A large batch is prefilled a few rows at a time: what a layer computes of a prompt then needs memory for those alone.

Rows do not see each other. Each group of them fills a cache of its own, which is compressed when its forward ends; then
the groups become one cache, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.layer import PyramidKVLayer
from pyramidkv.ops.pages import Pages, PageShape
from pyramidkv.packed import PackedStorage
from pyramidkv.plan import limits, shared_pages
from pyramidkv.pool import Buffers, Pool
from pyramidkv.ring import QueryRing
from pyramidkv.storage import Storage

if TYPE_CHECKING:
    from pyramidkv.cache import PyramidKVCache

TOGETHER = 24576  # tokens, padding included: enough to keep a GPU busy


def rows_together(tokens: int, together: int = TOGETHER) -> int:
    """The most rows of `tokens` tokens that are prefilled at once."""
    return max(together // tokens, 1)


def row_groups(rows: int, tokens: int, together: int = TOGETHER) -> list[slice]:
    """The fewest groups of at most `together` tokens, or of one row; all have as many rows, or one more."""
    number = min(rows, -(-rows // rows_together(tokens, together)))
    ends = [rows * (i + 1) // number for i in range(number)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def can_group(cache: PyramidKVCache, inputs: dict[str, Any]) -> bool:
    """Whether a forward with these inputs is a prompt whose rows may go one group after another into an empty cache."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    ours = (isinstance(x, PyramidKVLayer) and not x.drafts and not x.expected for x in cache.layers)
    if not all(ours) or cache.records_past:
        return False
    return mask is None or (mask.ndim == 2 and mask.shape == ids.shape)


def prefill_rows(
    forward: Callable[..., Any], cache: PyramidKVCache, inputs: dict[str, Any], groups: Sequence[slice]
) -> Tensor:
    """Feed a prompt (B, T) to an empty cache, one group of rows after another; returns the logits (B, N, V)."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counts = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    lenders = [Lender(layer, counts) for layer in cache.layers]
    parts, logits = [], []
    for rows in groups:
        part = cache.empty()
        for layer, lender in zip(part.layers, lenders, strict=True):
            layer.among, layer.pool = (counts, rows.start), lender
        own = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim == 2 and len(value) > 1 else value
            for name, value in inputs.items()
        }
        logits.append(forward(**{**own, "past_key_values": part, "return_dict": True}).logits)
        parts.append(part)
    for layer, lender in zip(cache.layers, lenders, strict=True):
        join(layer, [part.layers[layer.layer] for part in parts], lender)
    return torch.cat(logits)


class Lender:
    """Gives each group of rows, in order, its part of the buffers of the whole batch, where those are to be pooled.

    `layer` is that of the whole batch, whose rows have `counts` real tokens.
    """

    def __init__(self, layer: PyramidKVLayer, counts: Sequence[int]) -> None:
        self.pool: Pool | None = layer.pool
        self.whole: Storage | None = None
        self.pages: Pages | None = None
        self._layer = layer
        self._counts = counts
        self._rows = len(counts)
        self._lent = self._paged = 0

    def take(self, key: torch.Size, value: torch.Size, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Buffers for the next rows, of shapes (R, H, C, D) and (R, H, C, Dv) or of a larger C."""
        if self.whole is None:
            one = torch.empty(1, 1, 1, 1, dtype=dtype, device=device)
            like_key, like_value = (one.expand(self._rows, s[1], 1, s[3]) for s in (key, value))
            self.whole = Storage.allocate(like_key, like_value, key[2], padded=False, pool=self.pool)
        here = slice(self._lent, self._lent + key[0])
        self._lent = here.stop
        keys, values, positions = (t[here] for t in self.whole.buffers())
        return keys, values, positions

    def lend(self, holder: object, buffers: Buffers) -> None:
        """The whole goes back to the pool, not its parts."""

    def take_pages(self, shape: PageShape, rows: int) -> Pages:
        """Room for the pages of the next rows, which may need fewer than others of the batch."""
        if self.pages is None:
            shape = shape._replace(pages=self._row_pages(shape))
            free = None if self.pool is None else self.pool.take_pages(shape, self._rows)
            self.pages = shape.room(self._rows) if free is None else free
        here = slice(self._paged, self._paged + rows)
        self._paged = here.stop
        return self.pages.part(here)

    def take_bitmap(self, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
        """None: the bitmaps of all rows are put together in `join`."""

    def lend_packed(self, holder: object, pages: Pages, bitmap: Tensor) -> None:
        """As `lend`."""

    def _row_pages(self, shape: PageShape) -> int:
        """Pages that a row of the whole batch has."""
        plan, rank, counts = self._layer.plan, self._layer.rank, self._counts
        assert self.whole is not None  # the newest slots, which come first
        allowed = limits(plan, rank, counts, itemsize=self.whole.dtype.itemsize)
        held = [min(pair) for pair in zip(counts, allowed, strict=True)]
        return shared_pages(plan.config, shape.heads, held, counts) or shape.pages


def join(layer: PyramidKVLayer, parts: Sequence[PyramidKVLayer], lender: Lender) -> None:
    """Make an empty layer hold the rows of `parts`, which have seen as many columns each and hold as many slots."""
    first = parts[0]
    layer.start(sum(len(part.counts) for part in parts))
    layer.seen, layer.scaling = first.seen, first.scaling
    layer.settled = max(part.settled for part in parts)
    for name in ("counts", "held", "prompts"):
        setattr(layer, name, [n for part in parts for n in getattr(part, name)])
    if any(part.offset is not None for part in parts):
        layer.offset = torch.cat([_offset(part) for part in parts])
    if first.ring is not None:
        rings = [part.ring for part in parts if part.ring is not None]
        layer.ring = QueryRing(torch.cat([ring.queries for ring in rings]), first.ring.count)
    storages = [part.storage for part in parts if part.storage is not None]
    new = lender.whole
    assert new is not None
    for name in ("length", "appended"):
        setattr(new, name, getattr(storages[0].newest, name))
    new.padded = any(s.newest.padded for s in storages)
    if new.padded:
        new.start = (new.positions[:, :, : new.length] < 0).sum(-1, dtype=torch.int32)
    packed = [s for s in storages if isinstance(s, PackedStorage)]
    for part in parts:
        part.storage = None
    layer.storage = new
    if packed:
        assert lender.pages is not None
        pages = Pages(lender.pages.keys, lender.pages.values, lender.pages.layout, packed[0].pages.even)
        tokens = max(s.bitmap.shape[2] for s in packed)  # of the longest row, eight to a byte
        bitmap = torch.cat([pad(s.bitmap, (0, tokens - s.bitmap.shape[2])) for s in packed])
        free = None if layer.pool is None else layer.pool.take_bitmap((*bitmap.shape[:2], tokens), bitmap.device)
        if free is not None:  # where the last batch's lay
            free.zero_()[:, :, :tokens] = bitmap
        layer.storage = PackedStorage(pages, bitmap if free is None else free, new, layer.pool)


def _offset(part: PyramidKVLayer) -> Tensor:
    assert part.storage is not None
    empty = torch.zeros(len(part.counts), 1, 1, dtype=torch.int32, device=part.storage.newest.keys.device)
    return empty if part.offset is None else part.offset
