"""Long prompts in chunks and long outputs with a bound, on one GPU: memory, TTFT and TPOT. Random weights.

    python benchmarks/long_gpu.py --model pythia-2.8b --dtype float16 --seconds 240

Prompts: the full cache (`DynamicCache`, SDPA, at once, if it fits) beside `session.prefill` with a fixed budget: TTFT
and peak memory, weights included, for each length. Outputs: TPOT with and without `slack` over the
same budget, alternating; the difference is what evictions cost. Nothing is begun after
`--seconds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pyramidkv
from pyramidkv.models.source import load_model
from result import Result, add_out

PROMPTS = (8192, 32768, 131072)
OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds and peak bytes of one call."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return {
        "seconds": round(time.perf_counter() - start, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
    }


def prompts(model: Any, chunk: int, setting: dict[str, Any], within: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """TTFT and peak of each prompt length, the full cache first."""
    for tokens in PROMPTS:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
        mask = torch.ones_like(ids)

        def full(ids: Tensor = ids, mask: Tensor = mask) -> None:
            model.generate(ids, attention_mask=mask, max_new_tokens=1, **OPTIONS)

        def chunked(ids: Tensor = ids, mask: Tensor = mask) -> None:
            with pyramidkv.compress(model, **setting) as session:
                cache = session.prefill(ids, chunk=chunk)
                model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, **OPTIONS)

        for name, work in (("full", full), ("chunked", chunked)):
            for run in range(2):  # the first pays for what is compiled
                if not within():
                    return
                try:
                    found: dict[str, Any] = timed(work)
                except torch.cuda.OutOfMemoryError:
                    found = {"error": "out of memory"}
                yield {"what": "prompt", "engine": name, "tokens": tokens, "chunk": chunk, "run": run} | found


def outputs(model: Any, new: int, setting: dict[str, Any], within: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Seconds for `new` tokens after a prompt twice as long as the budget, with and without `slack`."""
    budget = setting["budget"]
    ids = torch.randint(0, model.config.vocab_size, (1, 2 * budget), device=model.device)
    mask = torch.ones_like(ids)
    for run in range(3):
        # As many slots in the one as the other has on average: evictions, not longer attention, are compared.
        for slack in (None, 128, 512):
            if not within():
                return
            # `room` for all: no buffer grows while the clock runs.
            more = {"slack": slack, "room": 512} if slack else {"room": new + 1}
            with pyramidkv.compress(model, **setting | more) as session:
                model.generate(ids, attention_mask=mask, max_new_tokens=4, **OPTIONS)
                found = timed(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new, **OPTIONS))
                held = max(layer.kept_tokens for layer in session.report().layers)
            found["ms_a_token"] = round(1000 * found["seconds"] / new, 4)
            yield {"what": "output", "new": new, "slack": slack, "run": run, "held_most": held} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-2.8b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--method", default="rms")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--new", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=240)
    add_out(parser)
    arguments = parser.parse_args()
    begin = time.monotonic()
    loaded = load_model(f"random:{arguments.model}", device="cuda", dtype=arguments.dtype)
    setting = {"method": arguments.method, "budget": arguments.budget}

    def within() -> bool:
        return time.monotonic() - begin < arguments.seconds

    result = Result(arguments.out, model=f"{loaded.name}, random weights, {arguments.dtype}", **setting)
    for part, records in (
        ("prompts", prompts(loaded.model, arguments.chunk, setting, within)),
        ("outputs", outputs(loaded.model, arguments.new, setting, within)),
    ):
        with result.attempt(part):
            for record in records:
                result.add(part, record)
                print(record, flush=True)
    result.finish("prompts", "outputs")


if __name__ == "__main__":
    main()
