"""Reading pages of codes back, as a further chunk of a prompt wants them, and the positions of their slots."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ops.measuring import microseconds, uncaptured
from ops.pages import page_bytes, random_pages
from ops.shapes import LLAMA, MODELS, PYTHIA, ROOM, Model
from pyramidkv.ops.bitmap import naive as bitmap_naive
from pyramidkv.ops.bitmap import unpack_positions
from pyramidkv.ops.quantize import PAGE, Codes
from pyramidkv.ops.unpacking import naive, triton

CASES = (  # model, rows, slots, bits
    *((PYTHIA, 1, 25984, bits) for bits in (8, 4, 2)),
    (PYTHIA, 1, 8192, 4), (LLAMA, 1, 25984, 4), (PYTHIA, 8, 6144, 4),
)  # fmt: skip


class Inputs(NamedTuple):
    """The arguments of `unpack`."""

    keys: Codes
    values: Codes
    layout: Tensor
    into: tuple[Tensor, Tensor]  # parts of larger tensors of NaN


def inputs(model: Model, rows: int, slots: int, bits: int, ragged: bool, count: int = 2) -> list[Inputs]:
    sets = []
    for _ in range(count):
        pages = random_pages(model, rows, slots, bits, ragged)
        end = PAGE * pages.most
        keys, values = (model.empty(rows, model.kv_heads, end + ROOM, model.size)[:, :, :end] for _ in range(2))
        sets.append(Inputs(pages.keys, pages.values, pages.layout, (keys, values)))
    return sets


def unpack(x: Inputs, warps: int) -> None:
    triton.unpack(*x, warps=warps)


def unpack_as_chosen(x: Inputs) -> None:
    triton.unpack(*x)


def plain_unpack(x: Inputs) -> None:
    naive.unpack(*x)


def random_bitmap(model: Model, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, device=model.device, dtype=torch.uint8)


def check(
    models: Iterable[Model] = MODELS,
    rows: Iterable[int] = (1, 7),
    slots: int = 1536,
    tokens: Iterable[int] = (700, 32768),
) -> bool:
    """Keys, values and positions equal plain torch to the last bit, in heads of unequal numbers of pages too."""
    models, equal = tuple(models), True
    for model, count, bits, ragged in itertools.product(models, rows, (8, 4, 2), (False, True)):
        x = inputs(model, count, slots, bits, ragged, 1)[0]
        expected = (torch.empty_like(x.into[0]), torch.empty_like(x.into[1]))
        triton.unpack(*x)
        naive.unpack(*x._replace(into=expected))
        equal &= all(map(torch.equal, x.into, expected))
    for length in tokens:
        bitmap = random_bitmap(models[0], 3, 32, length // 8)
        kept = length * 3 // 4
        equal &= torch.equal(unpack_positions(bitmap, kept), bitmap_naive.unpack_positions(bitmap, kept))
    return equal


def row(model: Model, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    """Writing what is in pages back as keys and values; and their positions."""
    even, ragged = (inputs(model, rows, slots, bits, ragged) for ragged in (False, True))
    moved = rows * model.kv_heads * slots // PAGE * (page_bytes(model, bits) + 2 * PAGE * model.vector)
    bitmap = random_bitmap(model, rows, model.kv_heads, slots * 5 // 32)
    return {
        "model": model.name, "rows": rows, "slots": slots, "bits": bits,
        "floor": moved / bandwidth / 1e6,
        **{f"{warps} warps": microseconds(partial(unpack, warps=warps), even) for warps in (1, 2, 4)},
        "naive": uncaptured(plain_unpack, even[0]),
        "ragged": microseconds(unpack_as_chosen, ragged),
        "ragged slots": statistics.mean(x.into[0].shape[2] for x in ragged),  # those of the head that has most
        "positions": microseconds(lambda x: unpack_positions(x, slots), [bitmap]),
    }  # fmt: skip
