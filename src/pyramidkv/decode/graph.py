"""`DecodeGraph`: the decoding step of a model, captured in one CUDA graph and replayed for every token.

A replay costs the host a few microseconds where a forward costs it milliseconds. The graph reads lengths from the
device and buffers where it found them, so it serves as long as the buffers stay where they are: for all tokens of a
prompt, and for the next prompt where its cache lies in the same ones (`pool.py`). The numbers that Python keeps of
every layer are brought up to date after each replay, while the device works. One replay may be under way before it is
asked for (`ahead.py`): it writes into slots that are free, so that forgetting it takes no more than a length.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyramidkv.config import CompressionConfig
from pyramidkv.decode.ahead import Ahead
from pyramidkv.decode.compiled import compiled_step
from pyramidkv.decode.evictions import Evictions
from pyramidkv.decode.identity import remember, same
from pyramidkv.decode.lanes import aside
from pyramidkv.decode.step import PLACES, Place, Step, StepCache, step_of
from pyramidkv.errors import UnsupportedError
from pyramidkv.ops import kernels
from pyramidkv.ops.pages import Pages
from pyramidkv.packed import PackedStorage
from pyramidkv.parallel import ranks_of
from pyramidkv.pool import Pool
from pyramidkv.ring import QueryRing
from pyramidkv.shape import cache_shape
from pyramidkv.storage import Storage

if TYPE_CHECKING:
    from pyramidkv.cache import PyramidKVCache
    from pyramidkv.layer import PyramidKVLayer

WARM_UPS = 2  # runs before a capture: kernels are compiled and libraries set up in them


def record(
    work: Callable[[], object], device: torch.device, warm_ups: int = WARM_UPS, pool: Any = None
) -> Callable[[], None]:
    """What replays a CUDA graph of `work`, which runs `warm_ups` times beforehand.

    With a `pool` (`torch.cuda.graph_pool_handle`), its memory is that of other graphs, which run before it or after.
    """
    stream = aside(device)
    assert stream is not None
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream), torch.no_grad():
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def why_eager(model: Any, config: CompressionConfig) -> str | None:
    """Why the steps of a model can't be captured; None if they can."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        return f"the model lies on {len(devices)} devices"
    (device,) = devices
    if device.type != "cuda":
        return f"the model is on {device.type}, and graphs are for CUDA"
    if ranks_of(model) > 1:
        return "the model is split over several GPUs"
    if (why := kernels.why_naive(torch.empty(1, 1, 1, kernels.LARGEST, device=device, dtype=model.dtype))) is not None:
        return why
    shape = cache_shape(model.config)
    if len(shape.compressed) < len(shape.layers):
        return "some layers have a sliding window, and those are not compressed"
    if config.kv_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        return f"kv_dtype={config.kv_dtype!r} is not what the model computes in"
    return None


def can_capture(model: Any, config: CompressionConfig) -> bool:
    """Whether a session captures its steps. Raises `UnsupportedError` if it can't and `config.decode` asks for it."""
    why = "asked for" if config.decode == "eager" else why_eager(model, config)
    if why is not None and config.decode in ("graph", "compiled"):
        raise UnsupportedError(f"decode={config.decode!r}: {why}; use decode='auto' or 'eager'")
    return why is None


@dataclass
class _Captured:
    """A graph and the tensors that it reads and writes, at fixed addresses."""

    ids: Tensor  # (B, 1) int64; a replay leaves its likeliest token
    positions: Tensor  # (B, 1) int64; a replay adds one
    lengths: Tensor  # (layers, 1) int32: slots in use; a replay adds one
    starts: list[Tensor]  # (B, Hkv) int32 a layer: empty slots at the front
    logits: Tensor  # (B, 1, V)
    replay: Callable[[], None]
    foreseen: Tensor  # (2, B, 1) int64: what ids and positions the next token would have


