"""The same for a CPU where pages are no strips, as in 16 bits: head by head, since its pages lie side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import Codes, dequantize_keys, dequantize_values


def packed_attention(
    query: Tensor, pages: Pages, keys: Tensor, values: Tensor, length: int, start: Tensor | None, scaling: float
) -> Tensor:
    """As `naive.packed_attention`, without a new token and with a number for `length`."""
    rows, kv_heads, _, size = keys.shape
    grouped = query.float().reshape(rows * kv_heads, 1, -1, size)  # (B * H, 1, G, D)
    codes = pages.keys.plain(), pages.values.plain()
    begins = [0] * len(grouped) if start is None else start.flatten().tolist()
    found = []
    for head, (first, count, empty) in enumerate(pages.layout.flatten(1).T.tolist()):
        row, slots = head // kv_heads, slice(begins[head], length)
        mine = row, slice(first, first + count)
        key = _tokens(dequantize_keys, codes[0], mine, empty, keys[row, head % kv_heads, slots])
        value = _tokens(dequantize_values, codes[1], mine, empty, values[row, head % kv_heads, slots])
        found.append(scaled_dot_product_attention(grouped[head], key, value, scale=scaling))
    return torch.stack(found).view(rows, -1, 1, values.shape[-1]).to(query.dtype)


def _tokens(
    dequantize: Callable[[Codes, torch.dtype], Tensor],
    codes: Codes,
    pages: tuple[int, slice],
    empty: int,
    newest: Tensor,
) -> Tensor:
    """(1, N, D) float32: what is in some pages of a row, but for the first slots, and what follows it."""
    older = dequantize(codes.each(lambda t: t[pages]), torch.float32).flatten(0, 1)
    return torch.cat([older[empty:], newest.float()])[None]
