"""The plain torch definition, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.pages import Pages


def packed_attention(
    query: Tensor,
    pages: Pages,
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
    ring: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query a row over the tokens in pages and the slots [start, length) of buffers.

    Args:
        query: (B, Hq, 1, D).
        pages: of (B, Hkv) heads, Hq a multiple of Hkv; query head h reads h // (Hq // Hkv).
        keys: (B, Hkv, C, D), values: (B, Hkv, C, Dv): the newest slots, not packed.
        length: newest slots in use; a number, or an int32 tensor of shape (1,) or (B, Hkv).
        start: (B, Hkv) int32, the first of them that holds a token; None: 0.
        scaling: factor of the logits.
        new: key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv) of a new token, attended to as well and written into slot
            `length` of the buffers, which must be below C.
        ring: (B, Hq, R, D), into slot `length` modulo R of which the query is written; only with `new`. None: nowhere.

    Returns:
        (B, Hq, 1, Dv) in the dtype of the query; zeros for rows with no tokens.
    """
    if new is not None:
        naive.write(keys, new[0], length)
        naive.write(values, new[1], length)
        if ring is not None:
            naive.write(ring, query, naive.ring_slot(length, ring, query.shape[1] // keys.shape[1]))
        length = length + 1
    all_keys, all_values = pages.followed_by((keys.float(), values.float()))
    used = torch.cat([pages.valid(), naive.in_use(keys, length, start)], 2)
    return naive.over(query, all_keys, all_values, used, scaling)
