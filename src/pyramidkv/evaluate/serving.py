"""Serving at large batch: many requests of different lengths, in batches as large as a KV memory allows.

The same requests go to every engine in the same order: prompts of a quarter of `prompt` tokens up to all of it, each
with its own number of new tokens, after which its row is finished while others go on, as rows end at an EOS. A batch
is padded on the left to its longest prompt and runs through plain `generate()` until its last row is done; then comes
the next. What compression buys is rows: the batch is the largest whose cache fits the memory.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.evaluate.perplexity import setting
from pyramidkv.evaluate.schema import Compression, Serving, Spread
from pyramidkv.evaluate.speed import Engine, cudnn_attention, free_unused, peak_bytes, reset_peak, synchronize
from pyramidkv.plan import Plan
from pyramidkv.session import compress
from pyramidkv.shape import cache_shape

FULL = CompressionConfig(method="full")


@dataclass(frozen=True)
class Request:
    """A prompt of random tokens, and after how many new ones it is done."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class _Run:
    """All requests served once."""

    seconds: float
    ttft_seconds: tuple[float, ...]  # of each request, from the start of the run
    kv_bytes: int  # the most that a batch held
    full_kv_bytes: int  # what an uncompressed cache of the same batch would hold
    keep: float
    max_memory_bytes: int | None


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends each row after its own number of new tokens; notes when the first token was there."""

    def __init__(self, width: int, ends: Sequence[int], device: torch.device) -> None:
        self.width = width
        self.ends = torch.tensor(ends, device=device)
        self.first = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        new = input_ids.shape[1] - self.width
        if new == 1:
            synchronize(input_ids.device)
            self.first = time.perf_counter()
        return new >= self.ends


def make_requests(count: int, *, prompt: int, new_tokens: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """`count` requests with prompts of `prompt` / 4 to `prompt` tokens and `new_tokens` / 4 to `new_tokens` new ones.

    The first has the most of both, so that the largest batch is known beforehand.
    """
    draw = random.Random(seed)
    sizes = [(prompt, new_tokens)]
    sizes += [(_between(draw, prompt), _between(draw, new_tokens)) for _ in range(count - 1)]
    return [Request(tuple(draw.choices(range(vocabulary), k=length)), new) for length, new in sizes]


def _between(draw: random.Random, most: int) -> int:
    return draw.randint(max(1, most // 4), most)


def default_memory(model: Any, requests: Sequence[Request]) -> int:
    """A quarter of what the full cache would take with all requests in one batch."""
    return _full_bytes(model, _longest(requests), len(requests)) // 4


def largest_batch(model: Any, config: CompressionConfig | None, requests: Sequence[Request], memory: int) -> int:
    """The most rows, each as long as the longest request, whose cache fits `memory` bytes; at most all requests.

    `config` None is the full cache. Raises `ConfigError` if not one row fits.
    """
    prompt, new = _longest(requests)
    for rows in range(len(requests), 0, -1):
        if config is None:
            need = _full_bytes(model, (prompt, new), rows)
        else:
            plan = Plan(replace(config, room=new), cache_shape(model.config))
            need = plan.kv_bytes(prompt, batch=rows, itemsize=model.dtype.itemsize)
        if need <= memory:
            return rows
    what = "the full cache" if config is None else config.describe()
    raise ConfigError(f"memory={memory}: {what} needs {need} bytes for one request of {prompt} and {new} tokens")


def measure(
    model: Any,
    name: str,
    contenders: Sequence[Engine],
    requests: Sequence[Request],
    *,
    memory: int,
    repeats: int,
    weights_random: bool,
) -> Iterator[list[Serving]]:
    """After each repeat, the records so far of every engine, in order; one untimed round comes first.

    Args:
        memory: bytes that the cache of a batch may take.

    Where a batch does not fit a GPU after all (activations are not counted), it is made smaller by a quarter.
    """
    batches = [largest_batch(model, engine.config, requests, memory) for engine in contenders]
    runs: list[list[_Run]] = [[] for _ in contenders]
    for number in range(repeats + 1):
        for index, engine in enumerate(contenders):
            while True:
                try:
                    run = _serve(model, engine, requests, batches[index])
                    break
                except torch.OutOfMemoryError:
                    if batches[index] == 1:
                        raise
                batches[index] = max(1, batches[index] * 3 // 4)
                runs[index].clear()  # times of other batches
            if number:
                runs[index].append(run)
        if number:
            yield [
                _record(name, weights_random, engine, requests, memory, rows, served)
                for engine, rows, served in zip(contenders, batches, runs, strict=True)
            ]


def _record(
    name: str,
    weights_random: bool,
    engine: Engine,
    requests: Sequence[Request],
    memory: int,
    batch: int,
    runs: Sequence[_Run],
) -> Serving:
    config = engine.config or FULL
    last = runs[-1]
    peaks = [run.max_memory_bytes for run in runs if run.max_memory_bytes is not None]
    prompt, new = _longest(requests)
    return Serving(
        model=name,
        weights_random=weights_random,
        engine=engine.name,
        requests=len(requests),
        prompt_tokens=prompt,
        new_tokens=new,
        generated_tokens=sum(request.new_tokens for request in requests),
        memory_bytes=memory,
        batch=batch,
        compression=Compression(config.method, setting(config), last.keep, last.kv_bytes, last.full_kv_bytes),
        total_seconds=Spread(tuple(run.seconds for run in runs)),
        mean_ttft_seconds=Spread(tuple(sum(run.ttft_seconds) / len(run.ttft_seconds) for run in runs)),
        max_memory_bytes=max(peaks) if peaks else None,
    )


def _serve(model: Any, engine: Engine, requests: Sequence[Request], batch: int) -> _Run:
    """Serve all requests, `batch` at a time."""
    device: torch.device = model.device
    config = None if engine.config is None else replace(engine.config, room=_longest(requests)[1])
    # A static cache of one size: other sizes would be compiled anew.
    width = None if engine.cache_implementation is None else _longest(requests)[0]
    first, held = [], []
    with (
        cudnn_attention(engine.cudnn),
        contextlib.nullcontext() if config is None else compress(model, config) as session,
    ):
        free_unused(device)
        reset_peak(device)
        synchronize(device)
        start = time.perf_counter()
        for at in range(0, len(requests), batch):
            rows = requests[at : at + batch]
            out, ends = _generate(model, engine, rows, width)
            first += [ends.first - start] * len(rows)
            full = _full_bytes(model, (out.shape[1] - 1, 0), len(rows))  # the last token has no key yet
            if session is None:
                held.append((full, full, 1.0))
            else:
                usage = session.report()
                held.append((usage.kv_bytes, full, usage.keep))
        synchronize(device)
        seconds = time.perf_counter() - start
        peak = peak_bytes(device)
    kv_bytes, full, keep = max(held)
    return _Run(seconds, tuple(first), kv_bytes, full, keep, peak)


def _generate(model: Any, engine: Engine, rows: Sequence[Request], width: int | None) -> tuple[Tensor, _Ends]:
    width = max(len(row.prompt) for row in rows) if width is None else width
    ids = torch.tensor([[0] * (width - len(row.prompt)) + list(row.prompt) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=model.device)
    most = max(row.new_tokens for row in rows)
    ends = _Ends(width, [row.new_tokens for row in rows], model.device)
    options: dict[str, Any] = {"min_new_tokens": most, "max_new_tokens": most, "do_sample": False, "pad_token_id": 0}
    if engine.cache_implementation is not None:
        options["cache_implementation"] = engine.cache_implementation
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([ends]), **options)
    return out, ends


def _longest(requests: Sequence[Request]) -> tuple[int, int]:
    """The most prompt tokens and the most new tokens of any request."""
    return max(len(request.prompt) for request in requests), max(request.new_tokens for request in requests)


def _full_bytes(model: Any, tokens: tuple[int, int], rows: int) -> int:
    return Plan(FULL, cache_shape(model.config)).full_bytes(sum(tokens), batch=rows, itemsize=model.dtype.itemsize)
