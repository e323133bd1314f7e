"""One prefill that fills several caches: methods are compared on the very same keys, and the prompt is run once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from pyramidkv.cache import PyramidKVCache
from pyramidkv.errors import PyramidKVError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.new_tokens import NewTokens


class _SharedLayer(PyramidKVLayer):
    """Stands in for the same layer of several caches during their first forward; stores nothing itself."""

    def __init__(self, layers: Sequence[PyramidKVLayer]) -> None:
        first = layers[0]
        super().__init__(first.layer, first.rank, first.plan, first.scorer)
        self.layers = layers

    def absorb(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, new: NewTokens, scaling: float
    ) -> None:
        for layer in self.layers:
            layer.start(key.shape[0])
            layer.absorb(query, key, value, valid, new, scaling)
        self.seen += query.shape[2]


def prefill(model: Any, ids: Tensor, caches: Sequence[PyramidKVCache], **inputs: Any) -> Tensor:
    """Run the prompt (B, T) once and compress it into each of the fresh `caches`; returns the last logits (B, V).

    The model must run under the "pyramidkv" attention. Raises `PyramidKVError` if a cache that should compress did
    neither drop nor pack a single token: a comparison must not show that as a result.
    """
    shared = PyramidKVCache(model.config, method="full")
    for index, layer in enumerate(shared.layers):
        if isinstance(layer, PyramidKVLayer):
            shared.layers[index] = _SharedLayer([cache.layers[index] for cache in caches])
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=shared, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1]
    for cache in caches:
        for index, layer in enumerate(shared.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                cache.layers[index] = copy.deepcopy(layer)
        if cache.config.method != "full" and not cache.report().shrunk:
            raise PyramidKVError(
                f"method={cache.config.method!r} {cache.config.describe()} kept all {ids.shape[1]} tokens: nothing was "
                "compressed; use a longer prompt or a smaller budget"
            )
    return logits
