"""A prompt fed in chunks, each layer back at its budget after each: memory for chunk and budget, not for the prompt."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.methods import METHODS
from pyramidkv.ops.split_attention import STEP
from pyramidkv.unread import unread


def prefill(
    model: Any, input_ids: Tensor, cache: PyramidKVCache, *, chunk: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Feed a prompt to an empty cache in chunks; returns the logits (B, V) of its last token.

    The cache is told how long the prompt is, so a share of it is that of the whole prompt from the first chunk on. The
    chunks are as even as can be, so that the last, whose queries decide last, is not a mere remainder.

    Args:
        model: a causal language model under the "pyramidkv" attention.
        input_ids: (B, T), padded on the left.
        cache: an empty `PyramidKVCache` of the model.
        chunk: tokens fed at once, at most; at least the observation window.
        attention_mask: (B, T), 0 for padding; None: no padding.

    Raises:
        ConfigError: `chunk` or a shape is not what is allowed, or the cache has seen tokens; nothing was fed.
    """
    if not isinstance(cache, PyramidKVCache):
        raise ConfigError(f"cache is a {type(cache).__name__}: it must be a PyramidKVCache")
    check_prompt(input_ids, attention_mask, chunk, cache.config)
    if cache.get_seq_length() > 0:
        raise ConfigError(
            f"cache has seen {cache.get_seq_length()} tokens: prefill() begins a context; feed another turn to the "
            "model itself, or reset() the cache"
        )
    logits = feed(model, input_ids, cache, chunk=chunk, attention_mask=attention_mask, read=True)
    return logits[:, -1]


def feed(
    model: Any, input_ids: Tensor, cache: PyramidKVCache, *, chunk: int, attention_mask: Tensor | None, read: bool
) -> Tensor:
    """As `prefill`, of what has been checked; returns the logits (B, 1, V), garbage unless they are to be `read`."""
    tokens = input_ids.shape[1]
    if attention_mask is None:
        counts, positions = [tokens] * len(input_ids), None
    else:
        counts = attention_mask.sum(1).tolist()
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    cache.expect_prompt(counts)
    start = 0
    with torch.no_grad(), ExitStack() as idle:
        idle.enter_context(unread(model, cache))
        for size in even_sizes(tokens, chunk):
            part = slice(start, start + size)
            inputs = {} if attention_mask is None else {"attention_mask": attention_mask[:, : part.stop]}
            if positions is not None:
                inputs["position_ids"] = positions[:, part]
            start += size
            if read and start == tokens:
                idle.close()
            out = model(input_ids[:, part], past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
    logits: Tensor = out.logits
    return logits


def even_sizes(tokens: int, chunk: int) -> list[int]:
    """Sizes of the fewest chunks of at most `chunk` tokens, all as large as each other, or one token larger.

    Large chunks but the first are multiples of `STEP` tokens, at most one `STEP` larger than each other: attention
    plans for every size that it meets, and so they recur from prompt to prompt.
    """
    step = STEP if chunk >= 8 * STEP else 1
    number = -(-tokens // (chunk - chunk % step))
    steps, rest = divmod(tokens, step)
    sizes = [step * (steps // number + (i >= number - steps % number)) for i in range(number)]
    sizes[0] += rest
    return sizes


def check_prompt(input_ids: Any, attention_mask: Any, chunk: Any, config: CompressionConfig) -> None:
    """Raise `ConfigError` for what is no batch of tokens, no mask of it, or no chunk that `config` allows."""
    check_chunk(chunk, config)
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor) and (name == "input_ids" or value is not None):
            raise ConfigError(f"{name} is a {type(value).__name__}: it must be a tensor, (batch, tokens)")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ConfigError(f"input_ids has shape {tuple(input_ids.shape)}: it must be (batch, tokens), with a token")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ConfigError(f"input_ids has dtype {input_ids.dtype}: tokens are integers")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )


def asked_chunk(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The `prefill_chunk_size` of a call `model.generate(*args, **kwargs)`, as transformers finds it; None: none."""
    if "prefill_chunk_size" in kwargs:
        return kwargs["prefill_chunk_size"]
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    sizes = [getattr(config, "prefill_chunk_size", None) for config in (given, model.generation_config)]
    return next((size for size in sizes if size is not None), None)


def check_chunk(chunk: Any, config: CompressionConfig, name: str = "chunk") -> None:
    """Raise `ConfigError` for a chunk that shows a scorer less than its window. A method's own window is "up to".

    `name` is what the caller calls it.
    """
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise ConfigError(f"{name}={chunk!r}: must be a whole number of tokens, at least 1")
    own = config.window == METHODS[config.method].window
    least = config.floor if own else max(config.window, config.floor)
    if config.method != "full" and chunk < least:
        more = config.floor - config.recent
        why = f"the {config.recent} newest, which are kept, and {more} more" if own else f"window={config.window}"
        raise ConfigError(f"{name}={chunk}: must be at least {least} tokens ({why})")
