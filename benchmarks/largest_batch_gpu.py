"""Tokens a second at the largest batch that fits a GPU: the full cache (StaticCache, compiled) and a compressed one.

    python benchmarks/largest_batch_gpu.py --seconds 190

Random weights of the true shape, all rows of one length, plain `generate()`. The activations of a whole prefill would
take the place of many rows, so no engine does that: a session reads a few rows at a time; for the `StaticCache`, which
is filled for all rows at once, the model is fed the prompt in chunks (`--chunk`) before `generate()` decodes. The first
tokens, in which steps are compiled and captured, are not timed; the time of a token is the median over the others.

The batch is the largest that should fit by arithmetic (weights, cache, activations) into what is free; if it does not,
a smaller one is tried. `--full` and `--compressed` name batches instead. No run is begun that should end after
`--seconds`, counted from the start of the process.

Without a GPU: --device cpu --model pythia-70m --prompt 256 --chunk 64 --full 2 --compressed 4
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # buffers of every size in turn

import psutil
import torch
from torch import Tensor
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

import pyramidkv
from pyramidkv.chunks import even_sizes
from pyramidkv.cli.estimate import Estimate
from pyramidkv.decode import compiled
from pyramidkv.evaluate.speed import free_unused, peak_bytes, reset_peak, synchronize, wait_for_tokens
from pyramidkv.models.device import free_bytes
from pyramidkv.models.source import LoadedModel, load_model
from pyramidkv.rows import TOGETHER
from result import Result, add_out

WARM_UP = 8  # tokens: a step is compiled at the second, captured at the third or fourth
RESERVE = 1.5e9  # bytes: logits, workspaces, kernels, a graph's own memory
STARTS = 3  # batches tried before an engine is given up
BEGAN = time.perf_counter() - (time.time() - psutil.Process().create_time())  # imports are counted


@dataclass(frozen=True)
class Engine:
    """A way to generate; `config` None: the full cache of transformers."""

    name: str
    config: pyramidkv.CompressionConfig | None
    prefill_ms: float  # of a row, as far as known: to see whether a run can still end in time
    start_seconds: float  # for compiling and capturing


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prompt, of a chunk of it where it is read in chunks, and new ones."""

    prompt: int
    chunk: int
    new: int


