"""Evictions between the replays of a decoding step: from the second on, a replay of a CUDA graph of their own.

A layer that holds a bound evicts again and again where it lies, from as many slots to as many: what is launched then
differs in nothing but what lies on the device. One eviction is launched kernel by kernel, which compiles what must be
compiled; the next one like it is captured, and those that follow are replayed. Each layer has graphs of its own, since
one whose heads come to need more pages than any did before is launched anew, while those of the others serve.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyramidkv.packed import PackedStorage
from pyramidkv.rotary import Turn

if TYPE_CHECKING:
    from pyramidkv.layer import PyramidKVLayer


class Record(Protocol):
    """Captures work on a device after some runs of it; gives what replays it.

    Graphs that have a `pool` in common take the memory for what they compute from it, and run one after another.
    """

    def __call__(
        self, work: Callable[[], object], device: torch.device, warm_ups: int, pool: Any
    ) -> Callable[[], None]: ...


class _Work(NamedTuple):
    """All that the launches of an eviction depend on."""

    places: Hashable  # where everything lies
    numbers: Hashable


@dataclass
class _Known:
    """What a layer has done in the same places: works that were launched once, and of those that came again graphs."""

    places: Hashable
    replays: dict[Hashable, Callable[[], None] | None] = field(default_factory=dict)


class Evictions:
    """Makes room in the layers of one cache after another."""

    def __init__(self, record: Record) -> None:
        self.captures = 0  # of all layers
        self.launched = 0  # evictions of a layer that were neither captured nor replayed
        self._record = record
        self._known: dict[int, _Known] = {}  # of each layer
        self._pool: Any = None  # memory of all graphs: layers come one after another
        self._back: Tensor | None = None  # (2, B, R / 2): where graphs find what turns keys back, for all layers
        self._turned: Turn | None = None  # what lies there

    def run(self, due: Sequence[tuple[PyramidKVLayer, list[int]]]) -> None:
        """Evict in each of these layers, down to that many tokens of each row."""
        for layer, held in due:
            back = self._refresh(layer)
            work, known = _work_of(layer, held, back), self._known.get(layer.layer)
            if work is not None and (known is None or known.places != work.places):
                known = self._known[layer.layer] = _Known(work.places)  # graphs over other memory go
            if work is None or known is None or work.numbers not in known.replays:
                layer.evict_decoded(held)
                self.launched += 1
                if work is not None and known is not None:
                    known.replays[work.numbers] = None
                continue
            replay = known.replays[work.numbers]
            if replay is None:
                replay = known.replays[work.numbers] = self._capture(layer, held, back)
            replay()
            layer.evicted(held)

    def close(self) -> None:
        """Let the graphs go."""
        self._known, self._pool, self._back, self._turned = {}, None, None, None

    def _refresh(self, layer: PyramidKVLayer) -> Turn | None:
        """What turns keys back by as many tokens as there are, where the graphs look for it."""
        now = layer.back()
        if now is None:
            return None
        if self._back is None or self._back.shape[1:] != now[0].shape or self._back.device != now[0].device:
            self._back, self._turned = now[0].new_empty(2, *now[0].shape), None
        cos, sin = self._back
        if self._turned is None or self._turned[0] is not now[0]:  # all layers get the same tensors
            torch._foreach_copy_([cos, sin], list(now))
            self._turned = now
        return cos, sin

    def _capture(self, layer: PyramidKVLayer, held: list[int], back: Turn | None) -> Callable[[], None]:
        still = _still(layer)
        assert still.storage is not None
        device = still.storage.newest.keys.device
        if self._pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        self.captures += 1
        return self._record(lambda: still.thin(held, back), device, 0, self._pool)


def _work_of(layer: PyramidKVLayer, held: list[int], back: Turn | None) -> _Work | None:
    """What an eviction launches; None if that depends on more than numbers."""
    storage, ring = layer.storage, layer.ring
    if storage is None or storage.newest.padded or len(set(held)) > 1 or len(set(layer.held)) > 1:
        return None  # launches follow the rows
    if not vars(type(layer.scorer)).get("replays", False) or not layer.stays(held):
        return None
    queries = [] if ring is None else [ring.queries]
    buffers = [*queries, *storage.newest.buffers(), *([] if back is None else back)]
    slots = 0
    if isinstance(storage, PackedStorage):
        buffers += [*storage.pages.tensors().values(), storage.bitmap]
        slots = storage.pages.slots
    numbers = held[0], layer.held[0], storage.newest.length, slots, ring and ring.count, layer.scaling
    return _Work(tuple(map(_place, buffers)), numbers)


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor lies, and how."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _still(layer: PyramidKVLayer) -> PyramidKVLayer:
    """The layer as it is now, over the same memory, whatever becomes of it."""
    same = copy.copy(layer)
    same.storage, same.ring = copy.copy(layer.storage), copy.copy(layer.ring)
    if isinstance(same.storage, PackedStorage):
        same.storage.new = copy.copy(same.storage.new)
    return same
