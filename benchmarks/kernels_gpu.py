"""Are the Triton kernels right at real sizes, and how fast are they? One run on one GPU, about two minutes.

    python benchmarks/kernels_gpu.py --out kernels.json [--seconds 140] [--only PART]

Times are those of launches inside a CUDA graph, a layer's worth each, over input sets that together pass the L2 cache.
Order: correctness, the chosen tiles beside torch, then the other tiles until the seconds are over.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pyramidkv.evaluate.speed import read_bandwidth
from pyramidkv.ops.band_scores import naive as band_naive
from pyramidkv.ops.band_scores import triton as band
from pyramidkv.ops.bitmap import naive as bitmap_naive
from pyramidkv.ops.bitmap import pack_positions, unpack_positions
from pyramidkv.ops.compact import naive as compact_naive
from pyramidkv.ops.compact import triton as compaction
from pyramidkv.ops.decode_attention import naive as decode_naive
from pyramidkv.ops.decode_attention import triton as decode
from pyramidkv.ops.heads import naive as heads_naive
from pyramidkv.ops.heads import triton as sharing
from pyramidkv.ops.packed_attention import naive as packed_naive
from pyramidkv.ops.packed_attention import triton as packed
from pyramidkv.ops.packing import naive as packing_naive
from pyramidkv.ops.packing import triton as packing
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import Codes, key_bytes, value_bytes, value_group
from pyramidkv.ops.select import naive as select_naive
from pyramidkv.ops.select import triton as selection
from pyramidkv.ops.turn import naive as turn_naive
from pyramidkv.ops.turn import triton as turning
from pyramidkv.ops.unpacking import naive as unpacking_naive
from pyramidkv.ops.unpacking import triton as unpacking
from pyramidkv.ops.window_scores import naive as scores_naive
from pyramidkv.ops.window_scores import triton as scores
from result import Result, add_out

BEGAN = time.perf_counter()
L2 = 50e6  # bytes
MODELS = {"pythia-2.8b": (32, 32, 80, torch.float16), "llama-8b": (32, 8, 128, torch.bfloat16)}
DECODE_SIZES = ((1, 1690), (8, 1690), (1, 6272), (8, 6272))  # rows, slots
LENGTHS = (6144, 32768)
WINDOWS = (32, 256, 1024)
EVICTIONS = (  # model, rows, slots, kept
    ("pythia-2.8b", 1, 6144, 1536), ("pythia-2.8b", 8, 6144, 1536),
    ("llama-8b", 1, 8192, 2048), ("llama-8b", 1, 32768, 8192), ("llama-8b", 1, 131072, 32768),
)  # fmt: skip
PACKED = tuple((model, rows, 6144, bits) for model in MODELS for rows in (1, 8) for bits in (8, 4, 2))
PACKED_SWEEPS = (("pythia-2.8b", 1, 6144, 4), ("llama-8b", 1, 6144, 4), ("pythia-2.8b", 8, 6144, 4),
                 ("llama-8b", 8, 6144, 4), ("pythia-2.8b", 1, 6144, 2), ("pythia-2.8b", 1, 6144, 8))  # fmt: skip
UNPACKED = (  # model, rows, slots, bits: what a further chunk of a prompt finds
    *(("pythia-2.8b", 1, 25984, bits) for bits in (8, 4, 2)),
    ("pythia-2.8b", 1, 8192, 4), ("llama-8b", 1, 25984, 4), ("pythia-2.8b", 8, 6144, 4),
)  # fmt: skip
ECHOES = (("pythia-2.8b", 6144), ("llama-8b", 8192), ("llama-8b", 32768))  # model, tokens
ROTATED = {"pythia-2.8b": 20, "llama-8b": 128}  # channels
RECENT = 32
ROOM = 30  # free slots of the buffers, as in a cache that grows

SWEEP_LSE = {
    32: [(32, 64, 4, 3), (32, 128, 4, 2), (32, 128, 4, 3), (32, 128, 8, 3)],
    1024: [(128, 128, 8, 3, 128), (128, 128, 8, 2, 128), (128, 64, 8, 3), (128, 64, 4, 3, 128), (256, 64, 8, 3, 128),
           (64, 128, 4, 3, 168)],
}  # fmt: skip
SWEEP_SUM = {
    32: [(32, 128, 4, 2), (32, 64, 4, 2), (32, 256, 8, 2)],
    1024: [(64, 128, 8, 3, 128), (64, 128, 8, 2, 128), (64, 256, 8, 3, 128), (128, 128, 8, 3, 128),
           (64, 128, 4, 3), (64, 64, 4, 3)],
}  # fmt: skip
# chunk, block, warps, stages, halves, dot, overlap
SWEEP_DECODE = {
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

SWEEP_SELECT = {  # block, warps, step
    6144: [
        (8192, 8), (8192, 16), (8192, 32), (8192, 4, 2048), (8192, 8, 2048), (8192, 16, 2048), (8192, 16, 4096),
        (8192, 32, 4096), (2048, 16, 2048),
    ],
    32768: [(32768, 32), (32768, 32, 4096), (8192, 32), (16384, 32), (4096, 16), (8192, 16)],
}  # fmt: skip
SWEEP_LIMITS = [(8192, 32), (8192, 16), (4096, 32), (4096, 16), (2048, 16), (2048, 8), (16384, 32)]  # slots, warps
SWEEP_COMPACT = [  # rows, warps, halves
    (64, 4), (32, 4), (32, 2), (64, 8), (16, 2), (16, 1), (128, 8), (128, 4), (64, 4, False), (32, 4, False),
]  # fmt: skip

SWEEP_BAND = [  # queries, warps, stages, registers
    (32, 2, 2, 128), (32, 2, 2), (32, 2, 2, 168), (32, 2, 1, 168), (32, 1, 2), (32, 1, 1), (32, 4, 2), (64, 2, 2),
    (64, 4, 2), (64, 4, 2, 168), (64, 8, 2), (128, 8, 2),
]  # fmt: skip


def elapsed() -> float:
    return time.perf_counter() - BEGAN


def microseconds(calls: list[Callable[[], object]], target_ms: float = 2.0) -> float:
    """Median device time of one call, the calls taken in turn and captured in a graph; NaN if that fails."""
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        rounds = max(1, min(round(64 / len(calls)), round(target_ms / max(begin.elapsed_time(end), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        times = []
        for i in range(9):
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
        del graph
        return statistics.median(times)
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
        return float("nan")


def uncaptured(call: Callable[[], object]) -> float:
    """Time of a call that waits for the device."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(3):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / 3