class DecodeGraph:
    """The captured step of one session.

    Args:
        model: a `transformers` causal language model on one CUDA device.
        forward: its forward, as it was before the session took its place.
        layers: number of its layers, all of them compressed.
        compiled: run the step through `torch.compile` before capturing it.
    """

    def __init__(self, model: Any, forward: Callable[..., Any], layers: int, *, compiled: bool) -> None:
        self.pools = [Pool() for _ in range(layers)]
        self.captures = 0  # how often a step has been captured
        self._model = model
        self._forward = forward
        self._compiled = compiled
        self._captured: _Captured | None = None
        self._keys: list[weakref.ref[Tensor]] = []  # of the buffers in the graph, or of those seen at the last token
        self._storages: list[weakref.ref[Storage]] = []  # those that the device knows
        self._lengths: list[int] = []  # what it knows of them
        self._ahead = Ahead()
        self.evictions = Evictions(record)
        self._held: list[Storage] = []  # kept alive for the replay that runs ahead
        self._rings: dict[int, tuple[Tensor, weakref.ref[QueryRing]]] = {}  # of each layer, and who uses it

    def step(self, cache: PyramidKVCache, ids: Tensor, positions: Tensor | None) -> Tensor | None:
        """Logits (B, 1, V) of one new token a row, (B, 1); None if this token must go the usual way.

        That is so for the first token over new buffers: a graph is captured for those that stay.
        """
        layers: list[PyramidKVLayer] = cache.layers
        if positions is None:
            positions = torch.full_like(ids, cache.get_seq_length())
        asked = torch.stack((ids, positions.expand_as(ids)))
        right = self._foreseen(asked)  # before evictions are launched, since it waits for the device
        storages = self._ready(layers)
        if storages is None:
            self.settle()
            return None
        lengths = [s.length for s in storages]
        if self._captured is None:
            self._captured = self._capture(layers, storages, ids)
        elif lengths != self._lengths or not same(self._storages, storages):
            self.settle()
            self._inform(self._captured, layers, storages)
        at = self._captured
        self._ahead.judge(right)
        self._lengths = []  # not known, should anything go wrong from here on
        if self._ahead.running and right:
            self._ahead.join()
        else:
            self.settle()
            torch._foreach_copy_([at.ids, at.positions], list(asked))
            at.replay()
        logits = at.logits.clone()
        at.foreseen = torch.stack((at.ids, at.positions))
        for layer in layers:
            layer.advance()
        if self._ahead.pays and all(s.length < s.capacity for s in storages) and not any(x.crowded for x in layers):
            self._held = storages
            self._ahead.start(at.replay, aside(ids.device))
        self._lengths = [length + 1 for length in lengths]
        return logits

    def _foreseen(self, asked: Tensor) -> bool:
        """Whether the last replay has left the ids and positions that are asked for now, (2, B, 1)."""
        at = self._captured
        return at is not None and at.foreseen.device == asked.device and torch.equal(asked, at.foreseen)

    def settle(self) -> None:
        """Before anything but the next step is done with the cache: let no replay be under way."""
        if self._ahead.running:
            self._ahead.settle()
            if self._captured is not None:
                self._captured.lengths -= 1  # the token that it wrote is in a slot that is free
        self._held = []

    def _ready(self, layers: list[PyramidKVLayer]) -> list[Storage] | None:
        """The buffers to write a token into, with a free slot each; None if this token must go the usual way."""
        due = ((layer, held) for layer in layers if (held := layer.overfull(1)) is not None)
        if (first := next(due, None)) is not None:
            self.settle()
            self.evictions.run(itertools.chain((first,), due))
        if any(layer.storage is None for layer in layers):
            return None
        for layer in layers:
            if layer.ring is not None:
                self._lodge(layer.layer, layer.ring)
        storages = [layer.storage.newest for layer in layers if layer.storage is not None]
        if any(s.holes for s in storages):
            return None
        free = min(s.capacity - s.length for s in storages)
        rings = [layer.ring.queries for layer in layers if layer.ring is not None]
        packed = [pages.keys.codes for pages in map(_pages, layers) if pages is not None]
        used = [s.keys for s in storages] + rings + packed
        if not same(self._keys, used):
            self.settle()
            self._captured, self._keys = None, remember(used)
            return None
        if free == 0 or (self._captured is None and free <= WARM_UPS):
            return None
        return storages

    def _lodge(self, layer: int, ring: QueryRing) -> None:
        """Have the ring of another prompt lie where that of the last one did, if nobody uses that any more."""
        home, user = self._rings.get(layer, (ring.queries, lambda: None))
        if user() is ring and home is ring.queries:
            return
        self.settle()
        alike = (home.shape, home.dtype, home.device) == (ring.queries.shape, ring.queries.dtype, ring.queries.device)
        if home is not ring.queries and alike and user() is None:
            ring.queries = home.copy_(ring.queries)
        self._rings[layer] = ring.queries, weakref.ref(ring)

    def close(self) -> None:
        """Let graph and buffers go."""
        self.settle()
        self._captured, self._keys, self._storages, self._rings = None, [], [], {}
        self.evictions.close()
        for pool in self.pools:
            pool.close()

    def _inform(self, at: _Captured, layers: list[PyramidKVLayer], storages: list[Storage]) -> None:
        """Give the device what it must know of these storages: lengths, empty slots, positions of tokens to come."""
        self._lengths = [s.length for s in storages]
        self._storages = remember(storages)
        at.lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32)[:, None])
        torch._foreach_zero_(at.starts)
        free = [s.capacity - s.length for s in storages]
        positions = layers[0].to_come(max(free))  # all layers have seen the same tokens
        for storage, start, slots in zip(storages, at.starts, free, strict=True):
            storage.positions[:, :, storage.length :] = positions[..., :slots]
            if storage.start is not None:
                start.copy_(storage.start)

    def _capture(self, layers: list[PyramidKVLayer], storages: list[Storage], ids: Tensor) -> _Captured:
        rows, device = ids.shape[0], ids.device
        run, cache = self._step(len(layers))
        at = _Captured(
            ids.clone(),
            torch.zeros_like(ids),
            torch.empty(len(layers), 1, dtype=torch.int32, device=device),
            [torch.empty(rows, s.keys.shape[1], dtype=torch.int32, device=device) for s in storages],
            torch.empty(0),
            lambda: None,
            torch.full((2, *ids.shape), -1, dtype=torch.int64, device=device),  # no token yet
        )
        self._inform(at, layers, storages)

        def work() -> None:
            at.logits = run(at.ids, at.positions)
            at.lengths += 1
            at.positions += 1
            at.ids.copy_(at.logits[:, -1].argmax(-1, keepdim=True))

        places = {
            place: Place(
                s.keys, s.values, length, start, _pages(layer), layer.ring.queries if layer.ring is not None else None
            )
            for place, s, layer, length, start in zip(
                cache.places, storages, layers, at.lengths, at.starts, strict=True
            )
        }
        PLACES.update(places)
        try:
            at.replay = record(work, device)
        finally:
            for place in places:
                PLACES.pop(place, None)
        self._inform(at, layers, storages)  # the warm-ups have counted, and written into slots that are free
        self.captures += 1
        return at

    def _step(self, layers: int) -> tuple[Step, StepCache]:
        if not self._compiled:
            cache = StepCache(layers)
            return step_of(self._forward, cache), cache
        kept = compiled_step(self._model, self._forward, layers)
        return kept.step, kept.cache


def _pages(layer: PyramidKVLayer) -> Pages | None:
    """What a layer has packed."""
    return layer.storage.pages if isinstance(layer.storage, PackedStorage) else None
