"""Attention of one new token over the slots of a cache, beside torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ops.measuring import copies, error, microseconds, note
from ops.measuring import sweep as sweep_over
from ops.shapes import MODELS, ROOM, Model
from pyramidkv.ops.decode_attention import naive, triton

CHECKED = ((1, 1690), (8, 777))  # rows, slots
SIZES = ((1, 1690), (8, 1690), (1, 6272), (8, 6272))
# chunk, block, warps, stages, halves, dot, overlap
TILES = {
    "pythia-2.8b": [
        (256, 32, 4, 3, True, False, True), (256, 32, 4, 3, True, False, False), (128, 32, 4, 3, True, False, True),
        (512, 32, 4, 3, True, False, True), (256, 32, 4, 4, True, False, True), (256, 32, 2, 3, True, False, True),
        (512, 32, 2, 4, True, False, True), (1024, 32, 4, 4, True, False, True), (256, 64, 4, 2, True, False, True),
        (256, 16, 2, 4, True, False, True), (128, 16, 2, 4, True, False, True), (256, 64, 4, 3, True, True, True),
    ],
    "llama-8b": [
        (64, 64, 4, 2, True, True, True), (128, 64, 4, 2, True, True, True), (256, 64, 4, 3, True, True, True),
        (128, 32, 4, 3, True, True, True), (256, 32, 2, 4, True, True, True), (512, 64, 4, 3, True, True, True),
    ],
}  # fmt: skip
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}  # fmt: skip


class Inputs(NamedTuple):
    query: Tensor
    keys: Tensor  # buffers, NaN behind the slots in use
    values: Tensor
    length: Tensor
    scaling: float


def inputs(model: Model, rows: int, slots: int) -> list[Inputs]:
    size = 2 * rows * model.kv_heads * (slots + ROOM) * model.vector
    sets = []
    for _ in range(copies(size, 3, 2, 16)):
        query = model.random(rows, model.heads, 1, model.size)
        keys, values = (model.random(rows, model.kv_heads, slots + ROOM, model.size) for _ in range(2))
        keys[:, :, slots:] = values[:, :, slots:] = float("nan")
        sets.append(Inputs(query, keys, values, model.int32(slots), model.size**-0.5))
    return sets


def attend(x: Inputs, new: tuple[Tensor, Tensor] | None = None, blocks: triton.Blocks | None = None) -> Tensor:
    return triton.decode_attention(x.query, x.keys, x.values, x.length, None, x.scaling, new, blocks=blocks)


def attend_by_torch(x: Inputs, slots: int, backend: SDPBackend) -> Tensor:
    grouped = x.query.view(*x.keys.shape[:2], -1, x.query.shape[3])
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(grouped, x.keys[:, :, :slots], x.values[:, :, :slots], scale=x.scaling)


def blocks_of(model: Model, rows: int, slots: int, overlap: bool) -> triton.Blocks:
    groups = model.heads // model.kv_heads
    overlap &= model.device != "cpu"  # the interpreter has none
    return triton.choose(slots + ROOM, rows * model.kv_heads, groups, model.size, model.dtype.itemsize, overlap)


def check(models: Iterable[Model] = MODELS, sizes: Sequence[tuple[int, int]] = CHECKED) -> dict[str, float]:
    """Relative error against the float32 definition; every element must have been written."""
    found: dict[str, float] = {}
    for model in models:
        for rows, slots in sizes:
            query, keys, values, length, scaling = inputs(model, rows, slots)[0]
            start = model.below(slots, rows, model.kv_heads)
            each = model.below(slots, rows, model.kv_heads, start=1).maximum(start + 1)
            for lengths, starts in ((length, None), (slots, None), (each, start)):
                exact = (query.float(), keys.float(), values.float(), lengths, starts, scaling)
                expected = naive.decode_attention(*exact)
                for mode, overlap in (("one after the other", False), ("overlap", True)):
                    blocks = blocks_of(model, rows, slots, overlap)
                    for _ in range(3):  # a race would move
                        try:
                            got = triton.decode_attention(query, keys, values, lengths, starts, scaling, blocks=blocks)
                            off = error(got, expected)
                        except Exception as problem:
                            off = float("nan")
                            print(f"  {mode}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                        note(found, f"decode {model.name} {mode}", off)
    return found


def row(model: Model, rows: int, slots: int, bandwidth: float) -> dict:
    sets = inputs(model, rows, slots)
    fresh = model.random(rows, model.kv_heads, 1, model.size)
    after, overlap = (blocks_of(model, rows, slots, overlap) for overlap in (False, True))
    return {
        "model": model.name, "rows": rows, "slots": slots,
        "floor": 2 * rows * model.kv_heads * slots * model.vector / bandwidth / 1e6,
        "one after the other": microseconds(partial(attend, blocks=after), sets),
        "overlap": microseconds(partial(attend, blocks=overlap), sets),
        "with a new token": microseconds(partial(attend, new=(fresh, fresh), blocks=overlap), sets),
        **{
            name: microseconds(partial(attend_by_torch, slots=slots, backend=backend), sets)
            for name, backend in BACKENDS.items()
        },
    }  # fmt: skip


def sweep(model: Model, rows: int, slots: int, seconds: float) -> dict[str, float]:
    works = {str(tile): partial(attend, blocks=triton.Blocks(*tile)) for tile in TILES[model.name]}
    return sweep_over(works, inputs(model, rows, slots), seconds)
