"""Many requests of different lengths on one GPU, at equal KV memory: tokens/s of the full cache and of compressed ones.

    python benchmarks/serving_gpu.py --model random:pythia-2.8b --dtype float16 --out serving.json

What `pyramidkv bench --metric serving` measures (rows padded to the longest of a batch, ends of their own, the largest
batch whose cache fits `--memory`), engine by engine: each is written as soon as it is measured, one that fails leaves
the others, and none is begun after `--seconds`. `--compiled` adds those that take a minute to compile.
"""

from __future__ import annotations

import argparse
import time

import torch

from pyramidkv import CompressionConfig
from pyramidkv.config import parse_bytes
from pyramidkv.evaluate import serving
from pyramidkv.evaluate.speed import Engine
from pyramidkv.models.source import load_model
from result import Result, add_out


def engines(compiled: bool, decode: str) -> list[Engine]:
    """The full cache first."""
    configs = [
        CompressionConfig(method="full", decode=decode),
        CompressionConfig(method="pyramidkv", share=0.25, decode=decode),
        CompressionConfig(method="auto", share=0.25, decode=decode),
        CompressionConfig(method="auto", share=0.125, decode=decode),
    ]
    if compiled:
        configs += [
            CompressionConfig(method="full", decode="compiled"),
            CompressionConfig(method="pyramidkv", share=0.25, decode="compiled"),
        ]
    chosen = [Engine(f"{config.method} {config.describe()}", config) for config in configs]
    chosen.append(Engine("transformers DynamicCache, cuDNN off", cudnn=False))
    if compiled:
        chosen.append(Engine("transformers StaticCache, compiled", cache_implementation="static"))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:pythia-2.8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument(
        "--prompt", type=int, default=4096, help="tokens of the longest prompt; the shortest: a quarter"
    )
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--memory", default="20GB", help="KV bytes of a batch")
    parser.add_argument("--repeats", type=int, default=1, help="timed rounds, after an untimed one")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--seconds", type=float, default=200)
    add_out(parser)
    arguments = parser.parse_args()
    begin = time.monotonic()
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    requests = serving.make_requests(
        arguments.requests, prompt=arguments.prompt, new_tokens=arguments.new_tokens,
        vocabulary=loaded.model.config.vocab_size,
    )  # fmt: skip
    memory = parse_bytes("memory", arguments.memory)
    result = Result(
        arguments.out, arguments.device, model=f"{loaded.name}, {arguments.dtype}", requests=arguments.requests,
        longest_prompt=arguments.prompt, most_new_tokens=arguments.new_tokens, kv_memory_bytes=memory,
    )  # fmt: skip
    for engine in engines(arguments.compiled, "graph" if loaded.model.device.type == "cuda" else "eager"):
        if time.monotonic() - begin > arguments.seconds:
            result.add("not measured", {"engine": engine.name, "why": f"{arguments.seconds:.0f} s were over"})
            continue
        with result.attempt(engine.name):
            *_, (record,) = serving.measure(
                loaded.model, loaded.name, [engine], requests, memory=memory, repeats=arguments.repeats,
                weights_random=loaded.weights_random,
            )  # fmt: skip
            seconds = record.total_seconds
            row = {
                "engine": engine.name,
                "batch": record.batch,
                "tokens_per_s": round(record.generated_tokens / seconds.median, 1),
                "seconds": {"median": seconds.median, "all": list(seconds.samples)},
                "mean_ttft_s": round(record.mean_ttft_seconds.median, 3),
                "kv_gb": round(record.compression.kv_bytes / 1e9, 3),
                "peak_gb": round((record.max_memory_bytes or 0) / 1e9, 3),
            }
            result.add("serving", row)
            print(f"[{time.monotonic() - begin:6.1f} s] {row}", flush=True)
        torch.compiler.reset()
    result.finish("serving", "not measured")


if __name__ == "__main__":
    main()
