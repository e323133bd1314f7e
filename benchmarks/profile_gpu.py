"""Where the time goes: a prefill with and without compression, and a captured decoding step; kernels by name.

    python benchmarks/profile_gpu.py --model pythia-2.8b --dtype float16 --prompt 6144 --batch 1 --batch 8

Random weights of the true shape. `--inductor` names settings of torch's compiler to compare, `ours` being what is used.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import pyramidkv
from pyramidkv.decode import compiled, products
from pyramidkv.models.source import load_model
from result import Result, add_out

STEPS = 40
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": dict(compiled.INDUCTOR),
    "default": {},
    "ours with early launches": compiled.INDUCTOR | {"triton.enable_pdl": True},
    "ours, products by cuBLAS": dict(compiled.INDUCTOR),
    "max_autotune": {"max_autotune": True},
    "ours with max_autotune_gemm": compiled.INDUCTOR | {"max_autotune_gemm": True},
}


def device_ms(replay: Any, count: int = STEPS) -> float:
    """Median over five runs of the device time of one replay, launched back to back."""
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return statistics.median(times)


def kernels(replay: Any, count: int = 5) -> dict[str, dict[str, float]]:
    """Microseconds and launches a step of every kernel, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(count):
            replay()
        torch.cuda.synchronize()
    found = {
        e.key: {"us": e.device_time_total / count, "launches": e.count / count}
        for e in prof.key_averages()
        if e.device_time_total > 0
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def prefill(model: Any, configs: dict[str, pyramidkv.CompressionConfig], batch: int, prompt: int) -> list[dict]:
    """A prefill by each config in turn: milliseconds, and how many of them the host and the kernels take.

    Each is the second in a session of its own; the first row is the model by itself.
    `ms` ends when the device is done, `host_ms` when the last kernel is launched: where the two are close, the device
    waits for the host. `kernel_ms` adds up the kernels, so that `gap_ms` is the time in which none runs.
    """
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    layers = model.config.num_hidden_layers

    def once() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    rows: dict[str, dict[str, Any]] = {
        name: {"batch": batch, "prompt": prompt, "config": name, "ms": [], "host_ms": []}
        for name in ("full cache", *configs)
    }
    for round_number in range(8):
        for name, row in rows.items():
            config = configs.get(name)
            with contextlib.nullcontext() if config is None else pyramidkv.compress(model, config):
                once()
                torch.cuda.synchronize()
                start = time.perf_counter()
                once()
                launched = time.perf_counter()
                torch.cuda.synchronize()
                if round_number:
                    row["ms"].append(1e3 * (time.perf_counter() - start))
                    row["host_ms"].append(1e3 * (launched - start))
                if round_number == 7:
                    row["kernels"] = kernels(once, 2)
    for row in rows.values():
        row["all_ms"], row["all_host_ms"] = row["ms"], row["host_ms"]
        row |= {name: statistics.median(row[name]) for name in ("ms", "host_ms")}
        row["kernel_ms"] = sum(kernel["us"] for kernel in row["kernels"].values()) / 1e3
        row["gap_ms"] = row["ms"] - row["kernel_ms"]
        row["launches_a_layer"] = sum(kernel["launches"] for kernel in row["kernels"].values()) / layers
    return list(rows.values())


def show(found: dict[str, dict[str, float]], count: int = 14) -> None:
    for name, kernel in list(found.items())[:count]:
        print(f"    {kernel['us']:8.1f} us {kernel['launches']:6.1f} x {name[:110]}", flush=True)


def measure(model: Any, config: pyramidkv.CompressionConfig, batch: int, prompt: int) -> dict[str, Any]:
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    row: dict[str, Any] = {"config": f"{config.method} {config.describe()}", "batch": batch, "prompt": prompt}
    start = time.perf_counter()
    with pyramidkv.compress(model, config) as session, torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        for _ in range(3):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
        row["seconds_to_first_replay"] = time.perf_counter() - start
        at = session._graph._captured
        lengths = at.lengths.clone()

        def replay() -> None:
            at.replay()
            at.lengths.copy_(lengths)

        row["replay_ms"] = device_ms(replay)
        times = []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(token, past_key_values=cache)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        row["forward_ms"] = 1e3 * statistics.median(times)
        row["kernels"] = kernels(replay)
        row["kernel_ms"] = sum(k["us"] for k in row["kernels"].values()) / 1e3
        row["kv_GB"] = session.report().kv_bytes / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-2.8b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt", type=int, default=6144)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--inductor", action="append", choices=SETTINGS)
    parser.add_argument("--only", choices=["prefill", "decode"])
    add_out(parser)
    arguments = parser.parse_args()
    model = load_model(f"random:{arguments.model}", device="cuda", dtype=arguments.dtype).model
    result = Result(arguments.out, model=f"{arguments.model}, random weights, {arguments.dtype}")
    configs = {
        f"{method} keep=0.25": pyramidkv.CompressionConfig(method=method, keep=0.25)
        for method in ("pyramidkv", "echo", "rms")
    }
    configs = {"full cache in a session": pyramidkv.CompressionConfig(method="full"), **configs}
    configs["echo heads=adaptive keep=0.25"] = pyramidkv.CompressionConfig(method="echo", heads="adaptive", keep=0.25)
    configs["auto share=0.25"] = pyramidkv.CompressionConfig(method="auto", share=0.25)
    batches = arguments.batch or [1]
    for batch in batches if arguments.only != "decode" else []:
        with result.attempt(f"prefill, batch {batch}"):
            rows = prefill(model, configs, batch, arguments.prompt)
            base = rows[0]["kernels"]
            for row in rows:
                result.add("prefill", row)
                own = {k: v for k, v in row["kernels"].items() if k not in base}
                if own:
                    print(f"  only in {row['config']}: {sum(v['us'] for v in own.values()):.0f} us", flush=True)
                    show(own, 24)
    settings = [None, *(arguments.inductor or ["ours"])]
    serves = products.why_torch
    for batch in batches if arguments.only != "prefill" else []:
        for setting in settings:
            cublas = setting is not None and "cuBLAS" in setting
            products.why_torch = (lambda *_: "cuBLAS is asked for") if cublas else serves
            if setting is not None:
                compiled.INDUCTOR.clear()
                compiled.INDUCTOR.update(SETTINGS[setting])
                if hasattr(model, compiled._ATTRIBUTE):
                    delattr(model, compiled._ATTRIBUTE)
                torch._dynamo.reset()
            config = pyramidkv.CompressionConfig(keep=0.25, room=200, decode="graph" if setting is None else "compiled")
            with result.attempt(f"decode, batch {batch}, {setting}"):
                row = {"inductor": setting, **measure(model, config, batch, arguments.prompt)}
                result.add("decode", row)
                show(row["kernels"])
    result.finish("prefill", "decode")


if __name__ == "__main__":
    main()
