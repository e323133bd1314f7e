"""Evictions between the replays of a decoding step: from the second on, a replay of a CUDA graph of their own.

A layer that holds a bound evicts again and again where it lies, from as many slots to as many: what is launched then
differs in nothing but what lies on the device. One eviction is launched kernel by kernel, which compiles what must be
compiled; the next one like it is captured, and those that follow are replayed. Each layer has graphs of its own, since
one whose heads come to need more pages than any did before is launched anew, while those of the others serve. Replays
of neighbours run side by side, on two streams.

Replays leave the host little to do, and it must be quick: the device has ended a layer in 0.2 ms. So a work is known by
the objects that it is over and a few numbers, and whether it may be replayed at all is asked once. The host takes note
when all have been begun.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyramidkv.decode.identity import remember, same
from pyramidkv.decode.lanes import LANES, Lanes
from pyramidkv.ops.read_back import ReadBack
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


@dataclass
class _Known:
    """What a layer has done over the same memory: works launched once and, of those that came again, graphs."""

    memory: list[weakref.ref[Any]]
    replays: dict[Hashable, Callable[[], None] | None] = field(default_factory=dict)


class Evictions:
    """Makes room in the layers of one cache after another."""

    def __init__(self, record: Record) -> None:
        self.captures = 0  # of all layers
        self.launched = 0  # evictions of a layer that were neither captured nor replayed
        self._record = record
        self._known: dict[int, _Known] = {}  # of each layer
        self._lanes = Lanes()
        self._pools: dict[int, Any] = {}  # memory of all graphs of a lane: its layers come one after another
        self._back: Tensor | None = None  # (2, B, R / 2): where graphs find what turns keys back, for all layers
        self._turned: Turn | None = None  # what lies there

    def run(self, due: Iterable[tuple[PyramidKVLayer, list[int]]]) -> None:
        """Evict in each of these layers, down to that many tokens of each row; each is begun before the next is due."""
        replayed = []
        try:
            for layer, held in due:
                if self._replay(layer, held):
                    replayed.append((layer, held))
        finally:  # whatever went wrong with another layer
            self._lanes.join()
            _take_note(replayed)

    def _replay(self, layer: PyramidKVLayer, held: list[int]) -> bool:
        """Evict in one layer; True if that was a replay, of which the layer is yet to take note."""
        self._refresh(layer)
        layer.widen()
        memory, numbers = self._memory(layer), _numbers(layer, held)
        known = self._known.get(layer.layer)
        if known is not None and not same(known.memory, memory):
            known = None
        if known is None or numbers not in known.replays:
            if _comes_again(layer, held):
                if known is None:  # graphs over other memory go
                    known = self._known[layer.layer] = _Known(remember(memory))
                known.replays[numbers] = None
            layer.evict_decoded(held)
            self.launched += 1
            return False
        replay = known.replays[numbers]
        if replay is None:
            replay = known.replays[numbers] = self._capture(layer, held)
        assert layer.storage is not None
        self._lanes.run(replay, layer.layer % LANES, layer.storage.newest.keys.device)
        return True

    def close(self) -> None:
        """Let the graphs go."""
        self._known, self._pools, self._back, self._turned = {}, {}, None, None

    def _refresh(self, layer: PyramidKVLayer) -> None:
        """Have what turns keys back by as many tokens as there are where the graphs look for it."""
        now = layer.back()
        if now is None:
            return
        if self._back is None or self._back.shape[1:] != now[0].shape or self._back.device != now[0].device:
            self._back, self._turned = now[0].new_empty(2, *now[0].shape), None
        if self._turned is None or self._turned[0] is not now[0]:  # all layers get the same tensors
            self._lanes.join()  # where a replay may still read
            torch._foreach_copy_(list(self._back.unbind()), list(now))
            self._turned = now

    def _memory(self, layer: PyramidKVLayer) -> list[Any]:
        """All that an eviction reads or writes, by the objects that hold it; none of them ever lies elsewhere."""
        storage, ring = layer.storage, layer.ring
        assert storage is not None
        memory: list[Any] = [layer.plan, *storage.newest.buffers()]
        if ring is not None:
            memory.append(ring.queries)
        if isinstance(storage, PackedStorage):
            pages = storage.pages
            memory += [pages.keys, pages.values, pages.layout, storage.bitmap]
        if layer.rotary is not None:
            memory.append(self._back)
        return memory

    def _capture(self, layer: PyramidKVLayer, held: list[int]) -> Callable[[], None]:
        still = _still(layer)
        assert still.storage is not None
        back = None if layer.rotary is None or self._back is None else (self._back[0], self._back[1])
        device = still.storage.newest.keys.device
        lane = layer.layer % LANES
        if lane not in self._pools:
            self._pools[lane] = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captures += 1
        return self._record(lambda: still.thin(held, back), device, 0, self._pools[lane])


def _numbers(layer: PyramidKVLayer, held: list[int]) -> Hashable:
    """What the launches of an eviction depend on besides memory, and whether they can be replayed."""
    storage, ring = layer.storage, layer.ring
    assert storage is not None
    new, slots = storage.newest, storage.pages.slots if isinstance(storage, PackedStorage) else 0
    return *held, *layer.held, new.length, new.padded, slots, ring and ring.count, layer.scaling


def _comes_again(layer: PyramidKVLayer, held: list[int]) -> bool:
    """Whether an eviction can be replayed where memory and numbers are the same: if it depends on nothing else."""
    assert layer.storage is not None
    if layer.storage.newest.padded or len(set(held)) > 1 or len(set(layer.held)) > 1:
        return False  # launches follow the rows
    return vars(type(layer.scorer)).get("replays", False) and layer.stays(held)


def _take_note(replayed: Sequence[tuple[PyramidKVLayer, list[int]]]) -> None:
    """Have each layer know what it keeps; how many pages each head has comes to the host in one copy for all."""
    counts = [_pages_to_count(layer) for layer, _ in replayed]
    for (layer, held), asked in zip(replayed, ReadBack.together(counts), strict=True):
        layer.evicted(held, asked=asked)


def _pages_to_count(layer: PyramidKVLayer) -> Tensor | None:
    """Pages of each head, (B, H), if they may have changed; None: they are as many as ever."""
    storage = layer.storage
    return storage.pages.count if isinstance(storage, PackedStorage) and not storage.pages.even else None


def _still(layer: PyramidKVLayer) -> PyramidKVLayer:
    """The layer as it is now, over the same memory, whatever becomes of it."""
    same = copy.copy(layer)
    same.storage, same.ring = copy.copy(layer.storage), copy.copy(layer.ring)
    if isinstance(same.storage, PackedStorage):
        same.storage.new = copy.copy(same.storage.new)
    return same
