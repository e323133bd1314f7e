"""Are the Triton kernels right at real sizes, and how fast are they? One run on one GPU, about two minutes.

    python benchmarks/kernels_gpu.py --out kernels.json [--seconds 140] [--only PART]

Times are those of launches inside a CUDA graph, a layer's worth each, over input sets that together pass the L2 cache.
Order: correctness, the chosen tiles beside torch, then the other tiles until the seconds are over. What is measured of
each op is in `ops/`.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from types import ModuleType

import torch

from ops import decode, echo, eviction, packed, packing, prefill, scores, unpacking
from ops.measuring import ceilings, elapsed, say, show
from ops.shapes import LLAMA, MODELS, PYTHIA
from result import Result, add_out


def measure_attention(report: dict) -> None:
    """Decode attention, window scores, and attention of a prefill beside them."""
    report["relative_error"] = scores.check() | decode.check()
    show(report["relative_error"])
    say("checked")
    report["decode"] = [decode.row(model, *size, report["read_TBps"]) for model in MODELS for size in decode.SIZES]
    say("decode")
    report["scores"] = [
        scores.row(model, keys, window) for model in MODELS for keys in scores.LENGTHS for window in scores.WINDOWS
    ]
    report["prefill"] = [prefill.row(model, keys) for model in MODELS for keys in scores.LENGTHS]
    say("scores")


def measure(kind: str, op: ModuleType, checked: str, rate: str, report: dict) -> None:
    """An op's checks, to be called `checked`, and its times; floors at the `rate` of copying or reading."""
    found = report[checked] = op.check()
    show(found if isinstance(found, dict) else {kind: found})
    say(f"{kind} checked")
    report[kind] = [op.row(*case, report[rate]) for case in op.CASES]
    say(kind)


PARTS = {
    "eviction": partial(measure, "eviction", eviction, "equal", "copy_TBps"),
    "echo": partial(measure, "echo", echo, "echo_error", "copy_TBps"),
    "attention": measure_attention,
    "packing": partial(measure, "packing", packing, "packing_equal", "copy_TBps"),
    "unpacking": partial(measure, "unpacking", unpacking, "unpacking_equal", "copy_TBps"),
    "packed": partial(measure, "packed", packed, "packed_error", "read_TBps"),
}
SWEEPS = {  # of which part, and what tries the tiles
    "decode": ("attention", decode.sweep), "scores": ("attention", scores.sweep),
    "select": ("eviction", eviction.select_sweep), "limits": ("eviction", eviction.limits_sweep),
    "compact": ("eviction", eviction.compact_sweep), "packed": ("packed", packed.sweep), "echo": ("echo", echo.sweep),
}  # fmt: skip
SWEPT = (  # until the seconds are over
    *(("echo", *case) for case in echo.CASES[:2]),
    ("limits", PYTHIA, 1, 6144, 1536), ("limits", LLAMA, 1, 32768, 8192),
    ("select", PYTHIA, 1, 6144, 1536), ("compact", PYTHIA, 1, 6144, 1536),
    ("select", PYTHIA, 8, 6144, 1536), ("select", LLAMA, 1, 32768, 8192), ("compact", LLAMA, 1, 32768, 8192),
    ("decode", PYTHIA, 1, 1690), ("scores", PYTHIA, 6144, 1024),
    ("decode", PYTHIA, 8, 1690), ("decode", LLAMA, 1, 1690), ("scores", LLAMA, 6144, 1024),
    ("scores", PYTHIA, 6144, 32), ("decode", LLAMA, 8, 6272), ("decode", PYTHIA, 8, 6272),
    ("decode", PYTHIA, 1, 6272), ("scores", LLAMA, 6144, 32),
    *(("packed", *case) for case in packed.SWEPT),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            with result.attempt(name):
                part(report)
            result.write()
    report["sweeps"] = {}
    for kind, model, *size in SWEPT:
        of, sweep = SWEEPS[kind]
        if arguments.only in (None, of):
            name = f"{kind} {model.name} {size}"
            with result.attempt(f"sweep {name}"):
                report["sweeps"][name] = sweep(model, *size, arguments.seconds)
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
