"""What `echo` computes: keys turned, and the scores of a band, beside the window scores that it adds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ops.measuring import copies, error, microseconds, note
from ops.measuring import sweep as sweep_over
from ops.scores import LSE_TILES
from ops.shapes import LLAMA, MODELS, PYTHIA, Model
from pyramidkv.ops.band_scores import naive, triton
from pyramidkv.ops.turn import naive as turn_naive
from pyramidkv.ops.turn import triton as turning
from pyramidkv.ops.window_scores import triton as scores

CHECKED = 6143  # tokens
CASES = ((PYTHIA, 6144), (LLAMA, 8192), (LLAMA, 32768))  # model, tokens
TILES = [  # queries, warps, stages, registers
    (32, 2, 2, 128), (32, 2, 2), (32, 2, 2, 168), (32, 2, 1, 168), (32, 1, 2), (32, 1, 1), (32, 4, 2), (64, 2, 2),
    (64, 4, 2), (64, 4, 2, 168), (64, 8, 2), (128, 8, 2),
]  # fmt: skip


class Inputs(NamedTuple):
    query: Tensor  # queries and keys are views of one projection
    key: Tensor
    cos: Tensor
    sin: Tensor
    scaling: float
    lse: Tensor  # what pass 1 has found

    @property
    def turn(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    @property
    def sample(self) -> Tensor:
        """The keys of pass 1."""
        return self.key[:, :, self.key.shape[2] % naive.STRIDE :: naive.STRIDE]


def inputs(model: Model, tokens: int) -> list[Inputs]:
    heads, kv_heads = model.heads, model.kv_heads
    sets = []
    for _ in range(copies((heads + kv_heads) * tokens * model.vector, 2, 1, 3)):
        fused = model.random(1, tokens, heads + 2 * kv_heads, model.size).transpose(1, 2)
        query, key = fused[:, :heads], fused[:, heads : heads + kv_heads]
        angle = 1e4 * torch.rand(1, model.rotated // 2, device=model.device, dtype=torch.float64)
        turn, scaling = (angle.cos(), angle.sin()), model.size**-0.5
        lse = triton.sampled_log_sum_exp(query, key, scaling, None, turn)
        sets.append(Inputs(query, key, *turn, scaling, lse))
    return sets


def turn_keys(x: Inputs) -> Tensor:
    return turning.turn(x.key, *x.turn)


def turn_sample(x: Inputs) -> Tensor:
    return turning.turn(x.sample, *x.turn)


def first(x: Inputs) -> Tensor:
    return triton.sampled_log_sum_exp(x.query, x.key, x.scaling, None, x.turn)


def first_of_turned(x: Inputs, blocks: scores.Blocks) -> Tensor:
    return scores.log_sum_exp(x.query, x.sample, x.scaling, None, True, blocks)


def second(x: Inputs, blocks: triton.Blocks | None = None) -> Tensor:
    return triton.near_scores(x.query, x.key, x.scaling, x.lse, None, x.turn, blocks)


def second_not_turned(x: Inputs) -> Tensor:
    return triton.near_scores(x.query, x.key, x.scaling, x.lse, None)


def band(x: Inputs) -> Tensor:
    return triton.band_scores(x.query, x.key, x.scaling, None, x.turn)


def plain_band(x: Inputs) -> Tensor:
    return naive.band_scores(x.query, x.key, x.scaling)


def window(x: Inputs) -> Tensor:
    return scores.window_scores(x.query[:, :, -256:], x.key, x.scaling, power=2, per_visible=True)


def check(models: Iterable[Model] = MODELS, tokens: int = CHECKED) -> dict[str, float]:
    """Relative error of the scores against the float32 definition; how many turned numbers differ at all."""
    found: dict[str, float] = {}
    for model in models:
        query, key, cos, sin, scaling, _ = inputs(model, tokens)[0]
        found[f"turn {model.name}"] = float((turning.turn(key, cos, sin) != turn_naive.turn(key, cos, sin)).sum())
        for valid in (None, model.mostly(1, model.kv_heads, tokens)):
            expected = naive.band_scores(query.float(), key.float(), scaling, valid, (cos, sin))
            got = triton.band_scores(query, key, scaling, valid, (cos, sin))
            note(found, f"band {model.name}", error(got, expected))
    return found


def row(model: Model, tokens: int, bandwidth: float) -> dict:
    """All that `echo` computes in a layer. Floors: queries and sample; queries and keys."""
    sets = inputs(model, tokens)
    vector = tokens * model.vector / bandwidth / 1e6
    exponentials = tokens * (tokens // naive.STRIDE) * model.heads / 3.7e6
    return {
        "model": model.name, "tokens": tokens,
        "turn": microseconds(turn_keys, sets), "turn sample": microseconds(turn_sample, sets),
        "pass 1 floor": max(model.heads * vector, exponentials),
        "pass 1": microseconds(first, sets),
        "pass 2 floor": (model.heads + model.kv_heads) * vector,
        "pass 2, not turned": microseconds(second_not_turned, sets), "pass 2": microseconds(second, sets),
        "band": microseconds(band, sets), "band naive": microseconds(plain_band, sets[:1]),
        "window 256": microseconds(window, sets),
    }  # fmt: skip


def sweep(model: Model, tokens: int, seconds: float) -> dict[str, float]:
    works = {f"pass 2 {tile}": partial(second, blocks=triton.Blocks(*tile)) for tile in TILES}
    works |= {f"pass 1 {tile}": partial(first_of_turned, blocks=scores.Blocks(*tile)) for tile in LSE_TILES[1024]}
    return sweep_over(works, inputs(model, tokens), seconds)
