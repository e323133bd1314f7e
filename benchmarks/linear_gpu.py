"""Products of a few rows with a model's weights, beside cuBLAS: right, and how near to the memory's rate?

    python benchmarks/linear_gpu.py --out linear.json [--rows 1 8 16] [--seconds 130]

Every time is that of a CUDA graph that walks through different weights, 400 MB or more of random numbers, so that none
is in the L2 cache; graphs are replayed in turn. Order: correctness, each product in the chosen tiles and in others
beside cuBLAS, then all products of a model, one after the other, and in a chain with the norms and activations of its
layers (attention left out). Other processes fill Triton's cache with the tiles beforehand.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from torch.nn import functional

from pyramidkv.ops.linear import naive
from pyramidkv.ops.linear import triton as kernel
from pyramidkv.ops.linear.triton import Blocks
from result import Result, add_out

BEGAN = time.perf_counter()
BYTES = 400e6  # of different weights in a graph
WORKERS = 8
LAYERS = 32

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Model:
    name: str
    dtype: torch.dtype
    bias: bool
    shapes: dict[str, tuple[int, int]]  # outputs, channels
    head: tuple[int, int]
    weights: dict[str, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)

    def fill(self, least: int = LAYERS) -> None:
        """Random weights; at least so many of each product."""
        for name, shape in (*self.shapes.items(), ("logits", self.head)):
            size = shape[0] * shape[1] * 2
            count = max(least if name != "logits" else 1, 1 if least == 1 else int(BYTES // size) + 1)
            self.weights[name] = [
                (
                    torch.randn(shape, device="cuda", dtype=self.dtype) * shape[1] ** -0.5,
                    torch.randn(shape[0], device="cuda", dtype=self.dtype) if self.bias and name != "logits" else None,
                )
                for _ in range(count)
            ]


PYTHIA = Model(
    "pythia-2.8b", torch.float16, True,
    {"qkv": (7680, 2560), "dense": (2560, 2560), "up": (10240, 2560), "down": (2560, 10240)}, (50304, 2560),
)  # fmt: skip
LLAMA = Model(
    "llama-8b", torch.bfloat16, False,
    {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
     "up": (14336, 4096), "down": (4096, 14336)}, (128256, 4096),
)  # fmt: skip
MODELS = (PYTHIA, LLAMA)


# One row: rows, warps.
VECTORS = {2560: [(2, 2), (8, 2)], 10240: [(2, 4), (2, 8)], 4096: [(2, 4), (1, 4)], 14336: [(1, 8), (4, 8)]}
# Several rows: rows, warps, steps ahead, channels a step; so many splits:
SPLIT = [(64, 4, 6, 128), (64, 4, 8, 128), (64, 4, 4, 256), (64, 4, 2, 128)]


def splits(outputs: int) -> tuple[int, ...]:
    tiles = triton.cdiv(outputs, 64)
    return (1, 2) if 132 < tiles <= 198 else (max(1, 132 // tiles),)


def variants(rows: int, outputs: int, channels: int) -> dict[str, Blocks]:
    """The tiles to try, the chosen ones first."""
    chosen = kernel.choose(rows, outputs, channels, kernel.device_of(torch.device("cuda")))
    found = {"chosen": chosen, "one after the other": dataclasses.replace(chosen, overlap=False)}
    if rows == 1:
        tried = [Blocks(*options, overlap=True) for options in VECTORS[channels]]
    else:
        tried = [Blocks(*options, count, True) for options in SPLIT for count in splits(outputs)]
    for blocks in tried:
        if blocks != chosen:
            found[", ".join(str(part) for part in dataclasses.astuple(blocks)[:-1])] = blocks
    return found


def products(model: Model) -> dict[str, tuple[int, int]]:
    """One of each shape."""
    seen: dict[tuple[int, int], str] = {}
    for name, shape in (*model.shapes.items(), ("logits", model.head)):
        seen.setdefault(shape, name)
    return {name: shape for shape, name in seen.items()}


def elapsed() -> float:
    return time.perf_counter() - BEGAN


def ours(blocks: Blocks | None = None) -> Product:
    return lambda x, weight, bias: kernel.linear(x, weight, bias, blocks=blocks)


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def in_turn(result: Result, works: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, list[float]]:
    """Microseconds of each replay of each graph, the graphs replayed in turn; the first two rounds left out."""
    graphs: dict[str, Callable[[], None]] = {}
    for name, work in works.items():
        with result.attempt(name):
            graphs[name] = recorded(work)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(rounds + 2):
        events = []
        for name, replay in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        if i >= 2:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return times


def summary(times: list[float], share: float, size: float) -> dict[str, float]:
    """Of one product of `share` in a graph: microseconds and the rate at which a weight of `size` bytes was read."""
    median = statistics.median(times) * share
    low, high = min(times) * share, max(times) * share
    return {"us": median, "us_low": low, "us_high": high, "TBps": size / median / 1e6}


def check(result: Result, model: Model, rows: int) -> None:
    """Relative errors against float64, those of cuBLAS and naive beside; three runs must agree to the last bit."""
    for name, (outputs, channels) in products(model).items():
        weight, bias = model.weights[name][0]
        x = torch.randn(rows, channels, device="cuda", dtype=model.dtype)
        exact = in_double(x, weight, bias)

        def error(out: Tensor, exact: Tensor = exact) -> float:
            return ((out.double() - exact).norm() / exact.norm()).item()

        worst, wrong = 0.0, []
        for kind, blocks in variants(rows, outputs, channels).items():
            with result.attempt(f"{model.name}, {rows} rows, {name}, {kind}"):
                runs = [kernel.linear(x, weight, bias, blocks=blocks) for _ in range(3)]
                apart = error(runs[0])
                worst = max(worst, apart, key=lambda e: (e != e, e))  # NaN is the worst
                if not apart < 1e-2 or not all(torch.equal(runs[0], run) for run in runs):
                    wrong.append(kind)
        row = {"ours": worst, "cuBLAS": error(functional.linear(x, weight, bias))}
        row["naive"] = error(naive.linear(x, weight, bias))
        about = {"model": model.name, "rows": rows, "product": name}
        result.add("error", {**about, **row, "wrong": ", ".join(wrong) or "none"})


def in_double(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def sweep(result: Result, model: Model, rows: int, seconds: float) -> None:
    """Each product in all its tiles."""
    for name, (outputs, channels) in products(model).items():
        if elapsed() > seconds:
            return
        size = outputs * channels * 2
        weights = model.weights[name][: int(BYTES // size) + 1]
        passes = max(1, round(1.2e9 / (size * len(weights))))
        x = torch.randn(rows, channels, device="cuda", dtype=model.dtype)

        def walk(
            product: Product, x: Tensor = x, weights: list[tuple[Tensor, Tensor | None]] = weights, passes: int = passes
        ) -> Callable[[], None]:
            def work() -> None:
                for _ in range(passes):
                    for weight, bias in weights:
                        product(x, weight, bias)

            return work

        works = {"cuBLAS": walk(functional.linear)}
        works |= {kind: walk(ours(blocks)) for kind, blocks in variants(rows, outputs, channels).items()}
        share = 1 / (passes * len(weights))
        found = {kind: summary(times, share, size) for kind, times in in_turn(result, works).items()}
        for kind, row in found.items():
            about = {"model": model.name, "rows": rows, "product": name, "shape": f"{outputs} x {channels}"}
            result.add("sweep", {**about, "tiles": kind, **row})
        shown = sorted(found, key=lambda kind: found[kind]["us"])
        shown = [kind for i, kind in enumerate(shown) if i < 4 or kind in ("cuBLAS", "chosen", "one after the other")]
        print(f"{model.name} {rows} {name}: " + "; ".join(
            f"{kind} {found[kind]['us']:.2f} us {found[kind]['TBps']:.2f} TB/s" for kind in shown
        ), flush=True)  # fmt: skip


def chain(model: Model, x: Tensor, product: Product, products_only: bool) -> Tensor:
    """All products of a forward; `products_only`: of inputs that are there, else each of what the one before made."""
    of = model.weights
    norm = functional.layer_norm if model.bias else functional.rms_norm
    hidden = x.shape[1]
    wide = x.new_ones(x.shape[0], model.shapes["up"][0])
    h = x
    for i in range(LAYERS):
        if products_only:
            for name, (_, channels) in model.shapes.items():
                product(x if channels == hidden else wide, *of[name][i])
            continue
        a = norm(h, (hidden,))
        if model.bias:
            made = product(a, *of["qkv"][i])[:, :hidden]
            o = product(made, *of["dense"][i])
            m = product(functional.gelu(product(norm(h, (hidden,)), *of["up"][i])), *of["down"][i])
            h = h + o + m
        else:
            q, _, _ = (product(a, *of[name][i]) for name in "qkv")
            h = h + product(q, *of["o"][i])
            a = norm(h, (hidden,))
            gate, up = (product(a, *of[name][i]) for name in ("gate", "up"))
            h = h + product(functional.silu(gate) * up, *of["down"][i])
    return product(h, *of["logits"][0])


def whole(result: Result, model: Model, rows: int) -> None:
    """All products of a step."""
    hidden = model.head[1]
    x = torch.randn(rows, hidden, device="cuda", dtype=model.dtype)
    size = 2 * (LAYERS * sum(n * k for n, k in model.shapes.values()) + model.head[0] * hidden)

    def alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        blocks = kernel.choose(x.shape[0], *weight.shape, kernel.device_of(x.device))
        return kernel.linear(x, weight, bias, blocks=dataclasses.replace(blocks, overlap=False))

    works = {
        f"{kind}: {name}": (lambda p=product, only=only: chain(model, x, p, only))
        for kind, only in (("products", True), ("chain", False))
        for name, product in (("cuBLAS", functional.linear), ("one after the other", alone), ("overlap", ours()))
    }
    for name, times in in_turn(result, works).items():
        about = {"model": model.name, "rows": rows, "GB": size / 1e9, "what": name}
        result.add("whole", {**about, **summary(times, 1.0, size)})


def rates(result: Result) -> None:
    """TB/s of a copy and of a sum, over random numbers."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    works = {"copy": lambda: target.copy_(source), "read": lambda: source.view(-1, 1 << 20).sum(1)}
    size = {"copy": 2 * source.nbytes, "read": source.nbytes}
    for name, times in in_turn(result, works).items():
        result.add("rates", {"what": name, **summary(times, 1.0, size[name])})