class Clock(StoppingCriteria):
    """The time after each token."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        wait_for_tokens(input_ids.device)
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def needed(loaded: LoadedModel, engine: Engine, sizes: Sizes, rows: int) -> float:
    """Bytes beside the weights that a batch takes at its peak, while its prompts are read."""
    config = loaded.model.config
    itemsize = loaded.model.dtype.itemsize
    full = pyramidkv.CompressionConfig(method="full")
    estimate = Estimate.of(
        engine.config or full, config, parameters=loaded.parameters, prompt=sizes.prompt, itemsize=itemsize
    )
    # Queries, keys and values before and after rotation lie beside what the estimate counts.
    token = estimate.activation_bytes / sizes.prompt + 6 * config.hidden_size * itemsize
    if engine.config is None:
        total = sizes.prompt + sizes.new
        # With a mask of the chunk over all slots, in bool and as numbers.
        work = rows * sizes.chunk * (token + total * (1 + itemsize))
        return estimate.plan.full_bytes(total, batch=rows, itemsize=itemsize) + work + RESERVE
    kept = estimate.plan.kv_bytes(sizes.prompt, batch=rows, itemsize=itemsize)
    layers = estimate.plan.budgets(sizes.prompt, batch=rows, itemsize=itemsize)
    # The groups become one cache layer by layer: the largest layer lies there twice.
    return kept * (1 + max(layers) / sum(layers)) + max(TOGETHER, sizes.prompt) * token + RESERVE


def batches(loaded: LoadedModel, engine: Engine, sizes: Sizes) -> list[int]:
    """The largest batch that should fit, and smaller ones."""
    free = free_bytes(loaded.model.device)
    most = next(rows for rows in range(4096, 0, -1) if rows == 1 or needed(loaded, engine, sizes, rows) <= free)
    return list(dict.fromkeys(max(1, round(most * (1 - 0.06 * i))) for i in range(STARTS)))


def timed(model: Any, ids: Tensor, new: int, **options: Any) -> list[float]:
    """When each token of a `generate()` came."""
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return clock.ticks


def generate(model: Any, engine: Engine, sizes: Sizes, rows: int) -> dict[str, Any]:
    """One batch: its prompts read, then decoded."""
    ids = torch.randint(0, model.config.vocab_size, (rows, sizes.prompt), device=model.device)
    free_unused(model.device)
    reset_peak(model.device)
    synchronize(model.device)
    begin = time.perf_counter()
    with contextlib.nullcontext() if engine.config is None else pyramidkv.compress(model, engine.config) as session:
        if session is None:
            cache = StaticCache(config=model.config, max_cache_len=sizes.prompt + sizes.new)
            at = 0
            with torch.no_grad():
                for size in even_sizes(sizes.prompt - 1, sizes.chunk):
                    model(ids[:, at : at + size], past_key_values=cache, use_cache=True, logits_to_keep=1)
                    at += size
            ticks = timed(model, ids, sizes.new, past_key_values=cache)
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        else:
            ticks = timed(model, ids, sizes.new)
            held = session.report().kv_bytes
    steady = [b - a for a, b in zip(ticks[WARM_UP:], ticks[WARM_UP + 1 :], strict=False)]
    tpot = statistics.median(steady)
    return {
        "batch": rows, "tokens_per_second": rows / tpot, "tpot_ms": 1e3 * tpot, "tpot_max_ms": 1e3 * max(steady),
        "ttft_s": ticks[0] - begin, "warm_up_s": ticks[WARM_UP] - ticks[0], "kv_GB": held / 1e9,
        "max_memory_GB": (peak_bytes(model.device) or 0) / 1e9, "tpot_all_ms": [round(1e3 * t, 3) for t in steady],
    }  # fmt: skip


def forget(model: Any) -> None:
    """Let go of everything that a run has compiled or allocated."""
    torch._dynamo.reset()
    for name in (compiled._ATTRIBUTE, "_compiled_call"):
        if name in vars(model):
            delattr(model, name)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def runs(loaded: LoadedModel, engine: Engine, sizes: Sizes, asked: list[int], seconds: float) -> Iterator[dict]:
    """A row for each batch tried, the last of which fitted."""
    forget(loaded.model)
    for rows in asked or batches(loaded, engine, sizes):
        row: dict[str, Any] = {"engine": engine.name, "batch": rows}
        need, free = needed(loaded, engine, sizes, rows), free_bytes(loaded.model.device)
        row |= {"predicted_GB": need / 1e9, "free_GB": free / 1e9}
        ends = time.perf_counter() - BEGAN + rows * engine.prefill_ms / 1e3 + engine.start_seconds
        if need > 1.06 * free:  # the arithmetic is on the safe side; far beyond it there is nothing to try
            yield row | {"note": "not tried: does not fit"}
            continue
        if ends > seconds:
            yield row | {"note": f"not tried: would end after {ends:.0f} s"}
            continue
        try:
            row |= generate(loaded.model, engine, sizes, rows)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        forget(loaded.model)
        yield row
        if "tokens_per_second" in row:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-2.8b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt", type=int, default=6144)
    parser.add_argument("--new-tokens", type=int, default=WARM_UP + 24)
    parser.add_argument("--chunk", type=int, default=256, help="of the prompt, for the StaticCache")
    parser.add_argument("--full", type=int, nargs="*", default=[], help="batches of the full cache, largest first")
    parser.add_argument("--compressed", type=int, nargs="*", default=[], help="and of the compressed one")
    parser.add_argument("--method", default="pyramidkv")
    parser.add_argument("--keep", type=float, help="of the tokens; default 0.25, unless --share is given")
    parser.add_argument("--share", type=float, help="of the bytes")
    parser.add_argument("--only", choices=("full", "compressed"))
    parser.add_argument("--seconds", type=float, default=190)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_out(parser)
    options = parser.parse_args()
    if options.new_tokens < WARM_UP + 2:
        parser.error(f"--new-tokens {options.new_tokens}: must be at least {WARM_UP + 2}")
    keep = 0.25 if options.keep is None and options.share is None else options.keep
    loaded = load_model(f"random:{options.model}", device=options.device, dtype=options.dtype)
    sizes = Sizes(options.prompt, options.chunk, options.new_tokens)
    graph, quickest = ("graph", "compiled") if options.device == "cuda" else ("eager", "eager")
    captured = pyramidkv.CompressionConfig(
        method=options.method, keep=keep, share=options.share, room=sizes.new, decode=graph
    )
    full = pyramidkv.CompressionConfig(method="full", room=sizes.new, decode=graph)
    slow = 1.6 if captured.packs(0) else 1.1
    engines = {
        "compressed": [Engine(f"{captured.method}, {captured.describe()}", captured, 90 * slow, 10)],
        "full": [
            Engine("StaticCache, compiled", None, 160, 60),
            Engine(f"ours, method=full decode={graph}", full, 120, 5),
        ],
    }
    quick = replace(captured, decode=quickest)  # last: it compiles for a minute and gains little at such batches
    engines["compressed, compiled"] = [Engine(f"{quick.method}, {quick.describe()}", quick, 90 * slow, 70)]
    result = Result(
        options.out,
        options.device,
        model=f"{options.model}, random weights, {options.dtype}",
        prompt=sizes.prompt,
        chunk=sizes.chunk,
        new_tokens=sizes.new,
        seconds_to_load=time.perf_counter() - BEGAN,
    )
    for side, contenders in engines.items():
        kind = side.split(",")[0]
        if options.only not in (None, kind):
            continue
        asked = options.full if kind == "full" else options.compressed
        for engine in contenders:
            with result.attempt(engine.name):
                for row in runs(loaded, engine, sizes, asked, options.seconds):
                    result.add("runs", row)
                    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    best: dict[bool, float] = {}
    for row in result.data.get("runs", []):
        ours = "ours" not in row["engine"] and "StaticCache" not in row["engine"]
        best[ours] = max(best.get(ours, 0.0), row.get("tokens_per_second", 0.0))
    if len(best) == 2 and best[False]:
        result.data["times_the_full_cache"] = best[True] / best[False]
        print(f"compressed: {best[True] / best[False]:.2f} times the tokens/s of the best full cache")
    result.data["seconds"] = time.perf_counter() - BEGAN
    result.finish("runs")


if __name__ == "__main__":
    main()
