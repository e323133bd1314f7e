"""The records of a results file (`results.jsonl`): one JSON object a line, typed here, units in the keys.

Measuring code builds these and appends them; reporting code reads them back. Nothing in this file measures.
Percent changes are not stored: a reader derives them, so that they cannot disagree with what they come from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pyramidkv.errors import DataError

SCHEMA_VERSION = 1
RESULTS = "results.jsonl"  # the name of a results file in its folder


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity, in the unit that the key holding it names."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a spread of no samples")

    @property
    def median(self) -> float:
        ordered = sorted(self.samples)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


@dataclass(frozen=True)
class Run:
    """The head of a results file: what ran, where, and when."""

    kind: ClassVar[str] = "run"
    command: str
    started_utc: str
    device: str
    versions: dict[str, str]  # python, torch, transformers, pyramidkv
    model: str
    model_parameters: int
    weights_random: bool
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Compression:
    """What a measured row kept: the method, its setting in words, and what it cost in memory."""

    method: str  # "full" is the baseline: nothing evicted
    setting: str  # e.g. "keep=0.25 window=32 beta=20"
    keep: float  # kept tokens / prompt tokens, averaged over layers, as measured; 1.0 for "full"
    kv_bytes: int  # bytes of every storage the cache holds after compression
    full_kv_bytes: int  # bytes of the keys and values of the same tokens, uncompressed, in the same dtype


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of continuation tokens scored with the compressed cache in use, one method on one corpus."""

    kind: ClassVar[str] = "perplexity"
    model: str
    corpus: str
    corpus_sha256: str
    context_tokens: int
    target_tokens: int
    compression: Compression
    chunk_nll: tuple[float, ...]  # mean negative log likelihood (nats per token) of each chunk, in corpus order

    def __post_init__(self) -> None:
        if not self.chunk_nll:
            raise ValueError("a perplexity of no chunks")

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.chunk_nll) / len(self.chunk_nll))


@dataclass(frozen=True)
class Speed:
    """Time and memory of one method at one batch and prompt length; repeats alternate with the baseline's."""

    kind: ClassVar[str] = "speed"
    model: str
    weights_random: bool
    engine: str  # e.g. "transformers DynamicCache sdpa", "transformers StaticCache compiled", "pyramidkv"
    batch: int
    prompt_tokens: int
    new_tokens: int
    compression: Compression
    ttft_seconds: Spread
    tpot_seconds: Spread
    max_memory_bytes: int | None  # device peak on a GPU, peak resident set on a CPU; None where it can't be read
    weights_bytes: int
    tpot_floor_seconds: float | None  # (weights + KV bytes) / the rate at which the device reads
    read_bytes_per_second: float | None = None  # that rate; None with a floor: an older record, by a copy's rate

    @property
    def throughput_tokens_per_second(self) -> float:
        return self.batch / self.tpot_seconds.median


@dataclass(frozen=True)
class Serving:
    """Many requests of different lengths, in batches as large as a memory for the cache allows, on one engine."""

    kind: ClassVar[str] = "serving"
    model: str
    weights_random: bool
    engine: str
    requests: int
    prompt_tokens: int  # of the longest request; the others have a quarter of it or more
    new_tokens: int  # likewise
    generated_tokens: int  # of all requests; what rows produce after their end is not counted
    memory_bytes: int  # what the cache of a batch may take
    batch: int  # rows at once
    compression: Compression  # of the batch that held the most
    total_seconds: Spread  # from the first request's start to the last one's end
    mean_ttft_seconds: Spread  # mean over the requests of the time from the start of all to the first token
    max_memory_bytes: int | None  # as in `Speed`

    @property
    def throughput_tokens_per_second(self) -> float:
        return self.generated_tokens / self.total_seconds.median


@dataclass(frozen=True)
class Recall:
    """Exact-match accuracy of one method on one long-range recall task."""

    kind: ClassVar[str] = "recall"
    model: str
    task: str
    context_tokens: int
    question_aware: bool  # True: the question was part of the prompt when it was compressed
    compression: Compression
    correct: tuple[int, ...]  # correctly answered probes of each example
    probes: tuple[int, ...]  # probes of each example

    def __post_init__(self) -> None:
        if not sum(self.probes):
            raise ValueError("a recall of no probes")

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / sum(self.probes)


