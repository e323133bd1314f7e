"""Tokens a second at the largest batch that fits a GPU: the full cache (StaticCache, compiled) and a compressed one.

    python benchmarks/largest_batch_gpu.py --model pythia-2.8b --dtype float16 --prompt 6144

Random weights of the true shape, plain `generate()`. For each engine the batch goes down from a guess by the plan's
bytes until it fits; prompts are read in chunks where `--chunk` says so, on every engine, since the activations of a
whole prefill would take the place of many rows.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

import pyramidkv
from pyramidkv.decode import compiled
from pyramidkv.models.source import load_model


class Clock(StoppingCriteria):
    """The time after each token."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: Any, config: Any, batch: int, prompt: int, new_tokens: int, chunk: int | None) -> dict[str, Any]:
    """One timed generation after a short one that compiles and captures."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device="cuda")
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    if chunk is not None:
        options["prefill_chunk_size"] = chunk
    if config is None:
        options["cache_implementation"] = "static"
    with contextlib.nullcontext() if config is None else pyramidkv.compress(model, config):
        for tokens in (4, new_tokens):
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            clock = Clock()
            start = time.perf_counter()
            model.generate(
                ids,
                max_new_tokens=tokens if config is not None else new_tokens,  # one length of its static cache
                min_new_tokens=tokens if config is not None else new_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            )
    tpot = (clock.ticks[-1] - clock.ticks[0]) / (len(clock.ticks) - 1)
    return {
        "batch": batch, "tokens_per_second": batch / tpot, "tpot_ms": 1e3 * tpot,
        "ttft_s": clock.ticks[0] - start, "max_memory_GB": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-2.8b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt", type=int, default=6144)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--full", type=int, nargs="*", default=[], help="batches of the full cache, largest first")
    parser.add_argument("--compressed", type=int, nargs="*", default=[], help="and of the compressed one")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "largest-batch.json")
    arguments = parser.parse_args()
    model = load_model(f"random:{arguments.model}", device="cuda", dtype=arguments.dtype).model
    config_25 = pyramidkv.CompressionConfig(keep=0.25, room=arguments.new_tokens, decode="compiled")
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "model": f"{arguments.model}, random weights, {arguments.dtype}",
        "prompt": arguments.prompt,
        "prefill_chunk_size": arguments.chunk,
        "runs": [],
    }
    for name, config, batches in (
        ("pyramidkv, keep=0.25 decode=compiled", config_25, arguments.compressed),
        ("transformers StaticCache, compiled", None, arguments.full),
    ):
        for batch in batches:
            try:
                row = generate(model, config, batch, arguments.prompt, arguments.new_tokens, arguments.chunk)
            except torch.OutOfMemoryError:
                row = {"batch": batch, "out_of_memory": True}
            report["runs"].append({"engine": name, **row})
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
            print(name, {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            torch._dynamo.reset()
            if hasattr(model, compiled._ATTRIBUTE):
                delattr(model, compiled._ATTRIBUTE)
            gc.collect()
            torch.cuda.empty_cache()
            if "tokens_per_second" in row:
                break


if __name__ == "__main__":
    main()
