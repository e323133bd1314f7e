"""From a setting to numbers of tokens: what each compressed layer may hold for a row of a given length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from pyramidkv.budget import layer_budgets, total_for_share
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.methods import METHODS
from pyramidkv.ops.heads import row_pages
from pyramidkv.packed import packed_bytes
from pyramidkv.ring import SPARE
from pyramidkv.shape import CacheShape, LayerShape
from pyramidkv.storage import Spec


class Plan:
    """The layer budgets of one config on one model shape; `itemsize` is that of the cache's dtype, in bytes."""

    def __init__(self, config: CompressionConfig, shape: CacheShape) -> None:
        self.config = config
        self.shape = shape
        self.schedule = METHODS[config.method].schedule
        self._weights = config.weights
        if self._weights is not None and len(self._weights) != self._layers:
            raise ConfigError(
                f"layers={config.layers!r}: has {len(self._weights)} numbers; this model has {self._layers} layers "
                "that are compressed"
            )
        self._bits = tuple(config.bits_of(rank) for rank in range(self._layers))
        self._known = lru_cache(maxsize=1024)(self._budgets)  # every layer of every prompt asks

    def budgets(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> tuple[int, ...]:
        """Tokens that each compressed layer may hold for a row of `tokens` real tokens, bottom layer first."""
        return self._known(tokens, batch, itemsize)

    def _budgets(self, tokens: int, batch: int, itemsize: int) -> tuple[int, ...]:
        config = self.config
        if not config.amount:
            return (tokens,) * self._layers
        if config.keep is not None:
            least = self._layers * config.floor
            return self._split(max(total_for_share(config.keep, layers=self._layers, prompt=tokens), least), tokens)
        if config.budget is not None:
            return self._split(self._layers * config.budget, tokens)
        return self._afford(tokens, batch, itemsize)

    def kv_bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes that the cache holds after a prompt of `tokens` tokens a row: every storage, room included."""
        budgets = self.budgets(tokens, batch=batch, itemsize=itemsize)
        return self._bytes_of(budgets, tokens, batch, itemsize) + self._sliding_bytes(tokens, batch, itemsize)

    def full_bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes of the keys and values of an uncompressed cache after a prompt of `tokens` tokens a row."""
        full = sum(_spec(self.shape.layers[i], batch, itemsize).token_bytes for i in self.shape.compressed)
        return full * tokens + self._sliding_bytes(tokens, batch, itemsize)

    @property
    def _layers(self) -> int:
        return len(self.shape.compressed)

    def _split(self, total: int, tokens: int) -> tuple[int, ...]:
        config = self.config
        return layer_budgets(
            self.schedule,
            layers=self._layers,
            total=total,
            prompt=tokens,
            window=config.recent,
            least=config.floor,
            beta=config.beta,
            weights=self._weights,
        )

    def _afford(self, tokens: int, batch: int, itemsize: int) -> tuple[int, ...]:
        """The largest budgets that `share` or `bytes` pays for, of each row."""
        config = self.config
        if config.share is not None:
            # Of this row's own full cache; its part of the batch's sliding layers is the same in both.
            batch = 1
            limit = math.floor(Fraction(str(config.share)) * self.full_bytes(tokens, itemsize=itemsize))
            fixed = self._sliding_bytes(tokens, batch, itemsize)
        else:
            assert isinstance(config.bytes, int)
            limit = config.bytes
            # A sliding layer takes its whole window, as it does once it has decoded: not what a short prompt needs.
            fixed = self._sliding_bytes(None, batch, itemsize)
        high = self._layers * tokens
        low = min(self._layers * config.floor, high)
        least = fixed + self._bytes_of(self._split(low, tokens), tokens, batch, itemsize)
        if least > limit and config.bytes is not None:
            raise ConfigError(
                f"bytes={config.bytes}: a batch of {batch} needs at least {least} bytes on this model "
                f"({config.floor} tokens and room={config.room} in each of {self._layers} layers)"
            )
        while low < high:  # the largest total that fits; a share below the floor is the floor, as with `keep`
            middle = (low + high + 1) // 2
            if fixed + self._bytes_of(self._split(middle, tokens), tokens, batch, itemsize) <= limit:
                low = middle
            else:
                high = middle - 1
        return self._split(low, tokens)

    def _bytes_of(self, budgets: Sequence[int], tokens: int, batch: int, itemsize: int) -> int:
        # Most layers are alike, and each counts once: a prefill waits for this.
        shapes = (self.shape.layers[i] for i in self.shape.compressed)
        alike = Counter(zip(shapes, budgets, self._bits, strict=True))
        return sum(n * self._layer_bytes(*layer, tokens, batch, itemsize) for layer, n in alike.items())

    def _layer_bytes(self, shape: LayerShape, kept: int, bits: int, tokens: int, batch: int, itemsize: int) -> int:
        config, spec = self.config, _spec(shape, batch, itemsize)
        ring = batch * self._ring_bytes(shape, itemsize)
        if not config.packs_in(bits):
            return spec.slot_bytes * (kept + config.free) + ring
        pages = shared_pages(config, spec.heads, [kept], [tokens])
        recent, room = config.recent, config.free
        return packed_bytes(spec, kept, bits, pages, recent=recent, tokens=tokens, room=room) + ring

    def _ring_bytes(self, shape: LayerShape, itemsize: int) -> int:
        """Of a row's newest queries, kept for an eviction while decoding."""
        size = ring_size(self.config)
        return 0 if size is None else shape.heads * shape.head_dim * itemsize * (size + SPARE)

    def _sliding_bytes(self, tokens: int | None, batch: int, itemsize: int) -> int:
        total = 0
        for layer in self.shape.layers:
            if layer.sliding_window is not None:
                held = layer.sliding_window if tokens is None else min(tokens, layer.sliding_window - 1)
                total += 2 * layer.kv_heads * layer.head_dim * itemsize * held
        return batch * total


def plan_of(config: CompressionConfig, shape: CacheShape) -> Plan:
    """The plan that all caches of one config on one model shape share: what a `share` pays for takes a while."""
    return _plan_of(config, shape, METHODS[config.method].schedule)  # a method may be registered anew


@lru_cache(maxsize=64)
def _plan_of(config: CompressionConfig, shape: CacheShape, _: str) -> Plan:
    return Plan(config, shape)


def _spec(shape: LayerShape, batch: int, itemsize: int) -> Spec:
    return Spec(batch, shape.kv_heads, shape.head_dim, shape.head_dim, itemsize)


def shared_pages(
    config: CompressionConfig, heads: int, shares: Sequence[int], available: Sequence[int], even: bool = True
) -> int | None:
    """Pages that the heads of a row have together; None: each head has those that its slots need.

    `heads` KV heads keep `shares` of the `available` slots of each row, on average; `even`: all have as many now.
    """
    if config.heads == "uniform":
        return None
    pages = (row_pages(heads, *row, config.recent, even) for row in zip(shares, available, strict=True))
    return max(pages, default=0)


def ring_size(config: CompressionConfig) -> int | None:
    """How many queries of decoded tokens a layer keeps; None: none, since nothing would look at them."""
    scorer = METHODS[config.method].scorer
    return config.slack if scorer is not None and getattr(scorer, "observes", True) else None


def decoding_limits(
    plan: Plan, rank: int, counts: Sequence[int], prompts: Sequence[int], *, itemsize: int, ahead: int = 0
) -> list[int]:
    """`limits` for an eviction while decoding: a share is that of the prompt, and does not grow with what follows it.

    `prompts` are the rows' real tokens after the last forward of several. The limits hold for `ahead` more tokens too:
    as a short text grows, a pyramid moves budget from upper layers to lower ones. None is below what is always kept.
    """
    config = plan.config
    if config.keep is not None or config.share is not None:
        counts, ahead = prompts, 0
    now, later = (limits(plan, rank, [n + more for n in counts], itemsize=itemsize) for more in (0, ahead))
    return [max(min(a, b), config.floor) for a, b in zip(now, later, strict=True)]


def limits(plan: Plan, rank: int, counts: Sequence[int], *, itemsize: int) -> list[int]:
    """Tokens that the compressed layer number `rank` may hold of each row; `counts` are the rows' real tokens."""
    allowed = [plan.budgets(n, batch=len(counts), itemsize=itemsize)[rank] for n in counts]
    if plan.config.bytes is None and plan.config.share is None:
        return allowed
    # A short row, clamped below, may ask for more in an upper layer than the longest does; every row has as many slots
    # as the widest, and the bytes pay for those of the longest row.
    most = plan.budgets(max(counts), batch=len(counts), itemsize=itemsize)[rank]
    return [min(n, most) for n in allowed]
