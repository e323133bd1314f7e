"""Writing pages of codes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ops.measuring import microseconds
from ops.packed import CASES
from ops.pages import page_bytes
from ops.shapes import MODELS, Model
from pyramidkv.ops.bitmap import pack_positions
from pyramidkv.ops.packing import naive, triton
from pyramidkv.ops.quantize import PAGE

__all__ = ["CASES", "check", "row"]


class Inputs(NamedTuple):
    """The arguments of `pack`."""

    key: Tensor  # keys and values are views of one projection
    value: Tensor
    index: Tensor  # every slot
    limits: list[int]
    recent: int
    pages: int
    bits: int
    even: bool


def inputs(model: Model, rows: int, slots: int, bits: int, count: int = 3) -> list[Inputs]:
    heads, size = model.kv_heads, model.size
    index = torch.arange(slots, device=model.device).expand(rows, heads, slots).contiguous()
    sets = []
    for _ in range(count):
        fused = model.random(rows, slots, heads, 2 * size).transpose(1, 2)
        pages = heads * slots // PAGE
        sets.append(Inputs(fused[..., :size], fused[..., size:], index, [slots] * rows, 0, pages, bits, False))
    return sets


def pack(x: Inputs) -> object:
    return triton.pack(*x)


def plain_pack(x: Inputs) -> object:
    return naive.pack(*x)


def check(models: Iterable[Model] = MODELS, rows: Iterable[int] = (1, 7), slots: int = 1536) -> bool:
    """Codes, scales and zero points equal plain torch to the last bit, in heads of unequal numbers of pages too."""
    equal = True
    for model, count, bits in itertools.product(models, rows, (8, 4, 2)):
        x = inputs(model, count, slots, bits, 1)[0]
        used = model.below(slots + 1, count, model.kv_heads)
        ragged = x.index.masked_fill(torch.arange(slots, device=model.device) < slots - used[..., None], -1)
        for case in (x._replace(even=True), x, x._replace(index=ragged, limits=used)):
            got, expected = triton.pack(*case), naive.pack(*case)
            for mine, theirs in zip(got[:2], expected[:2], strict=True):
                equal &= all(torch.equal(t, theirs.tensors()[name]) for name, t in mine.tensors().items())
            equal &= torch.equal(got[2], expected[2])
    return equal


def row(model: Model, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    """Writing all slots of a prompt into pages; with what is computed about them, and their positions."""
    sets = inputs(model, rows, slots, bits)
    index = sets[0].index
    places = index.int()
    bitmap = torch.empty(*index.shape[:2], -(-slots // 8), dtype=torch.uint8, device=index.device)
    moved = rows * model.kv_heads * slots // PAGE * (page_bytes(model, bits) + 2 * PAGE * model.vector)
    return {
        "model": model.name, "rows": rows, "slots": slots, "bits": bits,
        "floor": moved / bandwidth / 1e6,
        "kernel": microseconds(pack, sets),
        "naive": microseconds(plain_pack, sets[:1]),
        "positions": microseconds(lambda x: pack_positions(places, x, bitmap), [index]),
    }  # fmt: skip
