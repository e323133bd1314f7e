"""Settings of layers that are measured on texts of your own, once, and given to every prompt: `layers=`.

What a layer's tokens are worth to a model's answers differs from layer to layer by orders of magnitude, and little from
text to text. Shares of attention don't tell it: a layer may attend to many tokens of which nothing depends. So each
layer is compressed alone, in several ways, and what that does to the model's predictions is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.evaluate.prefill import prefill
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.methods import METHODS
from pyramidkv.parallel import ranks_of
from pyramidkv.plan import plan_of
from pyramidkv.shape import cache_shape

AMOUNTS = (0.2, 0.35, 0.6, 1.0, 1.5, 2.25)  # of an even share of the tokens: what each layer is given in turn
DOUBLED = AMOUNTS[2:]  # those tried in twice the bits, too
BETWEEN = 12  # steps from one amount to the next, over which losses are read off
BIAS = 0.1  # of what answers lose on average: the weight beside the divergence (docs/quality.md)

# Token ids: a context to compress, (1, T), and what is asked behind it: questions, (1, Q), and their answers, (1, A).
Prompt = tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Tried:
    """One way to compress a layer, the others left whole."""

    amount: float  # of an even share of the tokens
    bits: int
    nbytes: float
    divergence: float  # of the predictions for the answers' tokens from those of the full cache, nats a token
    lost: float = 0.0  # nats a token that the answers themselves lose on average; below 0 if they gain

    @property
    def loss(self) -> float:
        """What counts. Movements up and down cancel out over answers, a mean that falls does not; gains are luck."""
        return self.divergence + BIAS * max(self.lost, 0.0)


def calibrate(
    model: Any,
    prompts: Sequence[Prompt],
    config: CompressionConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[float | tuple[float, int], ...]:
    """What to give as `layers=`: each layer's part of the budget, and bits if more are due, as the answers need them.

        context, question, answer = (tokenizer(text, return_tensors="pt").input_ids for text in (document, asked, told))
        layers = pyramidkv.calibrate(model, [(context, [(question, answer)])], share=0.125)
        with pyramidkv.compress(model, method="auto", share=0.125, layers=layers):
            ...

    In each layer in turn the context is compressed to several amounts and, if there are fewer than 8, at some to twice
    the bits, while the other layers keep all. The loss is the Kullback-Leibler divergence of the predictions for the
    answers' tokens from those over the full cache, in nats a token, and a tenth of what the answers themselves lose on
    average. Losses of layers are added up, and the bytes of even layers are spent where they save most of it (`spend`),
    between the amounts too, where losses are taken to change evenly in their logarithm. The parts depend on how much
    is kept: measure at the amount you use.

    Every context is read once, and every question as often as there are layers and ways: ten times the layers
    below 8 bits, else six times.

    Args:
        model: a `transformers` causal language model of a supported family, not under compression.
        prompts: of each context its token ids, (1, T), and the questions behind it, each alone, as a pair of the token
            ids asked, (1, Q), and of the answer, (1, A); like what the model will read: as long, and longer than what
            is kept. Of a plain text, the "question" may be one token and the "answer" those that follow.
        config: the settings; or give them as keyword options, see `CompressionConfig`. "auto" if no method is given.
        progress: called after each prompt with the number of those done, and of all.

    Returns:
        One number a compressed layer, bottom layer first; their mean is 1. A pair of a number and bits where a layer is
        to be stored in more bits than the others.

    Raises:
        ConfigError: no prompts, a prompt of another shape or so short that it is kept whole; an option is unknown.
        UnsupportedError: the method drops nothing, or the process holds a part of the heads.
    """
    if config is None:
        options = {"method": "auto", **options}
    config = CompressionConfig.given(config, options)
    check_method(config)
    if not prompts or not all(asked for _, asked in prompts):
        raise ConfigError("prompts is empty, or has no question: give contexts, each with pairs of question and answer")
    for ids in (ids for context, asked in prompts for ids in (context, *itertools.chain(*asked))):
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise ConfigError(f"prompts: one has shape {tuple(ids.shape)}; each must be (1, tokens)")
    if ranks_of(model) > 1:
        raise UnsupportedError(
            "calibrate: this process holds a part of the KV heads; run it without tensor parallelism"
        )
    before = model.config._attn_implementation
    if before == ATTENTION_NAME:
        raise ConfigError("model: is already under compression; close that session first")
    ways = [_ways(model, config, context.shape[1]) for context, _ in prompts]  # what is wrong is said before all else
    found = []
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        for (context, asked), tries in zip(prompts, ways, strict=True):
            found.append(_try(model, context, asked, tries))
            if progress is not None:
                progress(len(found), len(prompts))
    finally:
        model.set_attn_implementation(before)
    tried = [[_mean(same) for same in zip(*layer, strict=True)] for layer in zip(*found, strict=True)]
    even = sum(way.nbytes for layer in tried for way in layer if (way.amount, way.bits) == (1.0, config.bits))
    chosen = spend([between(layer) for layer in tried], even)
    mean = sum(way.amount for way in chosen) / len(chosen)
    weights = [(round(way.amount / mean, 3), way.bits) for way in chosen]
    return tuple(weight if bits == config.bits else (weight, bits) for weight, bits in weights)


def check_method(config: CompressionConfig) -> None:
    """Raise `UnsupportedError` for a method that has no budgets to divide."""
    if METHODS[config.method].scorer is None:
        raise UnsupportedError(f"method={config.method!r}: keeps all tokens, so there is nothing to divide")


def spend(tried: Sequence[Sequence[Tried]], nbytes: float) -> list[Tried]:
    """Of each layer's ways one, so that together they take at most `nbytes` and lose about the least.

    Of a layer count the ways on the lower convex hull of loss over bytes. All layers begin with their cheapest; then
    bytes go, one step of a hull after another, to where a byte saves most. The last step is taken in part, where both
    its ends have the same bits. Nothing is spent on a layer that would lose as little without.
    """
    hulls = [_hull(ways) for ways in tried]
    chosen = [hull[0] for hull in hulls]
    left = nbytes - sum(way.nbytes for way in chosen)
    steps = [(layer, old, new) for layer, hull in enumerate(hulls) for old, new in itertools.pairwise(hull)]
    for layer, old, new in sorted(steps, key=lambda step: _slope(*step[1:])):
        price = new.nbytes - old.nbytes
        if chosen[layer] is not old:
            continue  # the step before was too dear
        if price <= left:
            chosen[layer], left = new, left - price
        elif old.bits == new.bits and left > 0:
            chosen[layer] = _part_way(old, new, left / price)
            left = 0.0
    return chosen


def between(ways: Sequence[Tried]) -> list[Tried]:
    """The ways of one layer, and those between two amounts: losses change evenly in their logarithm."""
    found = list(ways)
    by_amount = sorted(ways, key=lambda way: (way.bits, way.amount))
    for low, high in itertools.pairwise(by_amount):
        if low.bits == high.bits:
            found += [_part_way(low, high, step / BETWEEN) for step in range(1, BETWEEN)]
    return found


def _part_way(low: Tried, high: Tried, part: float) -> Tried:
    """Between two ways in the same bits: tokens and bytes evenly, losses evenly in their logarithm."""
    loss = max(low.loss, 1e-9) ** (1 - part) * max(high.loss, 1e-9) ** part
    amount, nbytes = ((1 - part) * a + part * b for a, b in ((low.amount, high.amount), (low.nbytes, high.nbytes)))
    return Tried(amount, low.bits, nbytes, loss)


def _hull(ways: Sequence[Tried]) -> list[Tried]:
    """The lower convex hull of losses over bytes, from the fewest bytes to the least loss."""
    hull: list[Tried] = []
    for way in sorted(ways, key=lambda way: (way.nbytes, way.loss)):
        if hull and way.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], way):
            hull.pop()
        hull.append(way)
    return hull


def _slope(old: Tried, new: Tried) -> float:
    """Nats a byte; negative, since the new one loses less."""
    return (new.loss - old.loss) / max(new.nbytes - old.nbytes, 1e-9)


def _ways(model: Any, config: CompressionConfig, tokens: int) -> list[tuple[float, CompressionConfig]]:
    """Settings to try for a prompt: amounts of even layers, in bits as they are and in twice as many."""
    shape = cache_shape(model.config)
    alike = (1.0,) * len(shape.compressed)
    dtype = model.dtype if config.kv_dtype == "auto" else getattr(torch, config.kv_dtype)
    budgets = plan_of(replace(config, layers=alike), shape).budgets(tokens, itemsize=dtype.itemsize)
    even = sum(budgets) / len(budgets)
    if even >= tokens:
        raise ConfigError(f"prompts=: one has {tokens} tokens, and all are kept; give longer ones, or a smaller amount")
    ways = []
    for bits, amounts in ((config.bits, AMOUNTS), (2 * config.bits, DOUBLED if config.bits < 8 else ())):
        for amount in amounts:
            kept = min(max(round(amount * even), config.floor), tokens)
            way = replace(config, keep=None, share=None, bytes=None, budget=kept, bits=bits, layers=alike)
            if bits == 16 and kept == tokens:  # all of them as they are
                way = CompressionConfig(method="full", kv_dtype=config.kv_dtype, room=config.room)
            ways.append((amount, way))
    return ways


@torch.no_grad()
def _try(
    model: Any,
    context: Tensor,
    asked: Sequence[tuple[Tensor, Tensor]],
    ways: Sequence[tuple[float, CompressionConfig]],
) -> list[list[Tried]]:
    """Of each compressed layer, what every way costs and loses on one context."""
    full = PyramidKVCache(model.config, method="full")
    caches = [PyramidKVCache(model.config, way) for _, way in ways]
    prefill(model, context.to(model.device), [full, *caches])
    truths = [_predictions(model, full, *pair) for pair in asked]
    found = []
    for index, layer in enumerate(full.layers):
        if not isinstance(layer, PyramidKVLayer):
            continue
        tried = []
        for (amount, way), cache in zip(ways, caches, strict=True):
            full.layers[index] = cache.layers[index]
            divergence = lost = 0.0
            for truth, (question, answer) in zip(truths, asked, strict=True):
                change = truth - _predictions(model, full, question, answer)
                divergence += float((truth.exp() * change).sum(-1).mean()) / len(asked)
                lost += float(change.gather(-1, answer[0, :, None].to(change.device)).mean()) / len(asked)
            tried.append(Tried(amount, way.bits, full.layers[index].usage().kv_bytes, divergence, lost))
        full.layers[index] = layer
        found.append(tried)
    return found


def _predictions(model: Any, cache: PyramidKVCache, question: Tensor, answer: Tensor) -> Tensor:
    """(A, V) float32 log-probabilities of the answer's tokens behind a cache, which stays as it is."""
    ids = torch.cat([question, answer[:, :-1]], dim=1).to(model.device)
    out = model(ids, past_key_values=cache.fork(), use_cache=True, logits_to_keep=answer.shape[1])
    logits: Tensor = out.logits[0]
    return logits.float().log_softmax(-1)


def _mean(same: Sequence[Tried]) -> Tried:
    """Of one way over all prompts."""
    rows = ((way.nbytes, way.divergence, way.lost) for way in same)
    nbytes, divergence, lost = (sum(values) / len(same) for values in zip(*rows, strict=True))
    return replace(same[0], nbytes=nbytes, divergence=divergence, lost=lost)
