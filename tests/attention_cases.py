"""Inputs of attention and of scores as layers have them, NaN where no token is, and attention by loops."""

import torch

from kernel_testing import random
from pyramidkv.ops.valid import by_head


def scores_case(shape, dtype, kind, device="cpu"):
    """Queries and keys as views of one fused projection, and which keys are real."""
    batch, heads, kv_heads, size, queries, keys = shape
    fused = random(batch, keys, heads + 2 * kv_heads, size, dtype=dtype, device=device).transpose(1, 2)
    query, key = fused[:, :heads, keys - queries :], fused[:, heads : heads + kv_heads]
    valid = None
    if kind != "none":
        valid = torch.arange(keys) >= torch.arange(batch)[:, None] * 5 % keys + 1
        if kind == "holes":
            valid &= torch.arange(keys) % 4 != 2
        padding = ~valid[:, None, keys - queries :, None].to(device)
        if kind == "heads":  # the past of each its own
            valid = valid[:, None].repeat(1, kv_heads, 1)
            past = torch.arange(keys - queries) % 5 > torch.arange(kv_heads)[:, None] % 3
            valid[..., : keys - queries] &= past
        valid = valid.to(device)
        where = ~by_head(valid)[..., None]
        key = key.masked_fill(where, float("nan"))  # what padding holds is nobody's business
        query = query.masked_fill(padding, float("nan"))
    return query, key, valid


def slots_case(shape, dtype, kind, device="cpu", room=True):
    """Buffers that are NaN where no slot is used, lengths, starts, used slots; `room`: a slot is free everywhere."""
    batch, kv_heads, capacity, _ = shape
    keys, values = (random(*shape, seed=seed, dtype=dtype, device=device) for seed in (2, 3))
    rows = torch.arange(batch * kv_heads, dtype=torch.int32).reshape(batch, kv_heads)
    start = None
    if kind == "number":
        length = lengths = capacity - 1
    elif kind == "one":
        length, lengths = torch.tensor([capacity // 2 + 1], dtype=torch.int32), capacity // 2 + 1
    elif kind == "none":
        length, lengths = 0, 0
    else:  # each row and head its own, one of them with no slots
        length = lengths = (capacity - room - rows * 11) % (capacity + 1 - room)
        start = (lengths * (rows % 3)) // 3
        start[-1, -1] = lengths[-1, -1]
        lengths = lengths[..., None]
    slot = torch.arange(capacity)
    used = (slot < lengths).expand(batch, kv_heads, capacity)
    if start is not None:
        used = used & (slot >= start[..., None])
    used = used.to(device)
    keys, values = (t.masked_fill(~used[..., None], float("nan")) for t in (keys, values))
    length, start = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (length, start))
    return keys, values, length, start, used


def new_token(keys):
    """Key and value of one more token, views of one fused projection."""
    batch, heads, _, size = keys.shape
    fused = random(batch, heads, 1, 2 * size, seed=4, dtype=keys.dtype, device=keys.device)
    return fused[..., :size], fused[..., size:]


def ring_for(query, slots, dtype=None):
    """A ring of queries as a view whose heads lie apart."""
    batch, heads, _, size = query.shape
    return torch.full((batch, slots, heads, size), 7.0, dtype=dtype or query.dtype, device=query.device).transpose(1, 2)


def exact_decode(query, keys, values, used, scaling):
    """The definition by loops over rows and heads, float64."""
    batch, heads, _, size = query.shape
    kv_heads = keys.shape[1]
    out = torch.zeros(batch, heads, 1, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            slots = used[b, g].nonzero()[:, 0]
            share = (keys[b, g, slots].double() @ query[b, h, 0].double() * scaling).softmax(0)
            out[b, h, 0] = share @ values[b, g, slots].double()
    return out
