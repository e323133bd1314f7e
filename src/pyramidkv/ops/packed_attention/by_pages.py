"""The same in plain torch for a CPU: codes are read where they lie, some pages at a time, and few passes go over them.

`naive` moves all pages into slots and makes numbers of their codes first, which takes several times as long as reading
a full cache does. Here the codes of a page become float32 and are multiplied with a vector: keys with a query that
already has the page's scales in it, values with probabilities that have their tokens'. Zero points are products of
their own, of the few numbers that they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE, Codes, unpack_codes

AT_ONCE = 1 << 19  # numbers: more leave the cache, fewer are not worth a call


def packed_attention(
    query: Tensor, pages: Pages, keys: Tensor, values: Tensor, length: int, start: Tensor | None, scaling: float
) -> Tensor:
    """As `naive.packed_attention` without a new token and with a number for `length`."""
    rows, kv_heads, _, size = keys.shape
    keys, values = keys[:, :, :length].float(), values[:, :, :length].float()
    grouped = query.float().reshape(rows, kv_heads, -1, size) * scaling  # (B, H, G, D)
    groups, old = grouped.shape[2], pages.slots
    places = old // PAGE  # of a head
    newest = grouped @ keys.mT
    if start is not None:
        unused = ~naive.in_use(keys, length, start)
        newest.masked_fill_(unused[:, :, None], float("-inf"))
        values = values.masked_fill(unused[..., None], 0.0)  # they may be NaN

    # Places of all heads (B * H * places, G, 64) while pages are read, (B, H, G, slots) in between.
    older = grouped.new_full((rows * kv_heads * places, groups, PAGE), float("-inf"))
    read = [(row, head, place) for row, (head, place) in enumerate(pages.places) if len(head)]
    for row, head, place in read:
        older[place] = _logits(_of_row(pages.keys, row, len(head)), grouped.flatten(0, 1)[head])
    older = older.view(rows, kv_heads, places, groups, PAGE).transpose(2, 3).flatten(3)
    logits = torch.cat([older.masked_fill_(~pages.valid()[:, :, None], float("-inf")), newest], 3)
    weights = logits.softmax(-1).masked_fill_(logits.amax(-1, keepdim=True).isneginf(), 0.0)

    older = weights[..., :old].reshape(rows, kv_heads, groups, places, PAGE)
    older = older.transpose(2, 3).reshape(-1, groups, PAGE)
    out = (weights[..., old:] @ values).flatten(0, 1)
    for row, head, place in read:
        out.index_add_(0, head, _sums(_of_row(pages.values, row, len(head)), older[place]))
    result: Tensor = out.view(rows, -1, 1, values.shape[-1]).to(query.dtype)
    return result


def _of_row(codes: Codes, row: int, pages: int) -> Codes:
    """The first so many pages of a row, (N, ...)."""
    return codes.each(lambda t: t[row, :pages])


def _logits(keys: Codes, query: Tensor) -> Tensor:
    """(N, G, 64): products of the keys in each of N pages with queries (N, G, D) of its own."""
    if keys.scale is None or keys.zero is None:
        return _products(keys, query, -2)
    zero = torch.linalg.vecdot(query, keys.zero[:, None].float())
    return _products(keys, query * keys.scale[:, None], -2).add_(zero[..., None])


def _sums(values: Codes, weights: Tensor) -> Tensor:
    """(N, G, Dv): sums of the values in each of N pages, weighted by (N, G, 64)."""
    if values.scale is None or values.zero is None:
        return _products(Codes(values.codes.mT.contiguous(), None, None, values.bits), weights, -1)
    scale, zero = (t.float().mT[:, :, None] for t in (values.scale, values.zero))  # (N, parts, 1, 64)
    pages, parts = scale.shape[:2]  # channels that share a scale are as a page of their own
    codes = values.codes.view(pages * parts, -1, values.codes.shape[2])
    weights = weights[:, None]
    sums = _products(Codes(codes, None, None, values.bits), (weights * scale).flatten(0, 1), -1)
    sums = sums.view(pages, parts, *sums.shape[1:]) + (weights * zero).sum(-1, keepdim=True)
    return sums.transpose(1, 2).flatten(2)


def _products(codes: Codes, vectors: Tensor, dim: int) -> Tensor:
    """(N, G, A): products of each of A rows of C codes, in each of N pages, with G vectors (N, G, C).

    Tokens lie along `dim`. By elements, and then summed by BLAS: a small product for each page would take longer.
    """
    pages, groups, size = vectors.shape
    long = PAGE if dim == -2 else codes.codes.shape[1]
    out = vectors.new_empty(groups, pages, long)
    ones, some = vectors.new_ones(size), max(AT_ONCE // (long * size), 1)
    for at in range(0, pages, some):
        numbers = codes.codes[at : at + some]
        numbers = (numbers if codes.bits == 16 else unpack_codes(numbers, codes.bits, dim)).float()
        for vector, found in zip(vectors[at : at + some].unbind(1), out[:, at : at + some], strict=True):
            torch.mv((numbers * vector[:, None]).flatten(0, 1), ones, out=found.view(-1))
    return out.transpose(0, 1)
