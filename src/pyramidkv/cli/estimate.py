"""What a model and a compression will take of a memory, by arithmetic on the config; nothing is loaded or measured.

Counted: the weights; every byte of the cache's storages, positions and room for new tokens included; the activations
of one layer over the whole prompt, which is where a prefill peaks (4 x hidden + 2 x MLP width values a token, 3 x where
the MLP is gated: with that, peaks are within 1% of those measured on an H100 for pythia-2.8b and llama-3.1-8b). Of a
large batch a session prefills a few rows at a time, and has the activations of those alone: for 136 rows of pythia-2.8b
1.5 GB by this arithmetic and 1.3 measured.
Not counted: the CUDA context (about half a GB), fragmentation, logits of a whole prompt (`generate()` makes only the
last token's), and what a scorer holds for a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.plan import Plan
from pyramidkv.rows import rows_together
from pyramidkv.shape import CacheShape, cache_shape


@dataclass(frozen=True)
class Estimate:
    """Bytes of one config on one model, for rows of `prompt` tokens."""

    plan: Plan
    full: Plan
    prompt: int
    itemsize: int
    weights_bytes: int
    activation_bytes: int  # of one row

    @classmethod
    def of(
        cls, config: CompressionConfig, model_config: Any, *, parameters: int, prompt: int, itemsize: int
    ) -> Estimate:
        """The estimate for a `transformers` config with so many parameters, `itemsize` bytes each."""
        shape = cache_shape(model_config)
        return cls(
            plan=Plan(config, shape),
            full=Plan(CompressionConfig(method="full"), shape),
            prompt=prompt,
            itemsize=itemsize,
            weights_bytes=parameters * itemsize,
            activation_bytes=prompt * _values_per_token(model_config, shape) * itemsize,
        )

    def budgets(self, batch: int) -> tuple[int, ...]:
        """Tokens that each compressed layer keeps of a row."""
        return self.plan.budgets(self.prompt, batch=batch, itemsize=self.itemsize)

    def kv_bytes(self, batch: int) -> int:
        """Bytes of the compressed cache."""
        return self.plan.kv_bytes(self.prompt, batch=batch, itemsize=self.itemsize)

    def full_kv_bytes(self, batch: int) -> int:
        """Bytes of the uncompressed cache."""
        return self.full.full_bytes(self.prompt, batch=batch, itemsize=self.itemsize)

    def peak_bytes(self, batch: int, *, compressed: bool) -> int:
        """The most that a prefill holds at once."""
        kv = self.kv_bytes(batch) if compressed else self.full_kv_bytes(batch)
        return self.weights_bytes + self.work_bytes(batch, compressed=compressed) + kv

    def work_bytes(self, batch: int, *, compressed: bool) -> int:
        """The activations of the rows that are prefilled at once: in a session a few, without one all of them.

        So too in a session of a model that has sliding windows.
        """
        apart = compressed and len(self.plan.shape.compressed) == len(self.plan.shape.layers)
        return self.activation_bytes * (min(batch, rows_together(self.prompt)) if apart else batch)

    def largest_batch(self, memory: int, *, compressed: bool) -> int:
        """The largest batch whose peak fits; 0 if not even one row does."""
        return _largest(lambda batch: self._fits(batch, memory, compressed))

    def _fits(self, batch: int, memory: int, compressed: bool) -> bool:
        try:
            return self.peak_bytes(batch, compressed=compressed) <= memory
        except ConfigError:  # a `bytes` amount that no longer pays for so many rows
            return False


def _values_per_token(model_config: Any, shape: CacheShape) -> int:
    text = model_config.get_text_config(decoder=True)
    gated = shape.model_type != "gpt_neox"
    return int(4 * text.hidden_size + (3 if gated else 2) * text.intermediate_size)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, given that all smaller ones do; doubling, then halving the gap."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
