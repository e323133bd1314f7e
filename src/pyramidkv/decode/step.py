"""What a model sees while its decoding step is captured: a cache whose lengths are on the device.

The step must be the same work for every token, so nothing in it may be a number of Python that changes. A layer here
knows only its place in `PLACES`, and the op below looks up there which buffers to use: no shape, length or address of
a buffer is part of what `torch.compile` sees, so that another prompt or capacity compiles nothing anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pyramidkv.decode.products import PRODUCTS
from pyramidkv.ops.decode_attention import decode_attention
from pyramidkv.ops.packed_attention import packed_attention
from pyramidkv.ops.pages import Pages


@dataclass(frozen=True)
class Place:
    """The buffers of one layer during a step; of a packed one, those of the newest slots."""

    keys: Tensor  # (B, Hkv, C, D)
    values: Tensor  # (B, Hkv, C, D)
    length: Tensor  # (1,) int32: slots in use before the step
    start: Tensor  # (B, Hkv) int32: empty slots at the front
    pages: Pages | None = None  # what is packed
    queries: Tensor | None = None  # (B, Hq, R, D): where the query goes too, at slot `length` modulo R (`ring.py`)


Step = Callable[[Tensor, Tensor], Tensor]  # tokens (B, 1) and positions (B, 1) to logits (B, 1, V)
PLACES: dict[int, Place] = {}
_numbers = itertools.count()


@torch.library.custom_op("pyramidkv::decode_step", mutates_args=())
def decode_step(query: Tensor, key: Tensor, value: Tensor, place: int, scaling: float) -> Tensor:
    """Attention of a new token a row over a layer's buffers and itself; writes it behind the slots in use.

    `query` (B, Hq, 1, D), `key` and `value` (B, Hkv, 1, D); (B, Hq, 1, D). The buffers are no arguments: they are
    behind `place`, and only this op touches them between two steps.
    """
    at = PLACES[place]
    new = key, value
    if at.pages is not None:
        return packed_attention(query, at.pages, at.keys, at.values, at.length, at.start, scaling, new, at.queries)
    return decode_attention(query, at.keys, at.values, at.length, at.start, scaling, new, at.queries)


@decode_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, place: int, scaling: float) -> Tensor:
    return query.new_empty(query.shape)


class StepLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `StepCache`."""

    is_sliding = False
    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self.place = next(_numbers)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values themselves; `attend` finds the others."""
        key_states.pyramidkv_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def check(self, model_config: Any) -> None:
        """Nothing to check: the step was made for its model."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, __: float) -> Tensor:
        """As `PyramidKVLayer.attend`, over the buffers of this place."""
        out: Tensor = decode_step(query, key, value, self.place, scaling)
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """0: positions come with the step."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The new token alone: which slots are used is known to the op."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum that a forward could ask for."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class StepCache(Cache):  # type: ignore[misc]
    """The cache that a captured step is given."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[StepLayer() for _ in range(layers)])

    @property
    def places(self) -> list[int]:
        return [layer.place for layer in self.layers]


def step_of(forward: Callable[..., Any], cache: StepCache) -> Step:
    """The step of a model whose forward this is."""

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        with PRODUCTS:
            out = forward(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True
            )
        logits: Tensor = out.logits
        return logits

    return step
