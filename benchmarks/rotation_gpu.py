"""The rotation of queries and keys in one launch, beside the models' own steps; both checked to be equal.

    python benchmarks/rotation_gpu.py

Device time of one layer in a CUDA graph, microseconds: median of 15 replays over three sets of inputs in turn. The
floor is reading and writing every number once at the rate at which this device copies.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from pyramidkv.ops.rotate import triton
from result import Result, add_out

# their file, query heads, KV heads, head size, rotated channels, dtype
MODELS: dict[str, tuple[Any, int, int, int, int, torch.dtype]] = {
    "pythia-2.8b": (modeling_gpt_neox, 32, 32, 80, 20, torch.float16),
    "llama-3.1-8b": (modeling_llama, 32, 8, 128, 128, torch.bfloat16),
}
TOKENS = (4096, 6144)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Median device time of a call, all captured in a graph: between events a launch would count as well."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(3 + 15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def inputs(model: str, tokens: int) -> tuple[torch.Tensor, ...]:
    """Queries and keys as views of one projection, cosines and sines."""
    _, heads, kv_heads, size, rotated, dtype = MODELS[model]
    fused = torch.randn(1, tokens, heads + kv_heads, size, device="cuda", dtype=dtype).transpose(1, 2)
    angle = torch.randn(1, tokens, rotated // 2, device="cuda").repeat(1, 1, 2)
    return fused[:, :heads], fused[:, heads:], angle.cos().to(dtype), angle.sin().to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    arguments = parser.parse_args()
    result = Result(arguments.out, unit="microseconds")
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / microseconds([lambda: target.copy_(source)])
    for (model, (theirs, *_)), tokens in itertools.product(MODELS.items(), TOKENS):
        with result.attempt(f"{model}, {tokens} tokens"):
            sets = [inputs(model, tokens) for _ in range(3)]
            pairs = zip(triton.rotate(*sets[0]), theirs.apply_rotary_pos_emb(*sets[0]), strict=True)
            row = {"model": model, "tokens": tokens, "equal": all(torch.equal(*pair) for pair in pairs)}
            row["floor"] = 2 * sum(t.numel() * t.element_size() for t in sets[0][:2]) / rate
            row["steps of the model"] = microseconds([lambda s=s, f=theirs: f.apply_rotary_pos_emb(*s) for s in sets])
            row["kernel"] = microseconds([lambda s=s: triton.rotate(*s) for s in sets])
            for rows, warps in itertools.product((8, 16, 32, 64), (2, 4, 8)):
                blocks = triton.Blocks(rows, warps)
                row[f"{rows} x {warps}"] = microseconds([lambda s=s, b=blocks: triton.rotate(*s, b) for s in sets])
            result.add("rotation", row)
    result.finish("rotation")


if __name__ == "__main__":
    main()
