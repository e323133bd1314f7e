"""Evictions between the replays of a decoding step: from the second on, a replay of a CUDA graph of their own.

Layers that hold a bound evict again and again in the same buffers, from the same length to the same length, and all at
the same token: what is launched then differs in nothing but what lies in the buffers. One eviction is launched kernel
by kernel, which compiles what must be compiled; the next one like it is captured, and those that follow are replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from pyramidkv.storage import Storage

if TYPE_CHECKING:
    from pyramidkv.layer import PyramidKVLayer


class Record(Protocol):
    """Captures work on a device after some runs of it; gives what replays it."""

    def __call__(self, work: Callable[[], None], device: torch.device, warm_ups: int) -> Callable[[], None]: ...


class Evictions:
    """Makes room in the layers of one cache after another."""

    def __init__(self, record: Record) -> None:
        self.captures = 0
        self._record = record
        self._launched: Hashable = None  # the work of the last eviction that was not replayed
        self._captured: Hashable = None  # the work of the graph
        self._replay: Callable[[], None] | None = None

    def run(self, due: Sequence[tuple[PyramidKVLayer, list[int]]]) -> None:
        """Evict in each of these layers, down to that many tokens of each row."""
        work = _work(due)
        if work is None or work not in (self._captured, self._launched):
            for layer, held in due:
                layer.evict_decoded(held)
            self._launched = work
            return
        if self._replay is None or work != self._captured:
            self._replay, self._captured = None, None  # its memory goes first
            self._replay, self._captured = self._capture(due), work
        self._replay()
        for layer, held in due:
            assert isinstance(layer.storage, Storage)
            layer.storage.cut(max(held), padded=False)
            layer.evicted(held)

    def close(self) -> None:
        """Let the graph go."""
        self._launched = self._captured = self._replay = None

    def _capture(self, due: Sequence[tuple[PyramidKVLayer, list[int]]]) -> Callable[[], None]:
        still = [(_still(layer), held) for layer, held in due]

        def work() -> None:
            for layer, held in still:
                assert isinstance(layer.storage, Storage)
                layer.storage.compact(layer.survivors(held))

        self.captures += 1
        return self._record(work, still[0][0].storage.keys.device, 0)  # type: ignore[union-attr]


def _work(due: Sequence[tuple[PyramidKVLayer, list[int]]]) -> Hashable:
    """All that the launches of an eviction depend on; None if that is more than numbers."""
    found = [_work_of(layer, held) for layer, held in due]
    return None if None in found else tuple(found)


def _work_of(layer: PyramidKVLayer, held: list[int]) -> Hashable:
    storage, ring, scorer = layer.storage, layer.ring, layer.scorer
    if not isinstance(storage, Storage) or storage.padded or len(set(held)) > 1 or layer.plan.config.packs(layer.rank):
        return None  # launches follow the rows, or memory is asked for
    if not vars(type(scorer)).get("replays", False):
        return None
    queries = None if ring is None else (ring.queries.data_ptr(), ring.queries.shape, ring.count)
    buffers = tuple((buffer.data_ptr(), buffer.shape) for buffer in storage.buffers())
    return layer.layer, held[0], storage.length, buffers, queries, layer.scaling


def _still(layer: PyramidKVLayer) -> PyramidKVLayer:
    """The layer as it is now, over the same memory, whatever becomes of it."""
    same = copy.copy(layer)
    same.storage, same.ring = copy.copy(layer.storage), copy.copy(layer.ring)
    return same
