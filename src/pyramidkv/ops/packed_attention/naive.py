"""The plain torch definition, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.pages import Pages


def packed_attention(
    query: Tensor,
    tiers: Sequence[Pages],
    keys: Tensor,
    values: Tensor,
    length: int | Tensor,
    start: Tensor | None,
    scaling: float,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention of one query a row over the tokens of tiers of pages and the slots [start, length) of buffers.

    Args:
        query: (B, Hq, 1, D).
        tiers: pages of (B, Hkv) heads, Hq a multiple of Hkv; query head h reads h // (Hq // Hkv).
        keys: (B, Hkv, C, D), values: (B, Hkv, C, Dv): the newest slots, not packed.
        length: newest slots in use; a number, or an int32 tensor of shape (1,) or (B, Hkv).
        start: (B, Hkv) int32, the first of them that holds a token; None: 0.
        scaling: factor of the logits.
        new: key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv) of a new token, attended to as well and written into slot
            `length` of the buffers, which must be below C.

    Returns:
        (B, Hq, 1, Dv) in the dtype of the query; zeros for rows with no tokens.
    """
    if new is not None:
        naive.write(keys, new[0], length)
        naive.write(values, new[1], length)
        length = length + 1
    all_keys, all_values, used = [], [], []
    for tier in tiers:
        key, value = tier.unpack(torch.float32)
        all_keys.append(key)
        all_values.append(value)
        used.append(tier.valid())
    all_keys.append(keys.float())
    all_values.append(values.float())
    used.append(naive.in_use(keys, length, start))
    return naive.over(query, torch.cat(all_keys, 2), torch.cat(all_values, 2), torch.cat(used, 2), scaling)