@dataclass(frozen=True)
class Layers:
    """What each layer kept of one prompt, for the pictures: token positions in 0..prompt_tokens-1, per KV head."""

    kind: ClassVar[str] = "layers"
    model: str
    method: str
    prompt_tokens: int
    budget_tokens: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    kept_positions: tuple[tuple[tuple[int, ...], ...], ...]  # [layer][KV head][slot]
    setting: str = ""  # as in `Compression`; "" in older records


@dataclass(frozen=True)
class Skipped:
    """A row that could not be measured, and why; it appears in the table with its reason."""

    kind: ClassVar[str] = "skipped"
    what: str  # e.g. "perplexity on wikitext-2"
    reason: str


Record = Run | Perplexity | Speed | Serving | Recall | Layers | Skipped
_TYPES: dict[str, type[Record]] = {t.kind: t for t in (Run, Perplexity, Speed, Serving, Recall, Layers, Skipped)}
_TIMES = ("ttft_seconds", "tpot_seconds", "total_seconds", "mean_ttft_seconds")
_NESTED = {"compression": Compression, **dict.fromkeys(_TIMES, Spread)}


def to_json(record: Record) -> str:
    """One line of a results file."""
    return json.dumps({"kind": record.kind, **dataclasses.asdict(record)}, allow_nan=False)


def from_json(line: str) -> Record:
    """The record of one line. Raises `DataError` for anything that is not exactly one record of this schema."""
    try:
        raw = json.loads(line)
        record_type = _TYPES[raw.pop("kind")]
        for name, nested in _NESTED.items():
            if name in raw:
                raw[name] = nested(**{k: _tuples(v) for k, v in raw[name].items()})
        record = record_type(**{k: _tuples(v) for k, v in raw.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a record of schema {SCHEMA_VERSION}: {line[:80]!r} ({error})") from error
    if isinstance(record, Run) and record.schema_version != SCHEMA_VERSION:
        raise DataError(f"schema_version={record.schema_version}: this version reads {SCHEMA_VERSION}")
    return record


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def append(path: Path, record: Record) -> None:
    """Append one record and flush it to disk, so that an interrupted run leaves whole lines. Raises `DataError`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: can't be written: {error.strerror}; lines before it are whole") from error


def read(path: Path) -> list[Record]:
    """All records of a results file. Raises `DataError` naming the line that is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"results={str(path)!r}: {error.strerror}; give the path of a results.jsonl") from error
    except UnicodeError as error:
        raise DataError(f"{path}: not UTF-8 text, so not a results file") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(from_json(line))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}; delete that line to read the rest") from error
    if not records or not isinstance(records[0], Run):
        raise DataError(f"{path}: the first line must be a run record; this is not a results file of `pyramidkv bench`")
    return records


def pick(records: Iterable[Record], kind: type[Any]) -> list[Any]:
    """The records of one type, in file order."""
    return [r for r in records if isinstance(r, kind)]


@dataclass(frozen=True)
class Change:
    """A relative change and its 95% confidence interval, as fractions (0.05 is +5%)."""

    value: float
    low: float
    high: float
    confidence: Literal[95] = 95


def perplexity_change(row: Perplexity, baseline: Perplexity) -> Change:
    """Perplexity against the baseline's on the same chunks: paired over chunks, Student t interval on log ratios.

    Raises `DataError` if the two rows did not score the same tokens.
    """
    same = ("model", "corpus", "corpus_sha256", "context_tokens", "target_tokens")
    if any(getattr(row, k) != getattr(baseline, k) for k in same) or len(row.chunk_nll) != len(baseline.chunk_nll):
        raise DataError(f"rows of {row.corpus!r} were not measured on the same tokens and cannot be paired")
    delta = [a - b for a, b in zip(row.chunk_nll, baseline.chunk_nll, strict=True)]
    mean, half = mean_interval(delta)
    return Change(math.expm1(mean), math.expm1(mean - half), math.expm1(mean + half))


def accuracy_interval(row: Recall) -> tuple[float, float]:
    """95% Wilson score interval of a recall accuracy (probes taken as independent), as fractions."""
    n, p, z = sum(row.probes), row.accuracy, 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# Two-sided 97.5% quantiles of Student's t for 1..30 degrees of freedom; the normal quantile beyond.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95% t interval; the width is infinite for one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.inf
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    quantile = _T[n - 2] if n - 2 < len(_T) else 1.96
    return mean, quantile * math.sqrt(variance / n)


def cast_run(records: Sequence[Record]) -> Run:
    """The run record that heads a results file."""
    return cast(Run, records[0])
