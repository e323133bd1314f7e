"""The methods: what each thinks a key is worth, and how it spreads the budget over the layers.

To add one: a class with `score`, and `@register("name", schedule=...)` above it. Nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramidkv.config import CompressionConfig
from pyramidkv.methods import register
from pyramidkv.ops.band_scores import band_scores
from pyramidkv.ops.level import level
from pyramidkv.ops.pooling import pool
from pyramidkv.ops.valid import by_head
from pyramidkv.ops.window_scores import window_scores
from pyramidkv.rotary import Turn


@dataclass(frozen=True)
class Observation:
    """What one layer shows a scorer after a forward of Q tokens: K keys, of which the last Q are new."""

    query: Tensor  # (B, Hq, Q, D), rotated, new tokens only; while decoding, those since the last eviction
    key: Tensor  # (B, Hkv, K, D), rotated
    value: Tensor  # (B, Hkv, K, D)
    scaling: float
    valid: Tensor | None  # (B, K) or (B, Hkv, K) bool, False for padding and empty slots; None: all real
    positions: Tensor  # (B, Hkv, K) int32: index of each key's token among the real tokens of its row; -1 empty
    tokens: Sequence[int]  # real tokens of each row so far: the newest is at position tokens - 1
    layer: int  # index of the layer in the model
    first_head: int = 0  # index in the model of the first KV head; tensor parallelism gives each process some of them
    back: Turn | None = None  # for scorers that move: turns the rotated keys of a row back by as many tokens as it has
    lasting: Tensor | None = None  # (B, Hkv, K), for scorers that last, if more of the prompt is to come


class Scorer(ABC):
    """Says what each key is worth to later tokens."""

    moves = False  # True for a scorer that needs `Observation.back`
    lasts = False  # True for a scorer that says something of the newest Q keys, in `Observation.lasting`, to read later
    observes = True  # False for a scorer that never looks at `Observation.query`: no queries are kept for it
    # True if `score` launches the same work for tensors of the same shapes and copies no number from the host or to it:
    # evictions while decoding are then replayed from a CUDA graph, in which `tokens` are those of the capture. Not
    # inherited: each class says it of itself.
    replays = False

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    @abstractmethod
    def score(self, seen: Observation) -> Tensor:
        """(B, Hkv, K) float32; the keys with the highest scores are kept. Invalid slots may have any score.

        No score outranks the newest tokens, which are always kept, and none of -inf or NaN leaves a slot empty.
        """


@register(
    "pyramidkv",
    schedule="pyramid",
    summary="The score of snapkv, with more tokens in lower layers and fewer in upper ones (arXiv 2406.02069).",
)
@register("snapkv")
class WindowScorer(Scorer):
    """Attention from the last `window` queries, pooled over neighbours (SnapKV, arXiv 2404.14469, section 4)."""

    replays = True

    def score(self, seen: Observation) -> Tensor:
        window = min(self.config.window, seen.query.shape[2])
        scores = self._attention(seen.query[:, :, -window:], seen)
        if self.config.kernel == 1:
            return scores
        if seen.valid is None:
            return self._pooled(scores, None)
        # Padding between two turns must not part neighbours: all empty slots to the front, and back after the pooling.
        real = by_head(seen.valid)
        order = real.int().argsort(dim=-1, stable=True)
        valid = real.gather(2, order)
        wide = order.expand_as(scores)
        return torch.empty_like(scores).scatter_(2, wide, self._pooled(scores.gather(2, wide), valid))

    def _attention(self, query: Tensor, seen: Observation) -> Tensor:
        return window_scores(query, seen.key, seen.scaling, seen.valid)

    def _pooled(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        # The newest tokens are kept anyway; their high scores must not lift their neighbours.
        old = max(scores.shape[-1] - self.config.recent, 0)
        return pool(scores, self.config.kernel, self.config.pooling, valid, old)


@register("rms", window=1024, recent=32, kernel=1)
class WideWindowScorer(WindowScorer):
    """Root mean square attention from the last `window` queries, over those that can see a key."""

    replays = True

    def _attention(self, query: Tensor, seen: Observation) -> Tensor:
        return window_scores(query, seen.key, seen.scaling, seen.valid, power=2, per_visible=True)


@register(
    "auto",
    window=256,
    recent=32,
    kernel=1,
    bits=4,
    heads="adaptive",
    summary="echo in 4 bits, with budgets by head: the least loss for the bytes.",
)
@register("echo", window=256, recent=32, kernel=1)
class EchoScorer(WideWindowScorer):
    """Attention from the prompt's own queries, asked again from behind it.

    A fact that only a later question will need gets little attention while the prompt is read: what repeats it, or asks
    for it, is not there yet. Asked again from behind the prompt, the queries of a fact find it: that is what reading a
    prompt twice shows (KVzip, arXiv 2505.23416), and moving the queries by the length of the prompt shows it without
    the second forward. Of all those queries a key counts the ones of the tokens around it, of its own forward. These
    are shares of attention, alike in all heads: a head that copies finds its keys again and scores high, one that does
    not scores low, and budgets by head follow that.

    Keys of earlier chunks of a prompt keep what their own forward said. Those of earlier turns, whose queries are gone,
    have the score of `rms`, scaled to the mean of their head's new keys.
    """

    moves = lasts = replays = True

    def score(self, seen: Observation) -> Tensor:
        assert seen.back is not None
        new = seen.query.shape[2]
        valid = None if seen.valid is None else seen.valid[..., -new:]
        # Moving all keys back is moving all queries on; there may be fewer keys.
        again = band_scores(seen.query, seen.key[:, :, -new:], seen.scaling, valid, seen.back)
        if seen.lasting is not None:
            seen.lasting[:, :, -new:] = again
            return torch.cat([seen.lasting[:, :, :-new].float(), again], dim=2)
        if new == seen.key.shape[2]:
            return again
        return level(super().score(seen)[..., :-new], again, seen.valid)


@register("h2o")
class HeavyHitterScorer(Scorer):
    """Attention from all queries of the forward (H2O, arXiv 2306.14048, section 4)."""

    replays = True

    def score(self, seen: Observation) -> Tensor:
        return window_scores(seen.query, seen.key, seen.scaling, seen.valid)


@register("streamingllm")
class StreamingScorer(Scorer):
    """The first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453, section 3)."""

    observes, replays = False, True

    def score(self, seen: Observation) -> Tensor:
        position = seen.positions.float()
        return position.masked_fill(seen.positions < self.config.sinks, float("inf"))


@register("knorm")
class KeyNormScorer(Scorer):
    """Small key norms first (Devoto et al., arXiv 2406.11430)."""

    observes, replays = False, True

    def score(self, seen: Observation) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(seen.key.float(), dim=-1)
        return -norm


@register("random")
class RandomScorer(Scorer):
    """A random choice per layer and KV head that depends on the seed and a token's position alone."""

    observes, replays = False, True

    def score(self, seen: Observation) -> Tensor:
        heads = seen.key.shape[1]
        # A hash of the position rather than a generator's stream: a row scores the same in any batch, padded or not.
        head = torch.arange(seen.first_head, seen.first_head + heads, device=seen.key.device)[:, None]
        mixed = (seen.positions.long() + 1) * 0x9E3779B1 + head * 0x85EBCA77 + (seen.layer + 1) * 0xC2B2AE3D
        mixed = (mixed + (self.config.seed + 1) * 0x27D4EB2F) & 0xFFFFFFFF
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        return mixed.float()