def error(out: Tensor, reference: Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def ceilings() -> dict[str, float]:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds([lambda: a @ b])
    read = read_bandwidth(source.device) / 1e12  # the floor of kernels that write next to nothing
    return {"copy_TBps": 2 * source.nbytes / copy / 1e6, "read_TBps": read, "bf16_TFLOPs": 2 * 8192**3 / product / 1e6}


def decode_sets(model: str, rows: int, slots: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    heads, kv_heads, size, dtype = MODELS[model]
    per_set = 2 * rows * kv_heads * (slots + ROOM) * size * dtype.itemsize
    sets = []
    for _ in range(max(2, min(16, int(3 * L2 // per_set) + 1))):
        query = torch.randn(rows, heads, 1, size, device="cuda", dtype=dtype)
        keys, values = (torch.randn(rows, kv_heads, slots + ROOM, size, device="cuda", dtype=dtype) for _ in range(2))
        keys[:, :, slots:] = values[:, :, slots:] = float("nan")
        sets.append((query, keys, values, torch.tensor([slots], dtype=torch.int32, device="cuda"), size**-0.5))
    return sets


def scores_sets(model: str, keys: int, window: int) -> list[tuple[Tensor, Tensor, float]]:
    heads, kv_heads, size, dtype = MODELS[model]
    count = max(1, min(6, int(2 * L2 // (kv_heads * keys * size * dtype.itemsize)) + 1))
    return [
        (
            torch.randn(1, heads, window, size, device="cuda", dtype=dtype),
            torch.randn(1, kv_heads, keys, size, device="cuda", dtype=dtype),
            size**-0.5,
        )
        for _ in range(count)
    ]


def check(report: dict) -> None:
    """Against the float32 definitions, on fresh inputs; every element must have been written."""
    found: dict[str, list[float]] = {}
    for model, (heads, kv_heads, size, dtype) in MODELS.items():
        for window, keys in ((32, 6144), (256, 6143), (1000, 6144)):
            ((query, key, scaling), *_) = scores_sets(model, keys, window)
            real = torch.rand(1, keys, device="cuda") > 0.1
            for valid, power, per_visible in ((None, 1, False), (None, 2, True), (real, 2, True)):
                kind = {"power": power, "per_visible": per_visible}
                got = scores.window_scores(query, key, scaling, valid, **kind)
                expected = scores_naive.window_scores(query.float(), key.float(), scaling, valid, **kind)
                found.setdefault(f"window_scores {model}", []).append(error(got, expected))
        for rows, slots in ((1, 1690), (8, 777)):
            ((query, keys_, values, length, scaling), *_) = decode_sets(model, rows, slots)
            start = torch.randint(0, slots, (rows, kv_heads), dtype=torch.int32, device="cuda")
            each = torch.randint(1, slots, (rows, kv_heads), dtype=torch.int32, device="cuda").maximum(start + 1)
            modes = {
                name: decode.choose(slots + ROOM, rows * kv_heads, heads // kv_heads, size, dtype.itemsize, overlap)
                for name, overlap in (("one after the other", False), ("overlap", True))
            }
            for lengths, starts in ((length, None), (slots, None), (each, start)):
                expected = decode_naive.decode_attention(
                    query.float(), keys_.float(), values.float(), lengths, starts, scaling
                )
                for mode, blocks in modes.items():
                    for _ in range(3):  # a race would move
                        errors = found.setdefault(f"decode {model} {mode}", [])
                        try:
                            got = decode.decode_attention(query, keys_, values, lengths, starts, scaling, blocks=blocks)
                            errors.append(error(got, expected))
                        except Exception as problem:
                            errors.append(float("nan"))
                            print(f"  {mode}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
    torch.cuda.synchronize()
    worst = {name: max(errors, key=lambda e: (e != e, e)) for name, errors in found.items()}  # NaN is the worst
    report["relative_error"] = worst
    for name, value in worst.items():
        print(f"check {name}: {value:.2e} {'ok' if value < 1e-2 else 'WRONG'}", flush=True)


def decode_row(model: str, rows: int, slots: int, bandwidth: float) -> dict:
    sets = decode_sets(model, rows, slots)
    heads, kv_heads, size, dtype = MODELS[model]
    row: dict = {"model": model, "rows": rows, "slots": slots}
    row["floor"] = 2 * rows * kv_heads * slots * size * dtype.itemsize / bandwidth / 1e6

    def ours(overlap: bool, new: tuple[Tensor, Tensor] | None = None) -> float:
        plan = decode.choose(slots + ROOM, rows * kv_heads, heads // kv_heads, size, dtype.itemsize, overlap)
        return microseconds(
            [lambda s=s: decode.decode_attention(*s[:4], None, s[4], new, blocks=plan) for s in sets]  # type: ignore[misc]
        )

    row["one after the other"], row["overlap"] = ours(False), ours(True)
    fresh = torch.randn(rows, kv_heads, 1, size, device="cuda", dtype=dtype)
    row["with a new token"] = ours(True, (fresh, fresh))

    def torch_ones(backend: SDPBackend) -> float:
        def one(query: Tensor, keys: Tensor, values: Tensor, _: Tensor, scaling: float) -> Tensor:
            packed = query.view(rows, kv_heads, heads // kv_heads, size)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(packed, keys[:, :, :slots], values[:, :, :slots], scale=scaling)

        return microseconds([lambda s=s: one(*s) for s in sets])

    row["sdpa flash"] = torch_ones(SDPBackend.FLASH_ATTENTION)
    row["sdpa efficient"] = torch_ones(SDPBackend.EFFICIENT_ATTENTION)
    row["sdpa math"] = torch_ones(SDPBackend.MATH)
    return row


def decode_sweep(model: str, rows: int, slots: int, seconds: float) -> dict[str, float]:
    sets = decode_sets(model, rows, slots)
    found: dict[str, float] = {}
    for options in SWEEP_DECODE[model]:
        if elapsed() < seconds:
            plan = decode.Blocks(*options)
            found[str(options)] = microseconds(
                [lambda s=s, p=plan: decode.decode_attention(*s[:4], None, s[4], blocks=p) for s in sets]
            )
    return found


def scores_row(model: str, keys: int, window: int) -> dict:
    sets = scores_sets(model, keys, window)
    lse = [scores.log_sum_exp(*s, None) for s in sets]
    row: dict = {"model": model, "keys": keys, "window": window}
    row["all"] = microseconds([lambda s=s: scores.window_scores(*s) for s in sets])
    row["pass 1"] = microseconds([lambda s=s: scores.log_sum_exp(*s, None) for s in sets])
    row["pass 2"] = microseconds(
        [lambda s=s, x=x: scores.probability_sums(*s, x, None, 1, False) for s, x in zip(sets, lse, strict=True)]
    )
    row["naive"] = microseconds([lambda s=s: scores_naive.window_scores(*s) for s in sets[:1]])
    return row


def scores_sweep(model: str, keys: int, window: int, seconds: float) -> dict[str, float]:
    sets = scores_sets(model, keys, window)
    lse = [scores.log_sum_exp(*s, None) for s in sets]
    found: dict[str, float] = {}
    for options in SWEEP_LSE[window]:
        if elapsed() < seconds:
            plan = scores.Blocks(*options)
            found[f"lse {options}"] = microseconds(
                [lambda s=s, p=plan: scores.log_sum_exp(*s, None, blocks=p) for s in sets]
            )
    for options in SWEEP_SUM[window]:
        if elapsed() < seconds:
            plan = scores.Blocks(*options)
            found[f"sum {options}"] = microseconds(
                [
                    lambda s=s, x=x, p=plan: scores.probability_sums(*s, x, None, 1, False, blocks=p)
                    for s, x in zip(sets, lse, strict=True)
                ]
            )
    return found


def eviction_sets(model: str, rows: int, slots: int, kept: int) -> list[tuple]:
    """Scores; keys, values and positions, views of one projection; which slots to keep; buffers for them."""
    _, heads, size, dtype = MODELS[model]
    sets = []
    for _ in range(max(1, min(4, int(2 * L2 // (2 * rows * heads * slots * size * dtype.itemsize)) + 1))):
        noise = 3 * torch.randn(rows, heads, slots, device="cuda")
        marks = noise.softmax(-1)
        fused = torch.randn(rows, slots, heads, 2 * size, device="cuda", dtype=dtype).transpose(1, 2)
        positions = torch.arange(slots, dtype=torch.int32, device="cuda").expand(rows, heads, slots)
        index = selection.select(marks, [kept] * rows, kept, recent=RECENT, finite=True)
        buffers = [torch.full((rows, heads, kept + ROOM, size), float("nan"), device="cuda", dtype=dtype) for _ in "kv"]
        places = torch.full((rows, heads, kept + ROOM), 77, dtype=torch.int32, device="cuda")
        sets.append((marks, (fused[..., :size], fused[..., size:], positions), index, (*buffers, places)))
    return sets


def check_eviction() -> dict[str, bool]:
    """Selection and compaction equal plain torch on the CPU to the last bit, and leave the rest as it was."""
    found: dict[str, bool] = {}
    for model, rows, slots, kept in EVICTIONS:
        ((marks, sources, index, targets), *_) = eviction_sets(model, rows, slots, kept)
        marks = marks[:1]
        valid = torch.rand(1, slots, device="cuda") > 0.1
        heads = marks.shape[1]
        each = torch.randint(0, kept + 1, (1, heads), dtype=torch.int32, device="cuda")
        coarse = (marks * 1e4).round()
        coarse[..., ::7] = float("nan")
        for scored in (marks, coarse, torch.zeros_like(marks)):
            for limits, real in (([kept], None), ([kept // 2], valid), (each, valid)):
                got = selection.select(scored, limits, kept, recent=RECENT, valid=real, finite=True)
                expected = select_naive.select(
                    scored.cpu(), limits.cpu() if isinstance(limits, Tensor) else limits, kept,
                    recent=RECENT, valid=None if real is None else real.cpu(), finite=True,
                )  # fmt: skip
                found["select"] = found.get("select", True) and torch.equal(got.cpu(), expected)
        lopsided = marks * torch.rand(heads, 1, device="cuda")
        for scored in (lopsided, (lopsided * 1e4).round()):
            for real in (None, valid):
                got = sharing.head_limits(scored, [kept], [slots], RECENT, real)
                real = None if real is None else real.cpu()
                expected = heads_naive.head_limits(scored.cpu(), [kept], [slots], RECENT, real)
                found["head limits"] = found.get("head limits", True) and torch.equal(got.cpu(), expected)
        index = index.clone()
        index[..., :5] = -1
        expected_targets = tuple(t.clone() for t in targets)
        compact_naive.compact(sources, index, expected_targets)
        compaction.compact(sources, index, targets)
        same = all(
            torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4))
            for a, b in zip(targets, expected_targets, strict=True)
        )
        found["compact"] = found.get("compact", True) and same
    for name, same in found.items():
        print(f"check {name}: {'equal' if same else 'WRONG'}", flush=True)
    return found


def eviction_row(model: str, rows: int, slots: int, kept: int, bandwidth: float) -> dict:
    heads, _, size, dtype = MODELS[model]
    sets = eviction_sets(model, rows, slots, kept)
    limits = [kept] * rows
    marks, _, index, _ = sets[0]
    moved = 2 * 2 * index.numel() * size * dtype.itemsize + index.numel() * (8 + 4 + 4)
    query = torch.randn(rows, heads, RECENT, size, device="cuda", dtype=dtype)

    def whole(sources: tuple, targets: tuple) -> None:
        scored = scores.window_scores(query, sources[0], size**-0.5)
        chosen = selection.select(scored, limits, kept, recent=RECENT, finite=True)
        compaction.compact(sources, chosen, targets)

    return {
        "model": model, "rows": rows, "slots": slots, "kept": kept,
        "limits": microseconds([lambda s=s: sharing.head_limits(s[0], limits, [slots] * rows, RECENT) for s in sets]),
        "select floor": (marks.nbytes + index.nbytes) / bandwidth / 1e6,
        "select": microseconds(
            [lambda s=s: selection.select(s[0], limits, kept, recent=RECENT, finite=True) for s in sets]
        ),
        "select naive": microseconds(
            [lambda s=s: select_naive.select(s[0], limits, kept, recent=RECENT, finite=True) for s in sets[:1]]
        ),
        "compact floor": moved / bandwidth / 1e6,
        "compact": microseconds([lambda s=s: compaction.compact(*s[1:]) for s in sets]),
        "compact naive": microseconds([lambda s=s: compact_naive.compact(*s[1:]) for s in sets]),
        f"all, W {RECENT}": microseconds([lambda s=s: whole(s[1], s[3]) for s in sets]),
    }  # fmt: skip


def select_sweep(model: str, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    sets = eviction_sets(model, rows, slots, kept)
    found: dict[str, float] = {}
    for options in SWEEP_SELECT[slots]:
        if elapsed() < seconds:
            plan = selection.Blocks(*options)
            calls = [
                lambda s=s, p=plan: selection.select(s[0], [kept] * rows, kept, recent=RECENT, finite=True, blocks=p)
                for s in sets
            ]
            found[str(options)] = microseconds(calls)
    return found


def limits_sweep(model: str, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    sets = eviction_sets(model, rows, slots, kept)
    found: dict[str, float] = {}
    for options in SWEEP_LIMITS:
        if elapsed() < seconds:
            plan = sharing.Blocks(*options)
            calls = [lambda s=s, p=plan: sharing.head_limits(s[0], [kept], [slots], RECENT, blocks=p) for s in sets]
            found[str(options)] = microseconds(calls)
    return found


def compact_sweep(model: str, rows: int, slots: int, kept: int, seconds: float) -> dict[str, float]:
    sets = eviction_sets(model, rows, slots, kept)
    found: dict[str, float] = {}
    for options in SWEEP_COMPACT:
        if elapsed() < seconds:
            plan = compaction.Blocks(*options)
            found[str(options)] = microseconds([lambda s=s, p=plan: compaction.compact(*s[1:], blocks=p) for s in sets])
    return found


def echo_sets(model: str, tokens: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Queries and keys as views of one projection, cosines and sines, the scaling."""
    heads, kv_heads, size, dtype = MODELS[model]
    sets = []
    for _ in range(max(1, min(3, int(2 * L2 // ((heads + kv_heads) * tokens * size * dtype.itemsize)) + 1))):
        fused = torch.randn(1, tokens, heads + 2 * kv_heads, size, device="cuda", dtype=dtype).transpose(1, 2)
        angle = 1e4 * torch.rand(1, ROTATED[model] // 2, device="cuda", dtype=torch.float64)
        sets.append((fused[:, :heads], fused[:, heads : heads + kv_heads], angle.cos(), angle.sin(), size**-0.5))
    return sets


def check_echo() -> dict[str, float]:
    """Relative error of the scores against the float32 definition; how many turned numbers differ at all."""
    found: dict[str, float] = {}
    for model, (_, kv_heads, _, _) in MODELS.items():
        ((query, key, cos, sin, scaling), *_) = echo_sets(model, 6143)
        found[f"turn {model}"] = float((turning.turn(key, cos, sin) != turn_naive.turn(key, cos, sin)).sum())
        for valid in (None, torch.rand(1, kv_heads, 6143, device="cuda") > 0.1):
            expected = band_naive.band_scores(query.float(), key.float(), scaling, valid, (cos, sin))
            off = error(band.band_scores(query, key, scaling, valid, (cos, sin)), expected)
            found[f"band {model}"] = max(found.get(f"band {model}", 0.0), off, key=lambda e: (e != e, e))
    for name, value in found.items():
        print(f"check {name}: {value:.2e} {'ok' if value < 1e-2 else 'WRONG'}", flush=True)
    return found


def echo_row(model: str, tokens: int, bandwidth: float) -> dict:
    """All that `echo` computes in a layer. Floors: queries and sample; queries and keys."""
    heads, kv_heads, size, dtype = MODELS[model]
    sets = echo_sets(model, tokens)
    vector = tokens * size * dtype.itemsize / bandwidth / 1e6
    exponentials = tokens * (tokens // band_naive.STRIDE) * heads / 3.7e6
    lse = [band.sampled_log_sum_exp(s[0], s[1], s[4], None, s[2:4]) for s in sets]
    sample = [s[1][:, :, tokens % band_naive.STRIDE :: band_naive.STRIDE] for s in sets]
    return {
        "model": model, "tokens": tokens,
        "turn": microseconds([lambda s=s: turning.turn(*s[1:4]) for s in sets]),
        "turn sample": microseconds(
            [lambda s=s, k=k: turning.turn(k, *s[2:4]) for s, k in zip(sets, sample, strict=True)]
        ),
        "pass 1 floor": max(heads * vector, exponentials),
        "pass 1": microseconds([lambda s=s: band.sampled_log_sum_exp(s[0], s[1], s[4], None, s[2:4]) for s in sets]),
        "pass 2 floor": (heads + kv_heads) * vector,
        "pass 2, not turned": microseconds(
            [lambda s=s, x=x: band.near_scores(s[0], s[1], s[4], x, None) for s, x in zip(sets, lse, strict=True)]
        ),
        "pass 2": microseconds(
            [
                lambda s=s, x=x: band.near_scores(s[0], s[1], s[4], x, None, s[2:4])
                for s, x in zip(sets, lse, strict=True)
            ]
        ),
        "band": microseconds([lambda s=s: band.band_scores(s[0], s[1], s[4], None, s[2:4]) for s in sets]),
        "band naive": microseconds([lambda s=s: band_naive.band_scores(s[0], s[1], s[4]) for s in sets[:1]]),
        "window 256": microseconds(
            [
                lambda s=s: scores.window_scores(s[0][:, :, -256:], s[1], s[4], power=2, per_visible=True)
                for s in sets
            ]
        ),
    }  # fmt: skip


def echo_sweep(model: str, tokens: int, seconds: float) -> dict[str, float]:
    sets = echo_sets(model, tokens)
    lse = [band.sampled_log_sum_exp(s[0], s[1], s[4], None) for s in sets]
    sample = [s[1][:, :, tokens % band_naive.STRIDE :: band_naive.STRIDE] for s in sets]
    found: dict[str, float] = {}
    for options in SWEEP_BAND:
        if elapsed() < seconds:
            plan = band.Blocks(*options)
            found[f"pass 2 {options}"] = microseconds(
                [
                    lambda s=s, x=x, p=plan: band.near_scores(s[0], s[1], s[4], x, None, s[2:4], p)
                    for s, x in zip(sets, lse, strict=True)
                ]
            )
    for options in SWEEP_LSE[1024]:
        if elapsed() < seconds:
            tiles = scores.Blocks(*options)
            found[f"pass 1 {options}"] = microseconds(
                [
                    lambda s=s, k=k, p=tiles: scores.log_sum_exp(s[0], k, s[4], None, True, p)
                    for s, k in zip(sets, sample, strict=True)
                ]
            )
    return found


def packed_sets(model: str, rows: int, slots: int, bits: int, ragged: bool = False) -> list[tuple]:
    """Queries, random codes in pages, and 64 newest slots of 94."""
    heads, kv_heads, size, dtype = MODELS[model]
    each = slots // 64
    total = rows * kv_heads * each * (key_bytes(size, bits, 2) + value_bytes(size, bits, 2))
    sets = []
    for _ in range(max(2, min(24, int(3 * L2 // total) + 1))):
        count = torch.full((rows, kv_heads), each, dtype=torch.int32, device="cuda")
        if ragged:  # as many pages in all, up to half as many again in a head
            count[:, ::2] += torch.randint(0, each // 2, (rows, kv_heads // 2), device="cuda", dtype=torch.int32)
            count[:, 1::2] = 2 * each - count[:, ::2]
        first = (count.cumsum(1) - count).int()
        start = torch.randint(0, 64, (rows, kv_heads), device="cuda", dtype=torch.int32)

        def codes(shape: tuple[int, ...], scales: tuple[int, ...], pages: int = kv_heads * each) -> Codes:
            numbers = torch.randint(0, 256, (rows, pages, *shape), device="cuda", dtype=torch.uint8)
            scale = torch.rand(rows, pages, *scales, device="cuda").half() * (3 / 2**bits) + 0.01
            return Codes(numbers, scale, -scale * 2 ** (bits - 1), bits)

        pages = Pages(
            codes((8 * bits, size), (size,)), codes((size, 8 * bits), (64, size // value_group(size))),
            torch.stack([first, count, start]), not ragged,
        )  # fmt: skip
        query = torch.randn(rows, heads, 1, size, device="cuda", dtype=dtype)
        newest = (torch.randn(rows, kv_heads, 64 + ROOM, size, device="cuda", dtype=dtype) for _ in range(2))
        length = torch.tensor([64], dtype=torch.int32, device="cuda")
        sets.append((query, pages, *newest, length, None, size**-0.5))
    return sets


def check_packed() -> dict[str, float]:
    """Relative error against the float32 definition."""
    found: dict[str, float] = {}
    for model, rows, ragged in itertools.product(MODELS, (1, 7), (False, True)):
        for bits in (8, 4, 2):
            ((query, pages, keys, values, length, start, scaling), *_) = packed_sets(model, rows, 1536, bits, ragged)
            expected = packed_naive.packed_attention(
                query.float(), pages, keys.float(), values.float(), length, start, scaling
            )
            for overlap in (False, True):
                name = f"packed {model} {bits} bits{' ragged' if ragged else ''}{' overlap' if overlap else ''}"
                plan = packed.choose(rows * keys.shape[1], 24, 8, keys.shape[3], 2, overlap)
                for _ in range(3):  # a race would move
                    got = packed.packed_attention(query, pages, keys, values, length, start, scaling, blocks=plan)
                    found[name] = max(found.get(name, 0.0), error(got, expected), key=lambda e: (e != e, e))
    for name, value in found.items():
        print(f"check {name}: {value:.2e} {'ok' if value < 1e-2 else 'WRONG'}", flush=True)
    return found


def packed_row(model: str, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    _, kv_heads, size, dtype = MODELS[model]
    row: dict = {"model": model, "rows": rows, "slots": slots, "bits": bits}
    page = key_bytes(size, bits, 2) + value_bytes(size, bits, 2)
    newest = 64 * 2 * size * dtype.itemsize
    row["floor"] = rows * kv_heads * (slots // 64 * page + newest) / bandwidth / 1e6
    for name, ragged, overlap in (
        ("one after the other", False, False),
        ("overlap", False, True),
        ("ragged", True, True),
    ):
        sets = packed_sets(model, rows, slots, bits, ragged)
        plan = packed.choose(rows * kv_heads, slots // 64, 8, size, 2, overlap)
        row[name] = microseconds([lambda s=s, p=plan: packed.packed_attention(*s, blocks=p) for s in sets])
    for name, kept in (("16 bits", slots), ("16 bits, a quarter", slots // 4)):
        plain = decode_sets(model, rows, kept)
        row[name] = microseconds([lambda s=s: decode.decode_attention(*s[:4], None, s[4]) for s in plain])
    return row


def packing_sets(model: str, rows: int, slots: int, bits: int, count: int = 3) -> list[tuple]:
    """Keys and values as views of one projection, every slot of them chosen, and how to pack them."""
    _, kv_heads, size, dtype = MODELS[model]
    index = torch.arange(slots, device="cuda").expand(rows, kv_heads, slots).contiguous()
    sets = []
    for _ in range(count):
        fused = torch.randn(rows, slots, kv_heads, 2 * size, device="cuda", dtype=dtype).transpose(1, 2)
        sets.append(
            (fused[..., :size], fused[..., size:], index, [slots] * rows, 0, kv_heads * slots // 64, bits, False)
        )
    return sets


def check_packing() -> bool:
    """Codes, scales and zero points equal plain torch to the last bit, in heads of unequal numbers of pages too."""
    equal = True
    for model, rows, bits in itertools.product(MODELS, (1, 7), (8, 4, 2)):
        ((key, value, index, *_, total, _, _), *_) = packing_sets(model, rows, 1536, bits, 1)
        used = torch.randint(0, 1537, index.shape[:2], dtype=torch.int32, device="cuda")
        ragged = index.masked_fill(torch.arange(1536, device="cuda") < 1536 - used[..., None], -1)
        for chosen, limits, even in (
            (index, [1536] * rows, True),
            (index, [1536] * rows, False),
            (ragged, used, False),
        ):
            got = packing.pack(key, value, chosen, limits, 0, total, bits, even)
            expected = packing_naive.pack(key, value, chosen, limits, 0, total, bits, even)
            for mine, theirs in zip(got[:2], expected[:2], strict=True):
                equal &= all(torch.equal(t, theirs.tensors()[name]) for name, t in mine.tensors().items())
            equal &= torch.equal(got[2], expected[2])
    print(f"check packing: {'equal' if equal else 'WRONG'}", flush=True)
    return equal


def packing_row(model: str, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    """Writing all slots of a prompt into pages; with what is computed about them, and their positions."""
    _, kv_heads, size, dtype = MODELS[model]
    page = key_bytes(size, bits, 2) + value_bytes(size, bits, 2) + 2 * 64 * size * dtype.itemsize
    row: dict = {"model": model, "rows": rows, "slots": slots, "bits": bits}
    row["floor"] = rows * kv_heads * slots // 64 * page / bandwidth / 1e6
    sets = packing_sets(model, rows, slots, bits)
    row["kernel"] = microseconds([lambda s=s: packing.pack(*s) for s in sets])
    row["naive"] = microseconds([lambda s=s: packing_naive.pack(*s) for s in sets[:1]])
    places = sets[0][2].int()
    row["positions"] = microseconds([lambda: pack_positions(places, sets[0][2], slots)])
    return row


def unpacking_sets(model: str, rows: int, slots: int, bits: int, ragged: bool, count: int = 2) -> list[tuple]:
    """Pages, and parts of larger tensors of NaN for what is in them."""
    _, _, size, dtype = MODELS[model]
    sets = []
    for _, pages, *_ in packed_sets(model, rows, slots, bits, ragged)[:count]:
        shape = rows, pages.layout.shape[2], 64 * pages.most + ROOM, size
        whole = (torch.full(shape, float("nan"), device="cuda", dtype=dtype) for _ in range(2))
        sets.append((pages.keys, pages.values, pages.layout, tuple(t[:, :, : 64 * pages.most] for t in whole)))
    return sets


def check_unpacking() -> bool:
    """Keys, values and positions equal plain torch to the last bit, in heads of unequal numbers of pages too."""
    equal = True
    for model, rows, bits, ragged in itertools.product(MODELS, (1, 7), (8, 4, 2), (False, True)):
        ((*packed, got), *_) = unpacking_sets(model, rows, 1536, bits, ragged)
        expected = tuple(torch.empty_like(t) for t in got)
        unpacking.unpack(*packed, got)
        unpacking_naive.unpack(*packed, expected)
        equal &= all(map(torch.equal, got, expected))
    for tokens in (700, 32768):
        bitmap = torch.randint(0, 256, (3, 32, tokens // 8), device="cuda", dtype=torch.uint8)
        slots = tokens * 3 // 4
        equal &= torch.equal(unpack_positions(bitmap, slots), bitmap_naive.unpack_positions(bitmap, slots))
    print(f"check unpacking: {'equal' if equal else 'WRONG'}", flush=True)
    return equal


def unpacking_row(model: str, rows: int, slots: int, bits: int, bandwidth: float) -> dict:
    """Writing what is in pages back as keys and values; and their positions."""
    _, kv_heads, size, dtype = MODELS[model]
    page = key_bytes(size, bits, 2) + value_bytes(size, bits, 2) + 2 * 64 * size * dtype.itemsize
    row: dict = {"model": model, "rows": rows, "slots": slots, "bits": bits}
    row["floor"] = rows * kv_heads * slots // 64 * page / bandwidth / 1e6
    sets = unpacking_sets(model, rows, slots, bits, False)
    for warps in (1, 2, 4):
        row[f"{warps} warps"] = microseconds([lambda s=s, w=warps: unpacking.unpack(*s, warps=w) for s in sets])
    row["naive"] = uncaptured(lambda: unpacking_naive.unpack(*sets[0]))
    sets = unpacking_sets(model, rows, slots, bits, True)
    row["ragged"] = microseconds([lambda s=s: unpacking.unpack(*s) for s in sets])
    row["ragged slots"] = statistics.mean(s[3][0].shape[2] for s in sets)  # those of the head that has most
    bitmap = torch.randint(0, 256, (rows, kv_heads, slots * 5 // 32), device="cuda", dtype=torch.uint8)
    row["positions"] = microseconds([lambda: unpack_positions(bitmap, slots)])
    return row


def packed_sweep(model: str, rows: int, slots: int, bits: int, seconds: float) -> dict[str, float]:
    sets = packed_sets(model, rows, slots, bits)
    found: dict[str, float] = {}
    # pages, chunk, warps, stages, overlap, registers
    for registers, pages, stages, warps in itertools.product((128, 168, 0), (1, 2, 4, 8), (1, 2), (1, 2)):
        if elapsed() > seconds or (warps == 2 and registers == 168):
            continue
        plan = packed.Blocks(pages, 64, warps, stages, True, registers)
        found[str(dataclasses.astuple(plan))] = microseconds(
            [lambda s=s, p=plan: packed.packed_attention(*s, blocks=p) for s in sets]
        )
    return found


def prefill_attention(model: str, keys: int) -> dict:
    heads, kv_heads, size, dtype = MODELS[model]
    query = torch.randn(1, heads, keys, size, device="cuda", dtype=dtype)
    key, value = (torch.randn(1, kv_heads, keys, size, device="cuda", dtype=dtype) for _ in range(2))
    row: dict = {"model": model, "keys": keys}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):

        def one(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)

        row[name] = microseconds([one])
    return row


SWEEPS = {
    "decode": decode_sweep, "scores": scores_sweep, "select": select_sweep, "limits": limits_sweep,
    "compact": compact_sweep, "packed": packed_sweep, "echo": echo_sweep,
}  # fmt: skip


def measure_attention(report: dict) -> None:
    """Decode attention, window scores, and attention of a prefill beside them."""
    check(report)
    print(f"checked after {elapsed():.0f} s", flush=True)
    report["decode"] = [decode_row(m, *size, report["read_TBps"]) for m in MODELS for size in DECODE_SIZES]
    print(f"decode after {elapsed():.0f} s", flush=True)
    report["scores"] = [scores_row(m, k, w) for m in MODELS for k in LENGTHS for w in WINDOWS]
    report["prefill"] = [prefill_attention(m, k) for m in MODELS for k in LENGTHS]
    print(f"scores after {elapsed():.0f} s", flush=True)


def measure_eviction(report: dict) -> None:
    """Selection and compaction, and a whole eviction."""
    report["equal"] = check_eviction()
    report["eviction"] = [eviction_row(*case, report["copy_TBps"]) for case in EVICTIONS]
    print(f"eviction after {elapsed():.0f} s", flush=True)


def measure_echo(report: dict) -> None:
    """Turning keys and the scores of the band, beside the window scores that `echo` adds."""
    report["echo_error"] = check_echo()
    report["echo"] = [echo_row(*case, report["copy_TBps"]) for case in ECHOES]
    print(f"echo after {elapsed():.0f} s", flush=True)


def measure_packing(report: dict) -> None:
    """Writing pages of codes."""
    report["packing_equal"] = check_packing()
    report["packing"] = [packing_row(*case, report["copy_TBps"]) for case in PACKED]
    print(f"packing after {elapsed():.0f} s", flush=True)


def measure_unpacking(report: dict) -> None:
    """Reading pages of codes back."""
    report["unpacking_equal"] = check_unpacking()
    report["unpacking"] = [unpacking_row(*case, report["copy_TBps"]) for case in UNPACKED]
    print(f"unpacking after {elapsed():.0f} s", flush=True)


def measure_packed(report: dict) -> None:
    """Decode attention over codes, beside that over 16 bits."""
    report["packed_error"] = check_packed()
    print(f"packed checked after {elapsed():.0f} s", flush=True)
    report["packed"] = [packed_row(*case, report["read_TBps"]) for case in PACKED]
    print(f"packed after {elapsed():.0f} s", flush=True)


PARTS = {
    "eviction": measure_eviction, "echo": measure_echo, "attention": measure_attention, "packing": measure_packing,
    "unpacking": measure_unpacking, "packed": measure_packed,
}  # fmt: skip
SWEPT = {  # the others: attention
    "select": "eviction", "limits": "eviction", "compact": "eviction", "packed": "packed", "echo": "echo",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    parser.add_argument("--only", choices=sorted(PARTS), help="some of the kernels; default: all")
    parser.add_argument("--seconds", type=float, default=140, help="when to stop trying other tiles")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(int(time.time()))
    result = Result(arguments.out, unit="microseconds")
    report = result.data
    report |= ceilings()
    print({name: round(report[name], 2) for name in ("copy_TBps", "read_TBps", "bf16_TFLOPs")}, flush=True)
    for name, measure in PARTS.items():
        if arguments.only in (None, name):
            with result.attempt(name):
                measure(report)
            result.write()
    report["sweeps"] = {}
    for model, kind, *size in (
        *((model, "echo", tokens) for model, tokens in ECHOES[:2]),
        ("pythia-2.8b", "limits", 1, 6144, 1536), ("llama-8b", "limits", 1, 32768, 8192),
        ("pythia-2.8b", "select", 1, 6144, 1536), ("pythia-2.8b", "compact", 1, 6144, 1536),
        ("pythia-2.8b", "select", 8, 6144, 1536), ("llama-8b", "select", 1, 32768, 8192),
        ("llama-8b", "compact", 1, 32768, 8192),
        ("pythia-2.8b", "decode", 1, 1690), ("pythia-2.8b", "scores", 6144, 1024),
        ("pythia-2.8b", "decode", 8, 1690), ("llama-8b", "decode", 1, 1690), ("llama-8b", "scores", 6144, 1024),
        ("pythia-2.8b", "scores", 6144, 32), ("llama-8b", "decode", 8, 6272), ("pythia-2.8b", "decode", 8, 6272),
        ("pythia-2.8b", "decode", 1, 6272), ("llama-8b", "scores", 6144, 32),
        *((model, "packed", *size) for model, *size in PACKED_SWEEPS),
    ):  # fmt: skip
        if arguments.only in (None, SWEPT.get(kind, "attention")):
            with result.attempt(f"sweep {kind} {model} {size}"):
                report["sweeps"][f"{kind} {model} {size}"] = SWEEPS[kind](model, *size, arguments.seconds)
    report["seconds"] = elapsed()
    for name, found in report["sweeps"].items():
        print(name + ": " + "; ".join(f"{k} {v:.1f}" for k, v in sorted(found.items(), key=lambda item: item[1])))
    rates = (
        f"{report['copy_TBps']:.2f} TB/s copied, {report['read_TBps']:.2f} read, {report['bf16_TFLOPs']:.0f} TFLOP/s"
    )
    print(f"{rates}, {elapsed():.0f} s in all")
    result.finish("decode", "scores", "prefill", "echo", "eviction", "packing", "unpacking", "packed")


if __name__ == "__main__":
    main()
