"""Evictions: which slots to keep, how many of each head, and moving them together."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.measuring import copies, microseconds
from ops.measuring import sweep as sweep_over
from ops.shapes import LLAMA, PYTHIA, RECENT, ROOM, Model
from pyramidkv.ops.compact import naive as compact_naive
from pyramidkv.ops.compact import triton as compaction
from pyramidkv.ops.heads import naive as heads_naive
from pyramidkv.ops.heads import triton as sharing
from pyramidkv.ops.select import naive as select_naive
from pyramidkv.ops.select import triton as selection
from pyramidkv.ops.window_scores import triton as scores

CASES = (  # model, rows, slots, kept
    (PYTHIA, 1, 6144, 1536), (PYTHIA, 8, 6144, 1536),
    (LLAMA, 1, 8192, 2048), (LLAMA, 1, 32768, 8192), (LLAMA, 1, 131072, 32768),
)  # fmt: skip
SELECT_TILES = {  # block, warps, step
    6144: [
        (8192, 8), (8192, 16), (8192, 32), (8192, 4, 2048), (8192, 8, 2048), (8192, 16, 2048), (8192, 16, 4096),
        (8192, 32, 4096), (2048, 16, 2048),
    ],
    32768: [(32768, 32), (32768, 32, 4096), (8192, 32), (16384, 32), (4096, 16), (8192, 16)],
}  # fmt: skip
LIMITS_TILES = [(8192, 32), (8192, 16), (4096, 32), (4096, 16), (2048, 16), (2048, 8), (16384, 32)]  # slots, warps
COMPACT_TILES = [  # rows, warps, halves
    (64, 4), (32, 4), (32, 2), (64, 8), (16, 2), (16, 1), (128, 8), (128, 4), (64, 4, False), (32, 4, False),
]  # fmt: skip


class Inputs(NamedTuple):
    marks: Tensor  # scores of the slots
    sources: tuple[Tensor, Tensor, Tensor]  # keys, values and positions, views of one projection
    index: Tensor  # which slots to keep
    targets: tuple[Tensor, Tensor, Tensor]  # buffers for them


def inputs(model: Model, rows: int, slots: int, kept: int) -> list[Inputs]:
    heads, size = model.kv_heads, model.size
    sets = []
    for _ in range(copies(2 * rows * heads * slots * model.vector, 2, 1, 4)):
        marks = (3 * torch.randn(rows, heads, slots, device=model.device)).softmax(-1)
        fused = model.random(rows, slots, heads, 2 * size).transpose(1, 2)
        positions = torch.arange(slots, dtype=torch.int32, device=model.device).expand(rows, heads, slots)
        buffers = [model.empty(rows, heads, kept + ROOM, size) for _ in "kv"]
        places = torch.full((rows, heads, kept + ROOM), 77, dtype=torch.int32, device=model.device)
        sources = (fused[..., :size], fused[..., size:], positions)
        sets.append(Inputs(marks, sources, select(marks, kept), (buffers[0], buffers[1], places)))
    return sets


def select(marks: Tensor, kept: int, blocks: selection.Blocks | None = None) -> Tensor:
    return selection.select(marks, [kept] * len(marks), kept, recent=RECENT, finite=True, blocks=blocks)


def plain_select(marks: Tensor, kept: int) -> Tensor:
    return select_naive.select(marks, [kept] * len(marks), kept, recent=RECENT, finite=True)


def limits(marks: Tensor, kept: int, blocks: sharing.Blocks | None = None) -> Tensor:
    rows = len(marks)
    return sharing.head_limits(marks, [kept] * rows, [marks.shape[2]] * rows, RECENT, blocks=blocks)


def compact(x: Inputs, blocks: compaction.Blocks | None = None) -> None:
    compaction.compact(*x[1:], blocks=blocks)


def plain_compact(x: Inputs) -> None:
    compact_naive.compact(*x[1:])


def evict(x: Inputs, query: Tensor, kept: int) -> None:
    """All of it, the scores included."""
    marks = scores.window_scores(query, x.sources[0], query.shape[3] ** -0.5)
    compaction.compact(x.sources, select(marks, kept), x.targets)


def check(cases: Iterable[tuple[Model, int, int, int]] = CASES) -> dict[str, bool]:
    """Selection and compaction equal plain torch on the CPU to the last bit, and leave the rest as it was."""
    found = {"select": True, "head limits": True, "compact": True}
    for model, rows, slots, kept in cases:
        all_marks, sources, index, targets = inputs(model, rows, slots, kept)[0]
        marks = all_marks[:1]
        heads = marks.shape[1]
        valid = model.mostly(1, slots)
        each = model.below(kept + 1, 1, heads)
        coarse = (marks * 1e4).round()
        coarse[..., ::7] = float("nan")
        for scored in (marks, coarse, torch.zeros_like(marks)):
            for most, real in (([kept], None), ([kept // 2], valid), (each, valid)):
                got = selection.select(scored, most, kept, recent=RECENT, valid=real, finite=True)
                expected = select_naive.select(
                    scored.cpu(), on_cpu(most), kept, recent=RECENT, valid=on_cpu(real), finite=True
                )
                found["select"] &= torch.equal(got.cpu(), expected)
        lopsided = marks * torch.rand(heads, 1, device=model.device)
        for scored in (lopsided, (lopsided * 1e4).round()):
            for real in (None, valid):
                got = sharing.head_limits(scored, [kept], [slots], RECENT, real)
                expected = heads_naive.head_limits(scored.cpu(), [kept], [slots], RECENT, on_cpu(real))
                found["head limits"] &= torch.equal(got.cpu(), expected)
        index = index.clone()
        index[..., :5] = -1
        expected_targets = tuple(t.clone() for t in targets)
        compact_naive.compact(sources, index, expected_targets)
        compaction.compact(sources, index, targets)
        pairs = zip(targets, expected_targets, strict=True)
        found["compact"] &= all(torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4)) for a, b in pairs)
    return found


def on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def row(model: Model, rows: int, slots: int, kept: int, bandwidth: float) -> dict:
    sets = inputs(model, rows, slots, kept)
    marks, _, index, _ = sets[0]
    every = [x.marks for x in sets]
    moved = 2 * 2 * index.numel() * model.vector + index.numel() * (8 + 4 + 4)
    query = model.random(rows, model.heads, RECENT, model.size)
    return {
        "model": model.name, "rows": rows, "slots": slots, "kept": kept,
        "limits": microseconds(partial(limits, kept=kept), every),
        "select floor": (marks.nbytes + index.nbytes) / bandwidth / 1e6,
        "select": microseconds(partial(select, kept=kept), every),
        "select naive": microseconds(partial(plain_select, kept=kept), every[:1]),
        "compact floor": moved / bandwidth / 1e6,
        "compact": microseconds(compact, sets),
        "compact naive": microseconds(plain_compact, sets),
        f"all, W {RECENT}": microseconds(partial(evict, query=query, kept=kept), sets),
    }  # fmt: skip


def select_sweep(model: Model, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    works = {str(t): partial(select, kept=kept, blocks=selection.Blocks(*t)) for t in SELECT_TILES[slots]}
    return sweep_over(works, [x.marks for x in inputs(model, rows, slots, kept)], seconds)


def limits_sweep(model: Model, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    works = {str(t): partial(limits, kept=kept, blocks=sharing.Blocks(*t)) for t in LIMITS_TILES}
    return sweep_over(works, [x.marks for x in inputs(model, rows, slots, kept)], seconds)


def compact_sweep(model: Model, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    works = {str(t): partial(compact, blocks=compaction.Blocks(*t)) for t in COMPACT_TILES}
    return sweep_over(works, inputs(model, rows, slots, kept), seconds)
