"""The same for a CPU: the codes of all pages are read as they lie, as strips (`ops/strips.py`).

`naive` moves all pages into slots and makes numbers of their codes first, which takes many times as long. Here all else
goes over logits and probabilities, of which there is one for each token and query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.ops.decode_attention import naive
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE
from pyramidkv.ops.strips import Strips


def packed_attention(
    query: Tensor, pages: Pages, keys: Tensor, values: Tensor, length: int, start: Tensor | None, scaling: float
) -> Tensor:
    """As `naive.packed_attention` over strips of codes, without a new token and with a number for `length`."""
    assert isinstance(pages.keys, Strips) and isinstance(pages.values, Strips)
    rows, kv_heads, _, size = keys.shape
    heads, places, most = rows * kv_heads, pages.places, pages.slots // PAGE
    new_keys, new_values = (t.flatten(0, 1).narrow(1, 0, length).float() for t in (keys, values))
    grouped = query.float().reshape(heads, -1, size) * scaling  # (B * H, G, D)
    groups = grouped.shape[1]
    older = pages.keys.sums(_one_more(grouped, places.spare).index_select(0, places.head))

    # Slots lie by 64, those of pages first: a page's logits are copied to their place whole.
    width = most + -(-length // PAGE)
    among, empty = places.among(groups, width)
    logits = grouped.new_full(((heads + places.spare) * groups * width, PAGE), float("-inf"))
    logits.index_copy_(0, among, older.view(-1, PAGE)).view(-1).index_fill_(0, empty, float("-inf"))
    logits = logits.view(-1, groups, width * PAGE)
    newest = torch.bmm(grouped, new_keys.mT)
    if start is not None:
        unused = ~naive.in_use(keys[:, :, :length], length, start).flatten(0, 1)
        newest.masked_fill_(unused[:, None], float("-inf"))
        new_values = new_values.masked_fill(unused[..., None], 0.0)  # they may be NaN
    logits[:heads].narrow(2, most * PAGE, length).copy_(newest)
    weights = logits.softmax(-1)
    if start is not None:  # else a head without a token has nothing to weigh
        weights.masked_fill_(logits.amax(-1, keepdim=True).isneginf(), 0.0)

    older = pages.values.sums(weights.view(-1, PAGE).index_select(0, among).view(-1, groups, PAGE))
    out = torch.bmm(weights[:heads].narrow(2, most * PAGE, length), new_values)
    out = _one_more(out, places.spare).index_add_(0, places.head, older)[:heads]
    return out.view(rows, -1, 1, values.shape[-1]).to(query.dtype)


def _one_more(numbers: Tensor, wanted: bool) -> Tensor:
    """(H, G, D), with a head more for the pages that are nobody's, if there are such."""
    return pad(numbers, (0, 0, 0, 0, 0, 1)) if wanted else numbers
