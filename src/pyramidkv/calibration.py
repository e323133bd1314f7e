"""Settings of layers that are measured on texts of your own, once, and given to every prompt: `layers=`.

A budget over all layers needs every layer's keys until the last has been read. But how it spreads over the layers is
much the same for all texts of a model. So is what codes in place of keys do to a layer: most layers don't feel them;
in a few, whose queries and keys are large, they move the logits enough to lose a fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.methods import METHODS
from pyramidkv.ops.heads import head_limits
from pyramidkv.ops.quantize import PAGE, dequantize_keys, quantize_keys
from pyramidkv.plan import Plan, plan_of
from pyramidkv.scorers import Observation, Scorer
from pyramidkv.shape import cache_shape

NOISE = 0.3  # nats: a layer where codes move the logits by more is stored in twice the bits


@dataclass(frozen=True)
class _Said:
    """What a prompt said of the layers."""

    tokens: int
    itemsize: int  # of what is stored
    scores: list[Tensor]  # of each compressed layer, (1, Hkv, tokens)
    noise: Tensor  # (layers,) float64, nats


class _Noting(Scorer):
    """A scorer that notes what it says, and what codes would do to the logits."""

    def __init__(self, scorer: Scorer, bits: int) -> None:
        super().__init__(scorer.config)
        self.scorer, self.bits = scorer, bits
        self.moves, self.lasts, self.observes = scorer.moves, scorer.lasts, scorer.observes
        self.said: Tensor | None = None
        self.noise = 0.0

    def score(self, seen: Observation) -> Tensor:
        self.said = self.scorer.score(seen)
        self.noise = 0.0 if self.bits == 16 else logit_noise(seen.query, seen.key, seen.scaling, self.bits)
        return self.said


def calibrate(
    model: Any, prompts: Sequence[Tensor], config: CompressionConfig | None = None, **options: Any
) -> tuple[float | tuple[float, int], ...]:
    """What to give as `layers=`: each layer's part of one budget over all layers and heads, and bits if more are due.

        layers = pyramidkv.calibrate(model, [tokenizer(text, return_tensors="pt").input_ids], share=0.125)
        with pyramidkv.compress(model, method="auto", share=0.125, layers=layers):
            ...

    Of each layer's scores the highest of all layers are kept, in pages of 64 tokens, beside each head's newest tokens
    and a fifth of an even share; the weights are the layers' mean parts of it. So scores must mean the same in every
    layer, as shares of attention do ("echo", "auto"). They depend on how much is kept: measure at the amount you use.

    In fewer than 8 bits, a layer whose codes would move the logits of a head by more than `NOISE` (standard deviation,
    in nats) is to be stored in twice the bits; at the same bytes, all layers then keep fewer tokens.

    Args:
        model: a `transformers` causal language model of a supported family, not under compression.
        prompts: token ids, (1, T) each, like what the model will read: as long, and longer than what is kept.
        config: the settings; or give them as keyword options, see `CompressionConfig`. "auto" if no method is given.

    Returns:
        One number a compressed layer, bottom layer first; their mean is 1. A pair of a number and bits where a layer is
        to be stored in more bits than the others.

    Raises:
        ConfigError: no prompts, a prompt of another shape or so short that it is kept whole; an option is unknown.
        UnsupportedError: the method has no scores, or the process holds a part of the heads.
    """
    if config is None:
        options = {"method": "auto", **options}
    config = CompressionConfig.given(config, options)
    check_method(config)
    if not prompts:
        raise ConfigError("prompts is empty: give at least one, as token ids of shape (1, tokens)")
    before = model.config._attn_implementation
    if before == ATTENTION_NAME:
        raise ConfigError("model: is already under compression; close that session first")
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        said = [_listen(model, ids, config) for ids in prompts]
    finally:
        model.set_attn_implementation(before)
    noise = torch.stack([prompt.noise for prompt in said]).mean(0).tolist()
    bits = [config.bits * (2 if config.bits < 8 and much > NOISE else 1) for much in noise]
    plan = plan_of(replace(config, layers=tuple((1.0, n) for n in bits)), cache_shape(model.config))
    mean = torch.stack([_parts(prompt, plan) for prompt in said]).mean(0)
    weights = [round(part, 3) for part in (mean / mean.mean()).tolist()]
    return tuple(w if n == config.bits else (w, n) for w, n in zip(weights, bits, strict=True))


def logit_noise(query: Tensor, key: Tensor, scaling: float, bits: int) -> float:
    """By how much codes of `bits` bits in place of keys move the logits: standard deviation, in nats, of one KV head.

    Over all queries and all keys of whole pages, of the head where it is largest. (1, Hq, Q, D) queries and (1, Hkv, K,
    D) keys, K at least 64.
    """
    heads, pages = key.shape[1], key.shape[2] // PAGE
    exact = key[0, :, key.shape[2] - pages * PAGE :].float().reshape(heads, pages, PAGE, -1)
    off = (dequantize_keys(quantize_keys(exact, bits), torch.float32) - exact).flatten(1, 2)  # (Hkv, N, D)
    asked = (query[0].float() * scaling).reshape(heads, -1, query.shape[3])  # (Hkv, G * Q, D)
    # The mean of (q . e)^2 over all pairs is that of the products of their second moments.
    moments = [vectors.mT @ vectors / vectors.shape[1] for vectors in (asked, off)]
    return float((moments[0] * moments[1]).sum((1, 2)).max().sqrt())


def check_method(config: CompressionConfig) -> None:
    """Raise `UnsupportedError` for a method whose scores are no attention: those of two layers can't be compared."""
    scorer = METHODS[config.method].scorer
    if scorer is None or not getattr(scorer, "observes", True):
        raise UnsupportedError(
            f"method={config.method!r}: has no scores of attention to spread a budget by; use 'auto' or 'echo'"
        )


def _listen(model: Any, ids: Tensor, config: CompressionConfig) -> _Said:
    """What a prompt (1, T) says of the layers."""
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ConfigError(f"prompts: one has shape {tuple(ids.shape)}; each must be (1, tokens)")
    cache = PyramidKVCache(model.config, config)
    layers = [layer for layer in cache.layers if isinstance(layer, PyramidKVLayer)]
    noting = []
    for layer in layers:
        assert layer.scorer is not None
        layer.scorer = _Noting(layer.scorer, config.bits)
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
    storage = layers[0].storage
    assert storage is not None
    noise = torch.tensor([scorer.noise for scorer in noting], dtype=torch.float64)
    return _Said(tokens, storage.spec.itemsize, scores, noise)


def _parts(said: _Said, plan: Plan) -> Tensor:
    """(layers,) float64: mean slots a head of each compressed layer, under one budget over all of them."""
    heads = [scores.shape[1] for scores in said.scores]
    budgets = plan.budgets(said.tokens, itemsize=said.itemsize)
    share = sum(n * slots for n, slots in zip(heads, budgets, strict=True)) // sum(heads)
    together = torch.cat([scores.to(said.scores[0].device) for scores in said.scores], dim=1)
    limits = head_limits(together, [share], [said.tokens], plan.config.recent)[0].double().cpu()
    return torch.stack([part.mean() for part in torch.split(limits, heads)])
