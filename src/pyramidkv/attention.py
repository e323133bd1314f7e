"""The attention and mask functions that `transformers` calls under the name "pyramidkv".

The mask function returns no mask but `NewTokens`, which rows' new tokens are real: every layer has kept other keys, so
no one mask fits all of them, and each builds what it needs from the slots it holds. Layers that are not compressed
(sliding windows, or a forward without a cache) run as under "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyramidkv.cache import ATTENTION_NAME
from pyramidkv.decode.step import StepLayer
from pyramidkv.errors import ConfigError, UnsupportedError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.new_tokens import ONE_REAL, NewTokens


def new_tokens(attention_mask: Tensor | None, queries: int) -> NewTokens:
    """Read a (B, columns) padding mask's last `queries` columns; once a forward, before any layer runs.

    On a GPU a single new token is taken as real without looking: that is what `generate()` feeds, and looking would
    make the host wait for the device at every token.
    """
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < queries):
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for {queries} new tokens: it must be "
            "(batch, tokens), with a column for every token seen or at least for every new one"
        )
    if queries == 1 and (attention_mask is None or attention_mask.device.type != "cpu"):
        return ONE_REAL
    if attention_mask is None:
        return NewTokens()
    valid = attention_mask[:, -queries:].to(torch.bool)
    if bool(valid.all()):
        return NewTokens()
    if queries > 1 and bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        row = int((valid[:, :-1] & ~valid[:, 1:]).any(1).nonzero()[0, 0])
        raise ConfigError(
            f"attention_mask has padding after a token in row {row}: pad on the left (tokenizer.padding_side='left')"
        )
    return NewTokens(valid, tuple(valid.sum(1).tolist()))


def pyramidkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> NewTokens | Tensor | None:
    """The mask function: `NewTokens` for plain causal layers; for sliding windows and others what "sdpa" would get."""
    if q_length == 0:
        # generate() takes what a cache has seen off the front of input_ids, unless the mask covers more than those.
        behind = (
            f" behind the {kv_length} that past_key_values has seen: give generate() the whole text, those included, "
            "or the new tokens and an attention_mask with a column for every token seen and every new one"
        )
        raise ConfigError(f"input_ids has zero tokens{behind if kv_length else '; a forward needs at least one'}")
    if mask_function is causal_mask_function:
        offset = kwargs.get("q_offset", 0)
        if isinstance(offset, Tensor) or kv_length != offset + q_length:
            raise UnsupportedError(
                "past_key_values is a StaticCache, or attention_mask is longer than what was seen: a compressed model "
                "needs a PyramidKVCache; leave out cache_implementation, and give the mask one column a token"
            )
        if attention_mask is not None and attention_mask.shape[0] != batch_size:
            raise ConfigError(
                f"attention_mask has shape {tuple(attention_mask.shape)} for {batch_size} rows of tokens: "
                "it needs a row each"
            )
        return new_tokens(attention_mask, q_length)
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )
    return mask


def pyramidkv_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: NewTokens | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, Hq, Q, D) to output (B, Q, Hq, D); evicts when Q > 1."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} passes {name}, which attention {ATTENTION_NAME!r} does not apply"
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedError("output_attentions=True: attention weights are never materialised here; leave it out")
    layer: PyramidKVLayer | StepLayer | None = getattr(key, "pyramidkv_layer", None)
    if layer is None:
        mask = _uncompressed_mask(query, key, value, attention_mask, kwargs)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    key.pyramidkv_layer = None  # type: ignore[attr-defined]  # used once: the tensor may outlive this call
    if not isinstance(attention_mask, NewTokens):
        raise UnsupportedError(
            "attention_mask: a compressed layer takes a 2-D padding mask (batch, tokens) or none; "
            f"got {type(attention_mask).__name__} for {type(module).__name__}"
        )
    layer.check(module.config)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, key, value, attention_mask, scaling, dropout)
    return out.transpose(1, 2).contiguous(), None


def _uncompressed_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: NewTokens | Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    if not isinstance(mask, NewTokens):
        return mask  # a sliding-window layer, or a mask made by the caller
    if key.shape[2] != query.shape[2] or kwargs.get("use_cache", _copied(value)):
        raise UnsupportedError(
            f"attn_implementation={ATTENTION_NAME!r} was given a plain transformers cache and would compress nothing: "
            "pass past_key_values=pyramidkv.PyramidKVCache(model.config, ...), or use pyramidkv.compress(model, ...)"
        )
    if mask.valid is None:
        return None
    rows, columns = mask.valid.shape
    plain: Tensor | None = sdpa_mask(rows, columns, columns, attention_mask=mask.valid, device=key.device)
    return plain


def _copied(value: Tensor) -> bool:
    """Whether (B, H, T, D) values come from a cache, which has copied them; a layer's own are a view of (B, T, H, D).

    For models that do not say whether they use a cache (Gemma 3). Of a single token nothing can be told.
    """
    tokens, width = value.shape[2:]
    return tokens > 1 and value.stride()[1:] == (tokens * width, width, 1)


def register() -> None:
    """Make "pyramidkv" known to `transformers`; doing it again is harmless."""
    AttentionInterface.register(ATTENTION_NAME, pyramidkv_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, pyramidkv_mask)
