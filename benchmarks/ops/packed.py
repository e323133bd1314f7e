"""Attention of one new token over codes in pages and the newest slots, beside that over 16 bits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ops import decode
from ops.measuring import copies, error, microseconds, note
from ops.measuring import sweep as sweep_over
from ops.pages import page_bytes, random_pages
from ops.shapes import LLAMA, MODELS, PYTHIA, ROOM, Model
from pyramidkv.ops.packed_attention import naive, triton
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE

NEWEST = 64  # slots that are not packed
CASES = tuple((model, rows, 6144, bits) for model in MODELS for rows in (1, 8) for bits in (8, 4, 2))
SWEPT = ((PYTHIA, 1, 6144, 4), (LLAMA, 1, 6144, 4), (PYTHIA, 8, 6144, 4),
         (LLAMA, 8, 6144, 4), (PYTHIA, 1, 6144, 2), (PYTHIA, 1, 6144, 8))  # fmt: skip
TILES = [  # pages, chunk, warps, stages, overlap, registers
    (pages, 64, warps, stages, True, registers)
    for registers, pages, stages, warps in itertools.product((128, 168, 0), (1, 2, 4, 8), (1, 2), (1, 2))
    if (warps, registers) != (2, 168)
]


class Inputs(NamedTuple):
    query: Tensor
    pages: Pages
    keys: Tensor  # buffers of the newest slots
    values: Tensor
    length: Tensor
    scaling: float


def inputs(model: Model, rows: int, slots: int, bits: int, ragged: bool = False) -> list[Inputs]:
    size = rows * model.kv_heads * (slots // PAGE) * page_bytes(model, bits)
    sets = []
    for _ in range(copies(size, 3, 2, 24)):
        pages = random_pages(model, rows, slots, bits, ragged)
        query = model.random(rows, model.heads, 1, model.size)
        keys, values = (model.random(rows, model.kv_heads, NEWEST + ROOM, model.size) for _ in range(2))
        sets.append(Inputs(query, pages, keys, values, model.int32(NEWEST), model.size**-0.5))
    return sets


def attend(x: Inputs, blocks: triton.Blocks) -> Tensor:
    return triton.packed_attention(x.query, x.pages, x.keys, x.values, x.length, None, x.scaling, blocks=blocks)


def blocks_of(model: Model, rows: int, slots: int, overlap: bool) -> triton.Blocks:
    overlap &= model.device != "cpu"  # the interpreter has none
    return triton.choose(rows * model.kv_heads, slots // PAGE, 8, model.size, 2, overlap)


def check(models: Iterable[Model] = MODELS, rows: Iterable[int] = (1, 7), slots: int = 1536) -> dict[str, float]:
    """Relative error against the float32 definition."""
    found: dict[str, float] = {}
    for model, count, ragged, bits in itertools.product(models, rows, (False, True), (8, 4, 2)):
        x = inputs(model, count, slots, bits, ragged)[0]
        exact = (x.query.float(), x.pages, x.keys.float(), x.values.float(), x.length, None, x.scaling)
        expected = naive.packed_attention(*exact)
        for overlap in (False, True):
            name = f"packed {model.name} {bits} bits{' ragged' if ragged else ''}{' overlap' if overlap else ''}"
            for _ in range(3):  # a race would move
                note(found, name, error(attend(x, blocks_of(model, count, slots, overlap)), expected))
    return found


def row(model: Model, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    newest = NEWEST * 2 * model.vector
    even, ragged = (inputs(model, rows, slots, bits, ragged) for ragged in (False, True))
    after, overlap = (partial(attend, blocks=blocks_of(model, rows, slots, overlap)) for overlap in (False, True))
    return {
        "model": model.name, "rows": rows, "slots": slots, "bits": bits,
        "floor": rows * model.kv_heads * (slots // PAGE * page_bytes(model, bits) + newest) / bandwidth / 1e6,
        "one after the other": microseconds(after, even),
        "overlap": microseconds(overlap, even),
        "ragged": microseconds(overlap, ragged),
        "16 bits": microseconds(decode.attend, decode.inputs(model, rows, slots)),
        "16 bits, a quarter": microseconds(decode.attend, decode.inputs(model, rows, slots // 4)),
    }  # fmt: skip


def sweep(model: Model, rows: int, slots: int, bits: int, seconds: float) -> dict[str, float]:
    plans = [triton.Blocks(*tile) for tile in TILES]
    works = {str(dataclasses.astuple(plan)): partial(attend, blocks=plan) for plan in plans}
    return sweep_over(works, inputs(model, rows, slots, bits), seconds)
