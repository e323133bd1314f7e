"""Time and memory of plain `generate()`: TTFT, TPOT, KV bytes, peak memory; engines alternate within one run.

Every engine generates the same number of tokens from the same random prompt. The clock is a stopping criterion, which
`generate()` calls after each token; it is read when the token is there for the host to read. On a GPU an untimed prompt
of the same length goes before: what is timed is a model in use, as a server's, whose memory is allocated, whose kernels
are loaded and whose graph is captured.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pyramidkv.config import CompressionConfig
from pyramidkv.errors import PyramidKVError
from pyramidkv.evaluate.perplexity import setting
from pyramidkv.evaluate.schema import Compression, Speed, Spread
from pyramidkv.plan import Plan
from pyramidkv.session import compress
from pyramidkv.shape import cache_shape


@dataclass(frozen=True)
class Engine:
    """One way to generate: the full cache of `transformers` (`config` None), or a compressed one."""

    name: str
    config: CompressionConfig | None = None
    cache_implementation: str | None = None  # of generate(), for the full cache
    cudnn: bool = True  # whether SDPA may choose cuDNN attention


def engines(configs: Sequence[CompressionConfig], device: torch.device) -> list[Engine]:
    """The full cache at its best on this device, then every config."""
    baselines = [Engine("transformers DynamicCache, sdpa")]
    if device.type == "cuda":
        baselines += [
            Engine("transformers DynamicCache, sdpa without cuDNN", cudnn=False),
            Engine("transformers StaticCache, compiled", cache_implementation="static"),
        ]
    if device.type != "cuda":
        return baselines + [Engine(f"pyramidkv, {config.describe()}", config) for config in configs]
    full = CompressionConfig(method="full", decode="compiled")
    ours = [replace(c, decode=decode) for c in configs for decode in _ways(c)]
    return [
        *baselines,
        Engine("pyramidkv, method=full decode=compiled", full),
        *(Engine(f"pyramidkv, {config.describe()}", config) for config in ours),
    ]


def _ways(config: CompressionConfig) -> tuple[str, ...]:
    """The ways of decoding to measure on a GPU."""
    return ("graph", "compiled") if config.decode == "auto" else (config.decode,)


WARM_UP_TOKENS = 4  # a graph is captured at the third


@dataclass(frozen=True)
class _Timing:
    ttft_seconds: float
    tpot_seconds: float
    max_memory_bytes: int | None
    compression: Compression


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time after each token and never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        wait_for_tokens(self.device)
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure(
    model: Any,
    name: str,
    contenders: Sequence[Engine],
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    repeats: int,
    weights_random: bool,
    bandwidth: float | None,
) -> Iterator[list[Speed]]:
    """After each repeat, the records so far of every engine, in order.

    One untimed round of all engines comes first. `bandwidth`: as `read_bandwidth` measures it; None: no floor.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(model.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    timings: list[list[_Timing]] = [[] for _ in contenders]
    for round_number in range(repeats + 1):
        for row, engine in zip(timings, contenders, strict=True):
            timing = _generate(model, engine, ids, new_tokens)
            if round_number:
                row.append(timing)
        if round_number:
            yield [
                _record(engine, row, name, weights_random, batch, prompt, new_tokens, weights, bandwidth)
                for engine, row in zip(contenders, timings, strict=True)
            ]


def _record(
    engine: Engine,
    row: list[_Timing],
    name: str,
    weights_random: bool,
    batch: int,
    prompt: int,
    new_tokens: int,
    weights: int,
    bandwidth: float | None,
) -> Speed:
    peaks = [t.max_memory_bytes for t in row if t.max_memory_bytes is not None]
    kept = row[-1].compression
    return Speed(
        model=name,
        weights_random=weights_random,
        engine=engine.name,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        compression=kept,
        ttft_seconds=Spread(tuple(t.ttft_seconds for t in row)),
        tpot_seconds=Spread(tuple(t.tpot_seconds for t in row)),
        max_memory_bytes=max(peaks) if peaks else None,
        weights_bytes=weights,
        tpot_floor_seconds=None if bandwidth is None else (weights + kept.kv_bytes) / bandwidth,
        read_bytes_per_second=bandwidth,
    )


def _generate(model: Any, engine: Engine, ids: Tensor, new_tokens: int) -> _Timing:
    device: torch.device = ids.device
    clock = _Clock(device)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "stopping_criteria": StoppingCriteriaList([clock]),
        "return_dict_in_generate": True,
    }
    if engine.cache_implementation is not None:
        arguments["cache_implementation"] = engine.cache_implementation
    config = None if engine.config is None else replace(engine.config, room=new_tokens)
    free_unused(device)
    with (
        cudnn_attention(engine.cudnn),
        contextlib.nullcontext() if config is None else compress(model, config) as session,
    ):
        if device.type == "cuda":
            tokens = (
                new_tokens if engine.cache_implementation == "static" else WARM_UP_TOKENS
            )  # its size is compiled in
            few = {"max_new_tokens": tokens, "min_new_tokens": tokens, "stopping_criteria": None}
            with torch.no_grad():
                model.generate(ids, **arguments | few)
        reset_peak(device)
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, **arguments)
        peak = peak_bytes(device)
        plain = Plan(CompressionConfig(method="full"), cache_shape(model.config))
        full = plain.full_bytes(ids.shape[1] + new_tokens, batch=ids.shape[0], itemsize=model.dtype.itemsize)
        if session is None:
            kept = Compression("full", "", 1.0, full, full)
        else:
            usage = session.report()
            if not usage.shrunk and engine.config is not None and engine.config.method != "full":
                raise PyramidKVError(
                    f"{engine.name} kept all tokens of a prompt of {ids.shape[1]}: nothing was compressed"
                )
            assert engine.config is not None
            kept = Compression(engine.config.method, setting(engine.config), usage.keep, usage.kv_bytes, full)
    ticks = clock.ticks
    return _Timing(ticks[0] - start, (ticks[-1] - ticks[0]) / (len(ticks) - 1), peak, kept)


def wait_for_tokens(device: torch.device) -> None:
    """Wait for what `generate()` has asked for; a step begun ahead, on a stream of its own, is not part of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    else:
        synchronize(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device; without it a clock shows when work was queued, not done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Let SDPA choose cuDNN or not; cuDNN plans anew for every new shape, which a growing cache has at every token."""
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(allowed and before)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


_CLEAR_REFS = Path("/proc/self/clear_refs")


def free_unused(device: torch.device) -> None:
    """Give back the memory that others left behind, before a way of generating has its untimed prompt.

    Not before a timed one: it would wait for every block that it asks the driver for, which a server in use does not.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin a new peak: of the allocator on a GPU, of the resident set on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM to the current resident set


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`: allocated bytes on a GPU, resident bytes on Linux; None where it can't be read."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def read_bandwidth(device: torch.device) -> float:
    """Bytes read per second by a sum over random numbers, many more than caches hold; the median of nine.

    A decoding step reads weights and cache and writes next to nothing, so this, not a copy's rate, is what bounds it.
    Random, because memory moves a constant faster: a copy of ones ran at 3.0 TB/s on an H100, of random numbers at 2.4.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    most, passes = (4 << 30, 4) if device.type == "cuda" else (256 << 20, 1)
    numbers = torch.rand(min(most, free // 8) // 4, device=device)
    rates = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(passes):
            numbers.sum()
        synchronize(device)
        rates.append(passes * numbers.nbytes / (time.perf_counter() - start))
    return sorted(rates[1:])[4]
