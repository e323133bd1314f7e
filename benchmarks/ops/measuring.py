"""Times of one op, and how far its results are from what they should be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyramidkv.evaluate.speed import read_bandwidth

BEGAN = time.perf_counter()
L2 = 50e6  # bytes
GRAPH_MS = 2.0  # how long a graph should run, so that its start does not count
ENOUGH = 1e-2  # relative error of what is right in half precision

Work = Callable[[Any], object]  # on one set of inputs


def elapsed() -> float:
    """Seconds since the script began."""
    return time.perf_counter() - BEGAN


def say(what: str) -> None:
    """Print, with the seconds so far."""
    print(f"{what} after {elapsed():.0f} s", flush=True)


def copies(size: int, times: int, least: int, most: int) -> int:
    """How many sets of inputs of `size` bytes pass the L2 cache so many times."""
    return max(least, min(most, int(times * L2 // size) + 1))


def microseconds(work: Work, sets: Sequence[Any]) -> float:
    """Median device time of `work` on one of the sets, which are taken in turn in a CUDA graph; NaN if that fails.

    Without a GPU, in Triton's interpreter: the time of the first set, which says nothing but that it ran.
    """
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        work(sets[0])
        return (time.perf_counter() - begin) * 1e6

    def once() -> None:
        for inputs in sets:
            work(inputs)

    try:
        once()
        torch.cuda.synchronize()
        rounds = max(1, min(round(64 / len(sets)), round(GRAPH_MS / max(_milliseconds(once), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                once()
        times = [_milliseconds(graph.replay) for _ in range(2 + 7)][2:]
        return statistics.median(times) * 1e3 / (rounds * len(sets))
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  failed: {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)
        return float("nan")


def uncaptured(work: Work, inputs: Any) -> float:
    """Microseconds of what waits for the device, which no graph can hold."""
    if not torch.cuda.is_available():
        return microseconds(work, [inputs])
    work(inputs)
    return _milliseconds(lambda: [work(inputs) for _ in range(3)]) * 1e3 / 3


def _milliseconds(work: Callable[[], object]) -> float:
    """From begin to end on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def sweep(works: Mapping[str, Work], sets: Sequence[Any], seconds: float) -> dict[str, float]:
    """Microseconds of each, the first ones first, until so many seconds are over."""
    found = {}
    for name, work in works.items():
        if elapsed() < seconds:
            found[name] = microseconds(work, sets)
    return found


def ceilings() -> dict[str, float]:
    """What the device can do: the rates of a copy, of reading, and of a product."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(target.copy_, [source])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds(a.matmul, [b])
    read = read_bandwidth(source.device) / 1e12  # the floor of kernels that write next to nothing
    return {"copy_TBps": 2 * source.nbytes / copy / 1e6, "read_TBps": read, "bf16_TFLOPs": 2 * 8192**3 / product / 1e6}


def error(out: Tensor, reference: Tensor) -> float:
    """Relative."""
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def note(found: dict[str, float], name: str, off: float) -> None:
    """Keep the worst error by this name; NaN is the worst."""
    found[name] = max(found.get(name, 0.0), off, key=lambda e: (e != e, e))


def show(found: Mapping[str, float | bool]) -> None:
    """Print what checks have found: relative errors, or whether all was equal."""
    for name, value in found.items():
        if isinstance(value, bool):
            print(f"check {name}: {'equal' if value else 'WRONG'}", flush=True)
        else:
            print(f"check {name}: {value:.2e} {'ok' if value < ENOUGH else 'WRONG'}", flush=True)
