"""A large batch is prefilled a few rows at a time: what a layer computes of a prompt then needs memory for those alone.

Rows do not see each other. Each group of them fills a cache of its own, which is compressed when its forward ends; then
the groups become one cache, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyramidkv.layer import PyramidKVLayer
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import Codes
from pyramidkv.packed import PackedStorage
from pyramidkv.ring import QueryRing
from pyramidkv.storage import Storage

if TYPE_CHECKING:
    from pyramidkv.cache import PyramidKVCache

TOGETHER = 12288  # tokens, padding included: enough to keep a GPU busy


def row_groups(rows: int, tokens: int, together: int = TOGETHER) -> list[slice]:
    """The fewest groups of at most `together` tokens, or of one row; all have as many rows, or one more."""
    number = min(rows, -(-rows // max(together // tokens, 1)))
    ends = [rows * (i + 1) // number for i in range(number)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def can_group(cache: PyramidKVCache, inputs: dict[str, Any]) -> bool:
    """Whether a forward with these inputs is a prompt whose rows may go one group after another into an empty cache."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if not all(isinstance(layer, PyramidKVLayer) and not layer.drafts for layer in cache.layers) or cache.records_past:
        return False
    if mask is not None and (mask.ndim != 2 or mask.shape != ids.shape):
        return False
    # Padded rows may leave some groups with pages and others without.
    return not cache.config.packs or mask is None or bool(mask.all())


def prefill_rows(
    forward: Callable[..., Any], cache: PyramidKVCache, inputs: dict[str, Any], groups: Sequence[slice]
) -> Tensor:
    """Feed a prompt (B, T) to an empty cache, one group of rows after another; returns the logits (B, N, V)."""
    parts, logits = [], []
    for rows in groups:
        part = cache.empty()
        for layer, whole in zip(part.layers, cache.layers, strict=True):
            layer.expected = whole.expected[rows]
        own = {
            name: value[rows] if isinstance(value, Tensor) and value.ndim == 2 and len(value) > 1 else value
            for name, value in inputs.items()
        }
        logits.append(forward(**{**own, "past_key_values": part, "return_dict": True}).logits)
        parts.append(part)
    for layer in cache.layers:
        join(layer, [part.layers[layer.layer] for part in parts])
    return torch.cat(logits)


def join(layer: PyramidKVLayer, parts: Sequence[PyramidKVLayer]) -> None:
    """Make an empty layer hold the rows of `parts`, which have seen as many columns each and are left empty."""
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
    storages = [part.storage for part in parts]
    for part in parts:
        part.storage = None
    new = join_storages([s.newest for s in storages if s is not None], layer.pool)
    packed = [s for s in storages if isinstance(s, PackedStorage)]
    layer.storage = new
    if packed:
        bitmap = torch.cat([s.bitmap for s in packed])
        layer.storage = PackedStorage(join_pages([s.pages for s in packed]), bitmap, new)


def _offset(part: PyramidKVLayer) -> Tensor:
    assert part.storage is not None
    empty = torch.zeros(len(part.counts), 1, 1, dtype=torch.int32, device=part.storage.newest.keys.device)
    return empty if part.offset is None else part.offset


def join_storages(parts: Sequence[Storage], pool: Any = None) -> Storage:
    """One storage of the rows of all; a part with fewer slots gets empty ones in front."""
    width = max(part.length for part in parts)
    room = max(part.capacity - part.length for part in parts)
    rows = sum(part.spec.rows for part in parts)
    key, value = (t[:1].expand(rows, -1, -1, -1) for t in (parts[0].keys, parts[0].values))
    new = Storage.allocate(key, value, width + room, any(part.padded for part in parts), parts[0].dtype, pool)
    new.length = width
    at = 0
    for part in parts:
        here = slice(at, at + part.spec.rows)
        empty = width - part.length
        for to, source, nothing in zip(new.buffers(), part.buffers(), (0, 0, -1), strict=True):
            to[here, :, :empty] = nothing
            to[here, :, empty:width] = source[:, :, : part.length]
        new.padded |= empty > 0
        at = here.stop
    if new.padded:
        new.start = (new.positions[:, :, :width] < 0).sum(-1, dtype=torch.int32)
    return new


def join_pages(parts: Sequence[Pages]) -> Pages:
    """The pages of the rows of all, which have as many pages a row each."""
    keys, values = (_join_codes([getattr(part, name) for part in parts]) for name in ("keys", "values"))
    begin, count, start = (torch.cat([getattr(part, name) for part in parts]) for name in ("first", "count", "start"))
    return Pages(keys, values, begin, count, start, parts[0].even)


def _join_codes(parts: Sequence[Codes]) -> Codes:
    tensors = {name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
    return Codes(tensors["codes"], tensors.get("scale"), tensors.get("zero"), parts[0].bits)
