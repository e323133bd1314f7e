"""A forward that did not finish (an error, Ctrl-C, no memory left) must not leave a cache half filled.

Some layers then hold the new tokens and others do not. Each layer remembers where it was when new tokens came, in a few
numbers that keep no tensor alive, and the next forward begins by putting the layers back. That works for a prompt and
for decoded tokens; where a layer has evicted for a further turn, what it held is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from pyramidkv.ring import SPARE

if TYPE_CHECKING:
    from pyramidkv.layer import PyramidKVLayer
    from pyramidkv.packed import PackedStorage
    from pyramidkv.storage import Storage


class Before(NamedTuple):
    """Where a layer was when the tokens of a forward came."""

    seen: int
    counts: list[int]
    held: list[int]
    offset: Tensor | None
    storage: weakref.ref[Storage | PackedStorage] | None  # None: empty
    length: int
    queries: int  # counted in its ring


def remember(layer: PyramidKVLayer) -> Before:
    """Where a layer is."""
    storage = layer.storage
    return Before(
        layer.seen,
        layer.counts,
        layer.held,
        layer.offset,
        None if storage is None else weakref.ref(storage),
        0 if storage is None else storage.length,
        0 if layer.ring is None else layer.ring.count,
    )


def reached(layers: Sequence[PyramidKVLayer], seen: int) -> list[PyramidKVLayer]:
    """The layers that hold something of a forward that did not finish; `seen` columns had been seen before it."""
    return [layer for layer in layers if layer.seen != seen or _moved(layer, seen)]


def _moved(layer: PyramidKVLayer, seen: int) -> bool:
    """Whether a layer that does not count the new tokens has begun to take them."""
    before, storage = layer.before, layer.storage
    if before is None or before.seen != seen:  # of an earlier forward, which has finished
        return False
    if (layer.counts, layer.held) != (before.counts, before.held):
        return True
    if storage is None or before.storage is None:
        return (storage is None) != (before.storage is None)
    return storage is not before.storage() or storage.length != before.length


def undoable(layer: PyramidKVLayer, seen: int) -> bool:
    """Whether a layer still has what it had then."""
    before = layer.before
    if before is None or before.seen != seen:
        return False
    return before.storage is None or (layer.storage is not None and layer.storage is before.storage())


def undo(layer: PyramidKVLayer) -> None:
    """Put a layer back to where it was."""
    before, storage = layer.before, layer.storage
    assert before is not None
    if before.storage is None or storage is None:
        layer.reset()
        return
    new = storage.length - before.length
    storage.crop(new)
    if layer.ring is not None and new <= SPARE:  # that many have not touched the oldest query
        layer.ring.count = before.queries
    elif layer.ring is not None:
        layer.ring.drop(new)
    layer.seen, layer.counts, layer.held, layer.offset = before[:4]
    layer.before = None
