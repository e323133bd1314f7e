"""Long prompts in chunks and long outputs with a bound, on one GPU: memory, TTFT and TPOT. Random weights.

    python benchmarks/long_gpu.py --model random:pythia-2.8b --dtype float16 --prompt 32768 131072 --out long.json

`prompts`: for each length the full cache at once (`DynamicCache` with and without cuDNN attention, and ours with its
decoding captured) beside `session.prefill`, in chunks of several sizes, and plain `generate()` over what it left: TTFT,
TPOT and peak memory, weights included. A session is warmed up by one whole prompt, as a server's is; at the longest
length only the compressed ones are. `against`: the same as shares of the best full cache's TTFT.

    python benchmarks/long_gpu.py --only slack

measures no more than TPOT without slack and with 128 and 256. `outputs`: TPOT after a prompt twice the budget long,
with and without `slack`, in turn. What evictions cost is taken within a run: the time of the tokens at which layers
evicted, and of the next, above the median token's.

Every part is written as soon as it is measured, and one that fails leaves the others; nothing is begun after
`--seconds`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

import pyramidkv
from pyramidkv import CompressionConfig
from pyramidkv.evaluate import speed
from pyramidkv.models.source import load_model
from result import Result, add_out

SETTLED = 6  # tokens after which a graph is captured and replayed


@dataclass(frozen=True)
class Way:
    """One way to read a prompt and go on from it."""

    name: str
    options: dict[str, Any] | None = None  # of the compression; None: the cache of `transformers`
    chunk: int | None = None  # None: at once
    cudnn: bool = False


@dataclass
class Clock:
    """The time of each token, and at which of them layers evicted; a stopping criterion that never stops anything."""

    session: Any = None
    ticks: list[float] = field(default_factory=list)
    evicted: list[bool] = field(default_factory=list)
    before: int = 0

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        speed.wait_for_tokens(input_ids.device)
        self.ticks.append(time.perf_counter())
        if self.session is not None:
            settled = sum(layer.settled for layer in self.session.cache.layers)
            self.evicted.append(settled != self.before)
            self.before = settled
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def steps(self) -> list[float]:
        """Seconds of each token after the first."""
        return [b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)]


def ways(tokens: int, longest: bool) -> list[Way]:
    """What is measured at a length; of the longest, fewer. The full cache comes first."""
    eighth = {"share": 0.125}
    full = [Way("transformers, full cache, cuDNN attention", cudnn=True)]
    if longest:
        fixed = {"method": "pyramidkv", "budget": tokens // 64}
        return [
            *full,
            *(Way("pyramidkv", options, 4096) for options in (fixed, {"method": "pyramidkv", **eighth})),
            *(Way("auto", {"method": "auto", **eighth}, chunk) for chunk in (4096, 8192)),
        ]
    fixed = {"method": "pyramidkv", "budget": tokens // 16}
    quarter = {"share": 0.25}
    return [
        *full,
        Way("transformers, full cache, cuDNN off"),
        Way("ours, full cache", {"method": "full"}),
        *(Way("pyramidkv", fixed, chunk) for chunk in (2048, 4096, 6144, 8192)),
        Way("rms", fixed | {"method": "rms"}, 4096),
        *(Way("pyramidkv", {"method": "pyramidkv", **quarter}, chunk) for chunk in (4096, 8192)),
        *(Way("auto", {"method": "auto", **quarter}, chunk) for chunk in (2048, 4096, 8192)),
        Way("auto", {"method": "auto", **eighth}, 4096),
    ]


def read(model: Any, way: Way, tokens: int, new: int, *, warm: bool, repeats: int) -> dict[str, Any]:
    """TTFT, TPOT and peak memory of one way."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new,
                               "do_sample": False, "pad_token_id": 0}  # fmt: skip
    config = None if way.options is None else CompressionConfig(**way.options, room=new)
    firsts: list[float] = []
    steps: list[float] = []
    row: dict[str, Any] = {"tokens": tokens, "engine": way.name, "setting": "" if config is None else config.describe(),
                           "chunk": way.chunk}  # fmt: skip
    with (
        torch.no_grad(),
        speed.cudnn_attention(way.cudnn or config is not None),
        contextlib.nullcontext() if config is None else pyramidkv.compress(model, config) as session,
    ):
        for run in range(repeats + warm):
            clock = Clock()
            if run == 0:
                speed.free_unused(model.device)
            speed.reset_peak(model.device)
            speed.synchronize(model.device)
            start = time.perf_counter()
            cache = None if way.chunk is None or session is None else session.prefill(ids, chunk=way.chunk)
            model.generate(ids, past_key_values=cache, stopping_criteria=StoppingCriteriaList([clock]), **options)
            del cache
            if run < warm:  # with what the first prompt of a session waits for: kernels compiled, attention planned
                row["untimed_ttft_ms"] = round(1e3 * (clock.ticks[0] - start), 1)
            else:
                firsts.append(clock.ticks[0] - start)
                steps += clock.steps()[min(SETTLED, new // 2) :]
        peak = peak_gb(model.device)
        if session is not None:
            usage = session.report()
            row |= {"held_most": max(layer.kept_tokens for layer in usage.layers), "kv_gb": usage.kv_bytes / 1e9}
    return row | {
        "ttft_ms": spread(firsts),
        "tpot_ms": spread(steps),
        "peak_gb": peak,
    }


def against(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every compressed row beside the full cache with the least TTFT at its length."""
    found = []
    for row in rows:
        full = [r for r in rows if r["tokens"] == row["tokens"] and "full cache" in r["engine"]]
        if not full or "full cache" in row["engine"]:
            continue
        best = min(full, key=lambda r: float(r["ttft_ms"]["median"]))
        names = {name: row[name] for name in ("tokens", "engine", "setting", "chunk", "peak_gb")}
        ratio = row["ttft_ms"]["median"] / best["ttft_ms"]["median"]
        found.append(names | {"ttft_of_full": round(ratio, 3), "full_peak_gb": best["peak_gb"]})
    return found


def write(model: Any, options: dict[str, Any], slack: int | None, *, prompt: int, new: int) -> dict[str, Any]:
    """TPOT of `new` tokens with a bound, or without, and what evictions took of it."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=model.device)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    room = {"room": new + 1} if slack is None else {"slack": slack, "room": slack}  # no buffer grows meanwhile
    config = CompressionConfig(**options, **room)
    with torch.no_grad(), pyramidkv.compress(model, config) as session:
        warm = 8 if slack is None else 2 * slack + 8  # and two evictions: one compiles, the next is captured
        clock = Clock()
        speed.reset_peak(model.device)
        for tokens in (warm, new):
            clock = Clock(session)
            model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens,
                stopping_criteria=StoppingCriteriaList([clock]), **arguments,
            )  # fmt: skip
        held = max(layer.kept_tokens for layer in session.report().layers)
        peak, graph = peak_gb(model.device), session._graph
        evictions = None if graph is None else graph.evictions
    steps, evicted = clock.steps()[SETTLED:], clock.evicted[1 + SETTLED :]
    touched = [e or before for e, before in zip(evicted, [False, *evicted], strict=False)]
    usual = statistics.median([s for s, t in zip(steps, touched, strict=True) if not t])
    excess = sum(s - usual for s, t in zip(steps, touched, strict=True) if t)
    return {
        "setting": config.describe(),
        "method": config.method,
        "slack": slack,
        "new": new,
        "evictions": sum(evicted),
        "captured": None if evictions is None else evictions.captures,  # of a layer, warm-up included
        "launched": None if evictions is None else evictions.launched,
        "tpot_usual_ms": round(1e3 * usual, 4),
        "tpot_mean_ms": round(1e3 * statistics.mean(steps), 4),
        "eviction_ms": round(1e3 * excess / max(sum(evicted), 1), 3),
        "evictions_percent": round(100 * excess / (usual * len(steps)), 3),
        "held_most": held,
        "peak_gb": peak,
    }


def peak_gb(device: torch.device) -> float | None:
    """Most memory since the last reset, in GB; None where it can't be told."""
    peak = speed.peak_bytes(device)
    return None if peak is None else round(peak / 1e9, 3)


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and all of them, in milliseconds."""
    return {"median": 1e3 * statistics.median(seconds), "all": [round(1e3 * s, 3) for s in seconds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:pythia-2.8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--prompt", type=int, nargs="*", default=[32768, 131072], help="none: outputs alone")
    parser.add_argument("--new", type=int, default=16, help="tokens after each prompt")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--budget", type=int, default=2048, help="of outputs")
    parser.add_argument("--output", type=int, default=768, help="tokens of outputs; 0: leave that part out")
    parser.add_argument("--seconds", type=float, default=220, help="begin nothing after that many seconds")
    parser.add_argument("--engines", nargs="*", metavar="NAME", help="'full' or methods; default: all")
    parser.add_argument("--only", choices=["slack"], help="no prompts, and of outputs fewer")
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.only:
        arguments.prompt = []
    begin = time.monotonic()
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    gc.collect()
    gc.freeze()  # what is there already is not gone through again in the middle of a prompt
    result = Result(
        arguments.out, arguments.device, model=f"{loaded.name}, {arguments.dtype}",
        unit="milliseconds and GB (1e9 bytes), weights included; medians, after one untimed run",
    )  # fmt: skip

    def attempt(part: str, what: str, work: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - begin > arguments.seconds:
            result.add("not measured", {"part": part, "what": what, "why": f"{arguments.seconds:.0f} s were over"})
            return
        with result.attempt(f"{part}: {what}"):
            start = time.monotonic()
            row = work()
            result.add(part, row)
            print(f"[{time.monotonic() - begin:6.1f} s, {time.monotonic() - start:.1f}] {what}: {row}", flush=True)

    def outputs() -> None:
        for method in ("pyramidkv", "rms", "auto"):
            if arguments.engines and method not in arguments.engines:
                continue
            slacks = (None, 128, 256) if arguments.only else (None, 128, 512, None, 128)
            for slack in slacks:
                options = {"method": method, "budget": arguments.budget}
                attempt(
                    "outputs", f"{method}, slack={slack}",
                    lambda o=options, s=slack: write(
                        loaded.model, o, s, prompt=2 * arguments.budget, new=arguments.output
                    ),
                )  # fmt: skip

    for index, tokens in enumerate(arguments.prompt):
        longest = index > 0 and tokens == max(arguments.prompt)
        if longest and arguments.output:
            outputs()  # before what takes longest
        for way in ways(tokens, longest):
            named = "full" if "full cache" in way.name else way.name
            if arguments.engines and named not in arguments.engines:
                continue
            alone = longest and way.options is None
            attempt(
                "prompts", f"{way.name}, {way.options or ''}, {tokens} tokens, chunk {way.chunk}",
                lambda w=way, t=tokens, a=alone, once=longest: read(
                    loaded.model, w, t, arguments.new, warm=not a, repeats=1 if once else arguments.repeats
                ),
            )  # fmt: skip
        result.data["against"] = against(result.data.get("prompts", []))
    if len(arguments.prompt) < 2 and arguments.output:
        outputs()
    result.finish("prompts", "against", "outputs", "not measured")


if __name__ == "__main__":
    main()
