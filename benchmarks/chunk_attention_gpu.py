"""Attention of a chunk over kept and new keys: in parts beside torch's flash kernel, and what cuDNN's plans cost.

    python benchmarks/chunk_attention_gpu.py --out chunk-attention.json

`plans`: the time of the first call of cuDNN's attention at a shape, on the host, and of the second, over shapes that
differ in one number, as `ops/split_attention.py` asks for them. `attention`: milliseconds of the device for what a
layer does with a chunk before it evicts: keys and values appended, attention, and the result laid out as the model
wants it; as it was (`torch.cat`, flash, a copy), and in parts with more and fewer plans. `of it`: each piece alone.
`chunks`: the host's and the device's time of that for 32 layers of a pyramid, one after the other, with plans made.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidkv.budget import layer_budgets
from pyramidkv.ops import split_attention as split
from pyramidkv.ops.append import append
from pyramidkv.ops.append import naive as append_naive
from pyramidkv.ops.attention import attention
from pyramidkv.ops.merge import merge
from result import Result, add_out

# name: query heads, KV heads, head size, dtype
MODELS = {"pythia-2.8b": (32, 32, 80, torch.float16), "llama-3.1-8b": (32, 8, 128, torch.bfloat16)}
SIZES = ((4096, 2048), (4096, 2300), (4096, 8192), (2048, 2048), (8192, 2048))  # queries, kept keys
Both = tuple[Tensor, Tensor]


def milliseconds(work: Callable[[], object], repeats: int = 15) -> float:
    """Median of the device's time."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 4)


def seconds(work: Callable[[], object]) -> float:
    """The host's and the device's time, one after the other."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def made(model: str, queries: int, past: int) -> tuple[Tensor, Both, Both]:
    """Queries, kept and new keys and values."""
    heads, kv_heads, size, dtype = MODELS[model]
    query = torch.randn(1, heads, queries, size, device="cuda", dtype=dtype)
    old, new = (
        tuple(torch.randn(1, kv_heads, n, size, device="cuda", dtype=dtype) for _ in range(2)) for n in (past, queries)
    )
    return query, old, new  # type: ignore[return-value]


def as_it_was(query: Tensor, old: Both, new: Both) -> Tensor:
    """Torch's flash kernel."""
    key, value = append_naive.append(old, new)
    return attention(query, key, value, 0.1).transpose(1, 2).contiguous()


def in_parts(query: Tensor, old: Both, new: Both, plans: int) -> Tensor:
    """Both ends of it as the library has them; so many plans from each power of two to the next."""
    before, split.PLANS = split.PLANS, plans
    try:
        key, value = append(old, new, by_token=True)
        if why := split.why_not(query, key, value, 0.0):
            raise SystemExit(f"not split: {why}")
        return attention(query, key, value, 0.1).transpose(1, 2).contiguous()
    finally:
        split.PLANS = before


def measure_plans(model: str) -> list[dict[str, Any]]:
    """First and second calls at 32 numbers of kept keys, and of new ones."""
    rows = []
    for what, causal, sizes in (
        ("kept keys", False, [(4096, 1001 + 57 * n) for n in range(32)]),
        ("new keys", True, [(2048 + 64 * n, 0) for n in range(12)]),
        ("round numbers of kept keys", False, [(4096, split.round_number(1200 + 88 * n)) for n in range(32)]),
    ):
        first, second = [], []
        for queries, past in sizes:
            query, old, new = made(model, queries, past)
            key, value = append(old, new, by_token=True)
            begin, end = (past, past + queries) if causal else (0, past)
            k, v, q = split._of_one_row(key, 0, begin, end), split._of_one_row(value, 0, begin, end), query
            first.append(seconds(lambda q=q, k=k, v=v, c=causal: split._cudnn(q, k, v, 0.1, c)))
            second.append(seconds(lambda q=q, k=k, v=v, c=causal: split._cudnn(q, k, v, 0.1, c)))
        rows.append({
            "model": model, "plans": what, "shapes": len(set(sizes)),
            "first_ms": round(1e3 * statistics.median(first), 2), "first_worst_ms": round(1e3 * max(first), 1),
            "first_total_ms": round(1e3 * sum(first), 1), "second_ms": round(1e3 * statistics.median(second), 3),
        })  # fmt: skip
    return rows


