"""Perplexity of a continuation, scored with the compressed cache really in use.

Of each chunk of context + target + 1 tokens, the context is prefilled and compressed; then the next `target` tokens
are fed in one forward, and the prediction of the token after each of them is scored. So every scored prediction comes
after the eviction and reads the compressed cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import DynamicCache

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, PyramidKVError
from pyramidkv.evaluate.lengths import check_length
from pyramidkv.evaluate.prefill import prefill
from pyramidkv.evaluate.schema import Compression, Perplexity
from pyramidkv.evaluate.texts import Corpus
from pyramidkv.usage import CacheUsage

FULL = CompressionConfig(method="full")


def stored(config: CompressionConfig, model: Any) -> CompressionConfig:
    """How a config is measured for quality: without room for new tokens, since none is decoded, and in 16 bits.

    A share of a 32-bit cache is twice as many bytes as the same share of the 16-bit one that a GPU would hold.
    """
    wide = config.kv_dtype == "auto" and model.dtype == torch.float32
    return replace(config, room=1, kv_dtype="float16" if wide else config.kv_dtype)


def setting(config: CompressionConfig) -> str:
    """A config in the words of a record: all but the way of decoding, which changes neither quality nor bytes.

    Rows of one compression have one setting, on whatever engine they were measured; the engine's name tells the way.
    """
    return replace(config, decode="auto").describe()


def compression(config: CompressionConfig, usage: CacheUsage) -> Compression:
    """The record of what a cache kept. The baseline counts as `transformers` stores it, without our bookkeeping."""
    kv_bytes = usage.full_kv_bytes if config.method == "full" else usage.kv_bytes
    return Compression(config.method, setting(config), usage.keep, kv_bytes, usage.full_kv_bytes)


def measure(
    model: Any,
    name: str,
    corpus: Corpus,
    chunks: Sequence[Sequence[int]],
    configs: Sequence[CompressionConfig],
    *,
    context: int,
) -> Iterator[list[Perplexity]]:
    """After each chunk, the perplexity so far of the full cache and of every config, in that order.

    Args:
        model: a causal language model; runs under the "pyramidkv" attention while measured, then as before.
        name: its name, for the records.
        chunks: token ids, each chunk context + target + 1 long.
        configs: what to compare with the full cache; measured as `stored` says.
        context: tokens prefilled and compressed.
    """
    target = len(chunks[0]) - context - 1
    if target < 1:
        raise ConfigError(f"target={target}: must be at least 1 token")
    check_length("context", context, configs)
    every = [stored(config, model) for config in (FULL, *configs)]
    nll: list[list[float]] = [[] for _ in every]
    before = model.config._attn_implementation
    try:
        for number, chunk in enumerate(chunks):
            ids = torch.tensor([list(chunk)], device=model.device)
            if number == 0:
                model.set_attn_implementation(before)
                plain = _chunk_nll(model, ids, context, DynamicCache(config=model.config))
            model.set_attn_implementation(ATTENTION_NAME)
            caches = [PyramidKVCache(model.config, config) for config in every]
            prefill(model, ids[:, :context], caches)
            usage = [cache.report() for cache in caches]
            for row, cache in zip(nll, caches, strict=True):
                row.append(_continuation_nll(model, ids, context, cache))
            if number == 0 and abs(nll[0][0] - plain) > 0.01:
                raise PyramidKVError(f"the full cache scores {nll[0][0]:.4f} nats and the plain model {plain:.4f}")
            yield [
                Perplexity(name, corpus.name, corpus.sha256, context, target, compression(config, held), tuple(row))
                for config, held, row in zip((FULL, *configs), usage, nll, strict=True)
            ]
    finally:
        model.set_attn_implementation(before)


def _chunk_nll(model: Any, ids: Tensor, context: int, cache: Any) -> float:
    with torch.no_grad():
        model(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _continuation_nll(model, ids, context, cache)


def _continuation_nll(model: Any, ids: Tensor, context: int, cache: Any) -> float:
    """Mean negative log likelihood, nats per token, of the tokens after the first one behind the context."""
    with torch.no_grad():
        logits = model(ids[:, context:-1], past_key_values=cache, use_cache=True).logits[0]
    return float(cross_entropy(logits.float(), ids[0, context + 1 :]))
