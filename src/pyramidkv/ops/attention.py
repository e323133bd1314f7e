"""Attention of new queries over kept and new keys, by torch's SDPA."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from pyramidkv.ops.ragged_attention import ragged_attention
from pyramidkv.ops.ragged_attention import why_not as why_not_ragged
from pyramidkv.ops.split_attention import split_attention
from pyramidkv.ops.split_attention import why_not as why_not_split
from pyramidkv.ops.valid import by_head

# cuDNN attention makes a plan for every new shape. In a prefill all layers have one shape; afterwards each layer has a
# length of its own, which grows at every token.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    *,
    holes: bool = True,
) -> Tensor:
    """Causal attention; the queries are the last Q of the K tokens.

    Args:
        query: (B, Hq, Q, D).
        key, value: (B, Hkv, K, D), Hq a multiple of Hkv.
        scaling: factor of the logits.
        valid: (B, K) or (B, Hkv, K) bool, False for padding and empty slots; None means that all are real.
        dropout: probability, for training.
        holes: empty slots may lie behind real ones; if not, several queries need no mask on a GPU.

    Returns:
        (B, Hq, Q, D); rows of queries that see nothing are zero.
    """
    if query.shape[2] == key.shape[2] and valid is None:
        groups = query.shape[1] // key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
        )
    if valid is None and why_not_split(query, key, value, dropout) is None:
        return split_attention(query, key, value, scaling)
    if valid is not None and not holes and query.shape[2] > 1 and why_not_ragged(query, key, value, dropout) is None:
        return ragged_attention(query, key, value, scaling, valid)
    with _backends(query):
        return _over_past(query, key, value, scaling, valid, dropout)


def _backends(query: Tensor) -> AbstractContextManager[object]:
    return sdpa_kernel(BACKENDS) if query.is_cuda else nullcontext()


def _over_past(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, valid: Tensor | None, dropout: float
) -> Tensor:
    heads, queries = query.shape[1], query.shape[2]
    kv_heads, keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    if queries == 1:
        # One query a head: the query heads of a KV head become its rows, and no key is repeated.
        mask = None if valid is None else by_head(valid)[:, :, None, :]
        packed = query.reshape(query.shape[0], kv_heads, groups, -1)
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
        return out.reshape(query.shape[0], heads, 1, -1)
    if groups > 1:  # a mask and grouped heads together would fall to the slow math kernel
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if valid is None:
        mask = causal_lower_right(queries, keys)
    else:
        row = torch.arange(keys - queries, keys, device=key.device)
        real = by_head(valid)
        if real.shape[1] > 1:
            real = real.repeat_interleave(groups, dim=1)
        mask = (torch.arange(keys, device=key.device) <= row[:, None]) & real[:, :, None, :]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