def measure_attention(model: str, queries: int, past: int) -> dict[str, Any]:
    """One shape, every way."""
    query, old, new = made(model, queries, past)
    exact = as_it_was(query.float(), *(tuple(t.float() for t in both) for both in (old, new)))  # type: ignore[arg-type]
    row: dict[str, Any] = {"model": model, "queries": queries, "kept": past}
    row["as it was"] = milliseconds(lambda: as_it_was(query, old, new))
    for name, plans in (("a plan each", 1 << 20), ("16 plans", 16), ("8 plans", 8), ("4 plans", 4), ("0 plans", 0)):
        row[name] = milliseconds(lambda n=plans: in_parts(query, old, new, n))  # type: ignore[misc]
    got = in_parts(query, old, new, 8).float()
    row["error"] = f"{((got - exact).norm() / exact.norm()).item():.1e}"
    return row


def measure_pieces(model: str, queries: int, past: int) -> dict[str, Any]:
    """One shape: each piece alone."""
    query, old, new = made(model, queries, past)
    key, value = append(old, new, by_token=True)
    q = split._of_one_row(query, 0, 0, queries)
    row: dict[str, Any] = {"model": model, "queries": queries, "kept": past}
    row["cat"] = milliseconds(lambda: append_naive.append(old, new))
    row["append by head"] = milliseconds(lambda: append(old, new))
    row["append by token"] = milliseconds(lambda: append(old, new, by_token=True))
    row["copy of the result"] = milliseconds(lambda: query.transpose(1, 2).contiguous())
    parts = []
    for name, kernel, begin, end in (
        ("kept, cuDNN", split._cudnn, 0, past), ("kept, flash", split._flash, 0, past),
        ("200 kept, flash", split._flash, past - 200, past), ("new, cuDNN", split._cudnn, past, past + queries),
        ("new, flash", split._flash, past, past + queries),
    ):  # fmt: skip
        given = (q, split._of_one_row(key, 0, begin, end), split._of_one_row(value, 0, begin, end), 0.1, end > past)
        row[name] = milliseconds(lambda k=kernel, g=given: k(*g))  # type: ignore[misc]
        parts.append(kernel(*given))
    out = torch.empty_like(query.transpose(1, 2).contiguous()).transpose(1, 2)
    for number in (2, 3):
        row[f"merge of {number}"] = milliseconds(lambda n=number: merge(parts[:n], out))  # type: ignore[misc]
    return row


def measure_chunks(model: str, queries: int, budget: int) -> list[dict[str, Any]]:
    """32 layers of a pyramid."""
    kept = layer_budgets("pyramid", layers=32, total=32 * budget, prompt=32768, window=32, least=33, beta=20)
    layers = [made(model, queries, n) for n in kept]
    rows = []
    for name, work in (
        ("as it was", as_it_was),
        *((f"{n} plans", lambda *a, n=n: in_parts(*a, n)) for n in (0, 4, 8, 16)),
        ("a plan each", lambda *a: in_parts(*a, 1 << 20)),
    ):

        def all_layers(work: Callable[..., Tensor] = work) -> None:
            for layer in layers:
                work(*layer)

        first = seconds(all_layers)
        start = time.perf_counter()
        all_layers()
        host = time.perf_counter() - start
        rows.append({
            "model": model, "queries": queries, "budget": budget, "way": name, "first_ms": round(1e3 * first, 1),
            "host_ms": round(1e3 * host, 2), "ms": milliseconds(all_layers, 7),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = Result(
        arguments.out, unit="milliseconds: of `plans` host and device together; else of the device, medians",
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    )  # fmt: skip
    with torch.no_grad():
        for model in MODELS:
            with result.attempt(f"plans, {model}"):
                for row in measure_plans(model):
                    result.add("plans", row)
        for model in MODELS:
            for queries, past in SIZES:
                with result.attempt(f"attention, {model}, {queries} over {past}"):
                    result.add("attention", measure_attention(model, queries, past))
            with result.attempt(f"of it, {model}"):
                result.add("of it", measure_pieces(model, 4096, 2048))
            with result.attempt(f"chunks, {model}"):
                for row in measure_chunks(model, 4096, 2048):
                    result.add("chunks", row)
    result.finish("plans", "attention", "of it", "chunks")


if __name__ == "__main__":
    main()
