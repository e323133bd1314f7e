"""The plain torch definition, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
    ring: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query a row over the slots [start, length) of its buffers.

    Args:
        query: (B, Hq, 1, D).
        keys: (B, Hkv, C, D), values: (B, Hkv, C, Dv), Hq a multiple of Hkv; query head h reads h // (Hq // Hkv).
        length: slots in use; a number, or an int32 tensor of shape (1,) or (B, Hkv).
        start: (B, Hkv) int32, the first slot of each row and head that holds a token; None: 0.
        scaling: factor of the logits.
        new: key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv) of a new token, attended to as well and written into slot
            `length` of the buffers, which must be below C.
        ring: (B, Hq, R, D), into slot `length` modulo R of which the query is written; only with `new`. None: nowhere.

    Returns:
        (B, Hq, 1, Dv) in the dtype of the query; zeros for rows with no slots.
    """
    if new is not None:
        for buffer, tensor in zip((keys, values), new, strict=True):
            write(buffer, tensor, length)
        if ring is not None:
            write(ring, query, ring_slot(length, ring, query.shape[1] // keys.shape[1]))
        length = length + 1
    if isinstance(length, int):  # nothing to mask behind it
        keys, values = keys[:, :, :length], values[:, :, :length]
    return over(query, keys, values, in_use(keys, length, start), scaling)


def in_use(keys: Tensor, length: int | Tensor, start: Tensor | None) -> Tensor:
    """(B, H, C) bool: which slots of (B, H, C, D) buffers lie in [start, length)."""
    slot = torch.arange(keys.shape[2], device=keys.device)
    if isinstance(length, Tensor):
        length = length.reshape(-1, 1, 1) if length.numel() == 1 else length[..., None]
    used = (slot < length).expand(keys.shape[:3])
    return used if start is None else used & (slot >= start[..., None])


def over(query: Tensor, keys: Tensor, values: Tensor, used: Tensor, scaling: float) -> Tensor:
    """Attention of (B, Hq, 1, D) queries over the slots of (B, Hkv, C, *) that `used`, (B, Hkv, C) bool, names."""
    batch, heads = query.shape[:2]
    kv_heads = keys.shape[1]
    # Unused slots may hold anything, NaN too, which a probability of 0 would not take away.
    value = values.float().masked_fill(~used[..., None], 0.0)
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, -1)
    logits = (grouped @ keys.float().transpose(-1, -2)) * scaling  # (B, Hkv, G, C)
    probability = logits.masked_fill(~used[:, :, None], float("-inf")).softmax(-1)
    probability = probability.masked_fill(~used.any(-1)[..., None, None], 0.0)
    return (probability @ value).reshape(batch, heads, 1, -1).to(query.dtype)


def write(buffer: Tensor, tensor: Tensor, slot: int | Tensor) -> None:
    """Put (B, H, 1, D) into a slot of each row and head of (B, H, C, D)."""
    if isinstance(slot, int):
        buffer[:, :, slot] = tensor[:, :, 0]
        return
    index = slot.long().reshape(1, 1) if slot.numel() == 1 else slot.long()
    wide = index[..., None, None].expand_as(tensor)
    buffer.scatter_(2, wide, tensor.to(buffer.dtype))


def ring_slot(length: int | Tensor, ring: Tensor, groups: int) -> int | Tensor:
    """Where a query goes in a ring (B, Hq, R, D); `groups` query heads have the length of one KV head."""
    slot = length % ring.shape[2]
    return slot if isinstance(slot, int) or slot.numel() == 1 else slot.repeat_interleave(groups, 1)
