"""Scores of the observation window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ops.measuring import copies, error, microseconds, note
from ops.measuring import sweep as sweep_over
from ops.shapes import MODELS, Model
from pyramidkv.ops.window_scores import naive, triton

CHECKED = ((6144, 32), (6143, 256), (6144, 1000))  # keys, queries
LENGTHS = (6144, 32768)
WINDOWS = (32, 256, 1024)
LSE_TILES = {
    32: [(32, 64, 4, 3), (32, 128, 4, 2), (32, 128, 4, 3), (32, 128, 8, 3)],
    1024: [(128, 128, 8, 3, 128), (128, 128, 8, 2, 128), (128, 64, 8, 3), (128, 64, 4, 3, 128), (256, 64, 8, 3, 128),
           (64, 128, 4, 3, 168)],
}  # fmt: skip
SUM_TILES = {
    32: [(32, 128, 4, 2), (32, 64, 4, 2), (32, 256, 8, 2)],
    1024: [(64, 128, 8, 3, 128), (64, 128, 8, 2, 128), (64, 256, 8, 3, 128), (128, 128, 8, 3, 128),
           (64, 128, 4, 3), (64, 64, 4, 3)],
}  # fmt: skip


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    scaling: float
    lse: Tensor  # what pass 1 has found


def inputs(model: Model, keys: int, window: int) -> list[Inputs]:
    sets = []
    for _ in range(copies(model.kv_heads * keys * model.vector, 2, 1, 6)):
        given = (
            model.random(1, model.heads, window, model.size),
            model.random(1, model.kv_heads, keys, model.size),
            model.size**-0.5,
        )
        sets.append(Inputs(*given, triton.log_sum_exp(*given, None)))
    return sets


def both(x: Inputs) -> Tensor:
    return triton.window_scores(x.query, x.key, x.scaling)


def first(x: Inputs, blocks: triton.Blocks | None = None) -> Tensor:
    return triton.log_sum_exp(x.query, x.key, x.scaling, None, blocks=blocks)


def second(x: Inputs, blocks: triton.Blocks | None = None) -> Tensor:
    return triton.probability_sums(x.query, x.key, x.scaling, x.lse, None, 1, False, blocks=blocks)


def plain(x: Inputs) -> Tensor:
    return naive.window_scores(x.query, x.key, x.scaling)


def check(models: Iterable[Model] = MODELS, sizes: Sequence[tuple[int, int]] = CHECKED) -> dict[str, float]:
    """Relative error against the float32 definition; every element must have been written."""
    found: dict[str, float] = {}
    for model in models:
        for keys, window in sizes:
            query, key, scaling, _ = inputs(model, keys, window)[0]
            real = model.mostly(1, keys)
            for valid, power, per_visible in ((None, 1, False), (None, 2, True), (real, 2, True)):
                kind = {"power": power, "per_visible": per_visible}
                got = triton.window_scores(query, key, scaling, valid, **kind)
                expected = naive.window_scores(query.float(), key.float(), scaling, valid, **kind)
                note(found, f"window_scores {model.name}", error(got, expected))
    return found


def row(model: Model, keys: int, window: int) -> dict:
    sets = inputs(model, keys, window)
    return {
        "model": model.name, "keys": keys, "window": window,
        "all": microseconds(both, sets), "pass 1": microseconds(first, sets), "pass 2": microseconds(second, sets),
        "naive": microseconds(plain, sets[:1]),
    }  # fmt: skip


def sweep(model: Model, keys: int, window: int, seconds: float) -> dict[str, float]:
    works = {f"lse {tile}": partial(first, blocks=triton.Blocks(*tile)) for tile in LSE_TILES[window]}
    works |= {f"sum {tile}": partial(second, blocks=triton.Blocks(*tile)) for tile in SUM_TILES[window]}
    return sweep_over(works, inputs(model, keys, window), seconds)
