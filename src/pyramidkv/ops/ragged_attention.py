"""Causal attention where rows or heads have unequal numbers of tokens: torch's flash kernel, told where each begins.

A mask of (B, Hq, Q, K) would be larger than the keys it hides, and end the flash kernel. But empty slots lie in front
of a head's tokens, so a row and KV head is a sequence of its own: where it begins and how long it is, is all there is
to say, and both stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyramidkv.ops.valid import by_head

# (query (T, G, D), key (S, 1, D), value (S, 1, D), first query (N + 1,), first key (N + 1,), most queries, most keys,
# keys in use (N,), scaling) to (T, G, D): sequence n attends causally, its last query to its last key.
Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, Tensor, float], Tensor]


def why_not(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """Why torch's flash kernel can't serve a call; None if it can."""
    if not query.is_cuda or torch.version.hip is not None:
        return "it is for CUDA"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it does not read {str(query.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if query.shape[-1] % 8 or query.shape[-1] > 256 or value.shape[-1] != query.shape[-1]:
        return f"head size {query.shape[-1]} is not a multiple of 8 up to 256"
    if not query.dtype == key.dtype == value.dtype:
        return "keys and queries have unequal dtypes"
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        return "a gradient is asked for"
    return None


def ragged_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, valid: Tensor, flash: Flash | None = None
) -> Tensor:
    """Causal attention; the queries are the last Q of the K slots, and the empty slots the first of each row and head.

    Args:
        query: (B, Hq, Q, D).
        key, value: (B, Hkv, K, D), Hq a multiple of Hkv.
        scaling: factor of the logits.
        valid: (B, K) or (B, Hkv, K) bool, no True before a False.
        flash: the kernel; None: torch's own.

    Returns:
        (B, Hq, Q, D); rows of queries that see nothing are zero.
    """
    rows, heads, queries, width = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    # Of one row, what is expanded can be flattened without a copy, and the kernel wants its numbers side by side.
    used = by_head(valid).sum(-1, dtype=torch.int32).expand(rows, kv_heads).reshape(-1).contiguous()
    number = torch.arange(rows * kv_heads + 1, dtype=torch.int32, device=query.device)
    first_key = number * slots
    first_key[:-1] += slots - used
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, queries, width).transpose(2, 3)
    out = (flash or _flash)(
        grouped.reshape(-1, heads // kv_heads, width),
        key.reshape(-1, 1, width),
        value.reshape(-1, 1, width),
        number * queries,
        first_key,
        queries,
        slots,
        used,
        scaling,
    )
    return out.view(rows, kv_heads, queries, heads // kv_heads, width).transpose(2, 3).reshape(query.shape)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_query: Tensor,
    first_key: Tensor,
    queries: int,
    keys: int,
    used: Tensor,
    scaling: float,
) -> Tensor:
    """Reads `used` keys of each sequence from its first on, whatever lies behind them."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, first_query, first_key, queries, keys, 0.0, True, False, scale=scaling, seqused_k=used
    )[0]
    return out
