"""Layer budgets that are measured: how one budget over all heads of all layers would spread, on texts of your own.

A budget over all layers needs every layer's keys until the last has been read. But how it spreads over the layers is
much the same for all texts of a model, so it can be measured once and given to every prompt: `layers=`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.methods import METHODS
from pyramidkv.ops.heads import head_limits
from pyramidkv.scorers import Observation, Scorer


class _Noting(Scorer):
    """A scorer that notes what it says."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer.config)
        self.scorer = scorer
        self.moves, self.lasts, self.observes = scorer.moves, scorer.lasts, scorer.observes
        self.said: Tensor | None = None

    def score(self, seen: Observation) -> Tensor:
        self.said = self.scorer.score(seen)
        return self.said


def calibrate(
    model: Any, prompts: Sequence[Tensor], config: CompressionConfig | None = None, **options: Any
) -> tuple[float, ...]:
    """What to give as `layers=`: the budgets that each layer would get of one budget over all layers and heads.

        layers = pyramidkv.calibrate(model, [tokenizer(text, return_tensors="pt").input_ids], share=0.125)
        with pyramidkv.compress(model, method="auto", share=0.125, layers=layers):
            ...

    Of each layer's scores the highest of all layers are kept, in pages of 64 tokens, beside each head's newest tokens
    and a fifth of an even share; the weights are the layers' mean parts of it. So scores must mean the same in every
    layer, as shares of attention do ("echo", "auto"). They depend on how much is kept: measure at the amount you use.

    Args:
        model: a `transformers` causal language model of a supported family, not under compression.
        prompts: token ids, (1, T) each, like what the model will read: as long, and longer than what is kept.
        config: the settings; or give them as keyword options, see `CompressionConfig`. "auto" if no method is given.

    Returns:
        One number a compressed layer, bottom layer first; their mean is 1.

    Raises:
        ConfigError: no prompts, a prompt of another shape or so short that it is kept whole; an option is unknown.
        UnsupportedError: the method has no scores, or the process holds a part of the heads.
    """
    if config is None:
        config = CompressionConfig.make(**{"method": "auto", **options})
    elif options:
        raise ConfigError(f"{next(iter(options))}: give either config= or keyword options, not both")
    check_method(config)
    if not prompts:
        raise ConfigError("prompts is empty: give at least one, as token ids of shape (1, tokens)")
    before = model.config._attn_implementation
    if before == ATTENTION_NAME:
        raise ConfigError("model: is already under compression; close that session first")
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        parts = [_parts(model, ids, config) for ids in prompts]
    finally:
        model.set_attn_implementation(before)
    mean = torch.stack(parts).mean(0)
    return tuple(round(part, 3) for part in (mean / mean.mean()).tolist())


def check_method(config: CompressionConfig) -> None:
    """Raise `UnsupportedError` for a method whose scores are no attention: those of two layers can't be compared."""
    scorer = METHODS[config.method].scorer
    if scorer is None or not getattr(scorer, "observes", True):
        raise UnsupportedError(
            f"method={config.method!r}: has no scores of attention to spread a budget by; use 'auto' or 'echo'"
        )


def _parts(model: Any, ids: Tensor, config: CompressionConfig) -> Tensor:
    """(layers,) float64: mean slots a head of each compressed layer, under one budget over all of them."""
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ConfigError(f"prompts: one has shape {tuple(ids.shape)}; each must be (1, tokens)")
    cache = PyramidKVCache(model.config, config)
    layers = [layer for layer in cache.layers if isinstance(layer, PyramidKVLayer)]
    noting = []
    for layer in layers:
        assert layer.scorer is not None
        layer.scorer = _Noting(layer.scorer)
        noting.append(layer.scorer)
    with torch.no_grad():
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    scores = [scorer.said for scorer in noting if scorer.said is not None]
    tokens = ids.shape[1]
    if len(scores) < len(layers):
        raise ConfigError(f"prompts=: one has {tokens} tokens, and all are kept; give longer ones, or a smaller amount")
    heads = [said.shape[1] for said in scores]
    if heads != [cache.plan.shape.layers[layer.layer].kv_heads for layer in layers]:
        raise UnsupportedError(
            "calibrate: this process holds a part of the KV heads; run it without tensor parallelism"
        )
    share = sum(n * layer.held[0] for n, layer in zip(heads, layers, strict=True)) // sum(heads)
    together = torch.cat([said.to(scores[0].device) for said in scores], dim=1)
    limits = head_limits(together, [share], [tokens], config.recent)[0].double().cpu()
    return torch.stack([part.mean() for part in torch.split(limits, heads)])
