"""What `benchmarks/kernels_gpu.py` checks and measures, at small sizes in Triton's interpreter: results and rows."""

import dataclasses
import importlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from kernel_testing import interpreted

pytestmark = pytest.mark.slow


@pytest.fixture
def op(monkeypatch):
    """A function that imports one of the benchmarks' `ops`."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    with torch.no_grad():
        yield lambda name: importlib.import_module(f"ops.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ops", "result", "kernels_gpu")]:
        del sys.modules[name]


@pytest.fixture
def models(op):
    """Without and with grouped heads; in float16, since the interpreter's dot takes bfloat16 for integers."""
    pythia, llama = (dataclasses.replace(m, device="cpu", dtype=torch.float16) for m in op("shapes").MODELS)
    return [dataclasses.replace(pythia, heads=2, kv_heads=2), dataclasses.replace(llama, heads=4, kv_heads=2)]


def assert_right(found):
    for name, value in found.items():
        assert value if isinstance(value, bool) else value < 1e-2, name


def assert_row(row, *names):
    """The names that rows have always had, and numbers for them."""
    assert list(row) == ["model", *names]
    assert all(math.isfinite(row[name]) and row[name] >= 0 for name in names)


@interpreted
def test_interpreted_benchmark_of_decode_attention(op, models, monkeypatch):
    decode = op("decode")
    monkeypatch.setattr(decode, "BACKENDS", {"sdpa math": SDPBackend.MATH})
    assert_right(decode.check(models, [(2, 45)]))
    names = "rows", "slots", "floor", "one after the other", "overlap", "with a new token", "sdpa math"
    assert_row(decode.row(models[1], 2, 45, 3.0), *names)


@interpreted
def test_interpreted_benchmark_of_window_scores(op, models):
    scores = op("scores")
    assert_right(scores.check(models, [(70, 32), (91, 50)]))
    assert_row(scores.row(models[1], 100, 32), "keys", "window", "all", "pass 1", "pass 2", "naive")
    assert len(scores.sweep(models[0], 60, 32, math.inf)) == len(scores.LSE_TILES[32]) + len(scores.SUM_TILES[32])
    assert scores.sweep(models[0], 60, 32, 0.0) == {}  # no time is left


@interpreted
def test_interpreted_benchmark_of_evictions(op, models):
    eviction = op("eviction")
    assert_right(eviction.check([(model, 2, 150, 40) for model in models]))
    times = "limits", "select floor", "select", "select naive", "compact floor", "compact", "compact naive", "all, W 32"
    assert_row(eviction.row(models[1], 2, 150, 40, 2.4), "rows", "slots", "kept", *times)
    case = models[0], 1, 100, 40, math.inf
    assert len(eviction.limits_sweep(*case)) == len(eviction.LIMITS_TILES)
    assert len(eviction.compact_sweep(*case)) == len(eviction.COMPACT_TILES)


@interpreted
def test_interpreted_benchmark_of_echo(op, models):
    echo = op("echo")
    assert_right(echo.check(models, 100))
    passes = "pass 1 floor", "pass 1", "pass 2 floor", "pass 2, not turned", "pass 2"
    row = echo.row(models[1], 100, 2.4)
    assert_row(row, "tokens", "turn", "turn sample", *passes, "band", "band naive", "window 256")


@interpreted
def test_interpreted_benchmark_of_packing(op, models):
    packing = op("packing")
    assert packing.check(models[:1], [2], 128) is True
    assert_row(packing.row(models[1], 1, 128, 4, 2.4), "rows", "slots", "bits", "floor", "kernel", "naive", "positions")


@interpreted
def test_interpreted_benchmark_of_unpacking(op, models):
    unpacking = op("unpacking")
    assert unpacking.check(models[:1], [2], 128, [64]) is True
    times = "1 warps", "2 warps", "4 warps", "naive", "ragged", "ragged slots", "positions"
    assert_row(unpacking.row(models[1], 1, 128, 4, 2.4), "rows", "slots", "bits", "floor", *times)


@interpreted
def test_interpreted_benchmark_of_packed_attention(op, models):
    packed = op("packed")
    assert_right(packed.check(models[:1], [2], 128))
    times = "one after the other", "overlap", "ragged", "16 bits", "16 bits, a quarter"
    assert_row(packed.row(models[1], 1, 128, 4, 3.0), "rows", "slots", "bits", "floor", *times)


@interpreted
def test_interpreted_benchmark_has_tiles_for_all_that_it_sweeps(op, monkeypatch):
    """Tiles are known for every model and size, and each is a plan that its kernel takes."""
    kernels_gpu = importlib.import_module("kernels_gpu")
    named = set()
    for kind, model, *size in kernels_gpu.SWEPT:
        module = sys.modules[kernels_gpu.SWEEPS[kind][1].__module__]
        monkeypatch.setattr(module, "inputs", lambda *_: [])
        monkeypatch.setattr(module, "sweep_over", lambda works, sets, seconds: dict.fromkeys(works, seconds))
        found = kernels_gpu.SWEEPS[kind][1](model, *size, 1.0)
        assert len(found) > 3
        named.add(f"{kind} {model.name} {size}")
    assert len(named) == len(kernels_gpu.SWEPT) == 25


@interpreted
def test_interpreted_benchmark_keeps_the_worst_error(op):
    measuring = op("measuring")
    for errors in itertools.permutations((0.5, math.nan, 0.1)):
        found = {}
        for error in errors:
            measuring.note(found, "it", error)
        assert math.isnan(found["it"])
    measuring.note(found := {"it": 0.1}, "it", 0.5)
    assert found == {"it": 0.5}
    assert [measuring.copies(size, 3, 2, 16) for size in (1, 149e6, 151e6, 40e6)] == [16, 2, 2, 4]