def compile_share(rows: list[int], names: list[str], which: int) -> None:
    """Run every WORKERSth of all tiles once, so that Triton's cache has them."""
    torch.set_grad_enabled(False)
    todo = [
        (model, m, shape, name != "logits", blocks)
        for model in MODELS
        if model.name in names
        for m in rows
        for name, shape in products(model).items()
        for blocks in variants(m, *shape).values()
    ]
    for model, m, (outputs, channels), biased, blocks in todo[which::WORKERS]:
        x = torch.zeros(m, channels, device="cuda", dtype=model.dtype)
        weight = torch.zeros(outputs, channels, device="cuda", dtype=model.dtype)
        bias = torch.zeros(outputs, device="cuda", dtype=model.dtype) if biased and model.bias else None
        try:
            kernel.linear(x, weight, bias, blocks=blocks)
        except Exception as error:
            print(f"  {blocks}: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], help="tiles are swept for the first two")
    parser.add_argument("--models", nargs="+", default=[m.name for m in MODELS], choices=[m.name for m in MODELS])
    parser.add_argument("--seconds", type=float, default=130, help="when to stop trying other tiles")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.compile is not None:
        compile_share(arguments.rows, arguments.models, arguments.compile)
        return
    torch.set_grad_enabled(False)
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--compile", str(i)]) for i in range(WORKERS)]
    for worker in workers:
        worker.wait()
    print(f"compiled after {elapsed():.0f} s", flush=True)
    result = Result(arguments.out, weights="random numbers")
    rates(result)
    for model in MODELS:
        if model.name not in arguments.models:
            continue
        model.fill()
        print(f"{model.name} filled after {elapsed():.0f} s", flush=True)
        for rows in arguments.rows:
            check(result, model, rows)
        for rows in arguments.rows:
            whole(result, model, rows)
        for rows in arguments.rows[:2]:
            sweep(result, model, rows, arguments.seconds)
        model.weights.clear()
        torch.cuda.empty_cache()
    print(f"{elapsed():.0f} s in all")
    result.finish("rates", "error", "whole")


if __name__ == "__main__":
    main()
