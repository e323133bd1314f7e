"""From a setting to numbers of tokens: what each compressed layer may hold for a row of a given length."""

from __future__ import annotations

from collections.abc import Sequence

from pyramidkv.budget import layer_budgets, total_for_share
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.scorers import METHODS
from pyramidkv.shape import CacheShape

POSITION_BYTES = 4  # int32


def slot_bytes(kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one slot of one row of a layer, over all KV heads: key, value and position."""
    return kv_heads * (2 * head_dim * itemsize + POSITION_BYTES)


class Plan:
    """The layer budgets of one config on one model shape; `itemsize` is that of the cache's dtype, in bytes."""

    def __init__(self, config: CompressionConfig, shape: CacheShape) -> None:
        self.config = config
        self.shape = shape
        self.schedule = METHODS[config.method].schedule

    def budgets(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> tuple[int, ...]:
        """Tokens that each compressed layer may hold for a row of `tokens` real tokens, bottom layer first."""
        config, layers = self.config, len(self.shape.compressed)
        if config.keep is not None:
            total = max(total_for_share(config.keep, layers=layers, prompt=tokens), layers * config.floor)
        elif config.budget is not None:
            total = layers * config.budget
        elif config.bytes is not None:
            total = self._affordable(batch, itemsize)
        else:
            return (tokens,) * layers
        return layer_budgets(
            self.schedule,
            layers=layers,
            total=total,
            prompt=tokens,
            window=config.recent_tokens,
            least=config.floor,
            beta=config.beta,
        )

    def kv_bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes that the cache holds after a prompt of `tokens` tokens a row: every storage, room included."""
        budgets = self.budgets(tokens, batch=batch, itemsize=itemsize)
        compressed = sum(
            (kept + self.config.room) * self._slot(layer, itemsize)
            for layer, kept in zip(self.shape.compressed, budgets, strict=True)
        )
        return batch * (compressed + self._sliding_bytes(tokens, itemsize))

    def full_bytes(self, tokens: int, *, batch: int = 1, itemsize: int = 2) -> int:
        """Bytes of the keys and values of an uncompressed cache after a prompt of `tokens` tokens a row."""
        full = sum(
            2 * layer.kv_heads * layer.head_dim * itemsize * tokens
            for layer in self.shape.layers
            if layer.sliding_window is None
        )
        return batch * (full + self._sliding_bytes(tokens, itemsize))

    def _affordable(self, batch: int, itemsize: int) -> int:
        """Tokens over all compressed layers that `bytes` pays for, of each row."""
        config, compressed = self.config, self.shape.compressed
        assert isinstance(config.bytes, int)
        slots = [self._slot(layer, itemsize) for layer in compressed]
        # A sliding layer takes its whole window, as it does once it has decoded: not what a short prompt needs today.
        fixed = batch * (self._sliding_bytes(None, itemsize) + config.room * sum(slots))
        total = (config.bytes - fixed) // (batch * max(slots))
        if total < len(compressed) * config.floor:
            least = fixed + batch * len(compressed) * config.floor * max(slots)
            raise ConfigError(
                f"bytes={config.bytes}: a batch of {batch} needs at least {least} bytes on this model "
                f"({config.floor} tokens and room={config.room} in each of {len(compressed)} layers)"
            )
        return total

    def _slot(self, layer: int, itemsize: int) -> int:
        shape = self.shape.layers[layer]
        return slot_bytes(shape.kv_heads, shape.head_dim, itemsize)

    def _sliding_bytes(self, tokens: int | None, itemsize: int) -> int:
        total = 0
        for layer in self.shape.layers:
            if layer.sliding_window is not None:
                held = layer.sliding_window if tokens is None else min(tokens, layer.sliding_window - 1)
                total += 2 * layer.kv_heads * layer.head_dim * itemsize * held
        return total


def limits(plan: Plan, rank: int, counts: Sequence[int], *, itemsize: int) -> list[int]:
    """Tokens that the compressed layer number `rank` may hold of each row; `counts` are the rows' real tokens."""
    allowed = [plan.budgets(n, batch=len(counts), itemsize=itemsize)[rank] for n in counts]
    if plan.config.bytes is None:
        return allowed
    # A short row, clamped below, may ask for more in an upper layer than the longest does; every row has as many slots
    # as the widest, and the bytes pay for those of the longest row.
    most = plan.budgets(max(counts), batch=len(counts), itemsize=itemsize)[rank]
    return [min(n, most) for n in allowed]
