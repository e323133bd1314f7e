"""The same for a CPU: the codes of all pages are read as they lie, as strips (`ops/strips.py`).

`naive` moves all pages into slots and makes numbers of their codes first, which takes many times as long. Here all else
goes over logits and probabilities, of which there is one for each token and query, in as few calls as possible: over so
few numbers a call costs more than what it does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE
from pyramidkv.ops.strips import Strips


def packed_attention(
    query: Tensor, pages: Pages, keys: Tensor, values: Tensor, length: int, start: Tensor | None, scaling: float
) -> Tensor:
    """As `naive.packed_attention` over strips of codes, without a new token and with a number for `length`."""
    assert isinstance(pages.keys, Strips) and isinstance(pages.values, Strips)
    rows, kv_heads, capacity, size = keys.shape
    heads, places, width = rows * kv_heads, pages.places, pages.values.width
    count = len(places.head)
    grouped = (query.float() * scaling).reshape(heads, -1, size)  # (B * H, G, D)
    groups, parts, more = grouped.shape[1], values.shape[3] // width, -(-length // PAGE)
    moves = places.moves(groups, parts, size, more)
    new_keys, new_values = (t.view(heads, capacity, -1).narrow(1, 0, length).float() for t in (keys, values))

    # Slots lie by 64, those of pages first, so that the weights of a page are a row.
    each = grouped.view(-1, size).index_select(0, moves.queries)
    older = pages.keys.sums(each.view(groups, count, size), moves.keys).view(groups, *places.hidden.shape)
    older.masked_fill_(places.hidden, float("-inf"))
    newest = torch.bmm(grouped, new_keys.mT)
    if start is not None:
        unused = ~naive.in_use(keys[:, :, :length], length, start).flatten(0, 1)
        newest.masked_fill_(unused[:, None], float("-inf"))
        new_values = new_values.masked_fill(unused[..., None], 0.0)  # they may be NaN
    logits = torch.cat([older, newest.transpose(0, 1), _nothing(groups, heads, more * PAGE - length)], -1)
    weights = logits.softmax(-1)
    if start is not None:  # else a head without a token has nothing to weigh
        weights.masked_fill_(logits.amax(-1, keepdim=True).isneginf(), 0.0)

    each = weights.view(-1, PAGE).index_select(0, moves.weights)
    older = pages.values.sums(each.view(groups, parts, count, PAGE), moves.values).view(groups, parts, heads, 2, width)
    older = older.select(3, 1).permute(2, 0, 1, 3).flatten(2)  # the others are of what is nobody's
    newest = weights.narrow(2, places.hidden.shape[1], length).transpose(0, 1)
    out = torch.baddbmm(older, newest, new_values)
    return out.view(rows, -1, 1, values.shape[3]).to(query.dtype)


@lru_cache(maxsize=1)
def _nothing(groups: int, heads: int, slots: int) -> Tensor:
    """Logits of slots that are not there; the layers of a model ask for the same."""
    return torch.full((groups, heads, slots), float("-inf"))
