"""The records of a report, sorted: which rows are compared with which. No text and no drawing here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyramidkv.evaluate.schema import (
    Change,
    Compression,
    Layers,
    Perplexity,
    Recall,
    Record,
    Run,
    Serving,
    Skipped,
    Speed,
    Spread,
    cast_run,
    perplexity_change,
    pick,
    read,
)
from pyramidkv.report.combine import combine

FULL = "full"
_SAME_KEEP = 0.01  # rows of one method whose kept share differs by no more are taken as one setting
Measured = Perplexity | Recall | Speed
_Row = TypeVar("_Row", Perplexity, Recall, Speed)


class Corpus(NamedTuple):
    """What a perplexity was measured on."""

    model: str
    name: str
    sha256: str
    context_tokens: int
    target_tokens: int


class Task(NamedTuple):
    """What a recall accuracy was measured on."""

    model: str
    name: str
    context_tokens: int
    question_aware: bool


class Workload(NamedTuple):
    """What a speed was measured at."""

    model: str
    batch: int
    prompt_tokens: int
    new_tokens: int


class Variant(NamedTuple):
    """One method at one setting."""

    method: str
    setting: str


def corpus_of(row: Perplexity) -> Corpus:
    return Corpus(row.model, row.corpus, row.corpus_sha256, row.context_tokens, row.target_tokens)


def task_of(row: Recall) -> Task:
    return Task(row.model, row.task, row.context_tokens, row.question_aware)


def workload_of(row: Speed) -> Workload:
    return Workload(row.model, row.batch, row.prompt_tokens, row.new_tokens)


def kv_share(compression: Compression) -> float:
    """KV bytes as a part of the full cache's."""
    return compression.kv_bytes / compression.full_kv_bytes


@dataclass(frozen=True)
class Results:
    """What a report is made of. Lists keep the order of the file; `chosen` is the row of the report's own table."""

    run: Run
    perplexities: tuple[Perplexity, ...]
    recalls: tuple[Recall, ...]
    speeds: tuple[Speed, ...]
    servings: tuple[Serving, ...]
    layers: tuple[Layers, ...]
    skipped: tuple[Skipped, ...]
    chosen: Compression | None

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> Results:
        """Sort the records of a file that starts with its `Run`."""
        run = cast_run(records)
        perplexities, recalls, speeds = (tuple(pick(records, kind)) for kind in (Perplexity, Recall, Speed))
        measured: list[Measured] = [*perplexities, *recalls, *speeds]
        rows = [row.compression for row in measured]
        return cls(
            run=run,
            perplexities=perplexities,
            recalls=recalls,
            speeds=speeds,
            servings=tuple(pick(records, Serving)),
            layers=tuple(pick(records, Layers)),
            skipped=tuple(pick(records, Skipped)),
            chosen=_choose(run, [row for row in rows if row.method != FULL]),
        )

    @classmethod
    def from_files(cls, *paths: Path) -> Results:
        """Read one `results.jsonl`, or several of one model as one; what is chosen, the first file says.

        Raises `DataError` naming the line that is not a record, or the files that cannot be combined.
        """
        files = [(path, read(path)) for path in paths]
        return dataclasses.replace(cls.from_records(combine(files)), chosen=cls.from_records(files[0][1]).chosen)

    @property
    def corpora(self) -> list[Corpus]:
        return _unique(corpus_of(row) for row in self.perplexities)

    @property
    def tasks(self) -> list[Task]:
        return _unique(task_of(row) for row in self.recalls)

    @property
    def workloads(self) -> list[Workload]:
        return _unique(workload_of(row) for row in self.speeds)

    @property
    def variants(self) -> list[Variant]:
        """Every compressed method and setting, in the order of the file."""
        rows: list[Measured] = [*self.perplexities, *self.recalls, *self.speeds]
        found = [row.compression for row in rows]
        return _unique(Variant(c.method, c.setting) for c in found if c.method != FULL)

    def perplexity_rows(self, corpus: Corpus) -> list[Perplexity]:
        return [row for row in self.perplexities if corpus_of(row) == corpus]

    def recall_rows(self, task: Task) -> list[Recall]:
        return [row for row in self.recalls if task_of(row) == task]

    def speed_rows(self, workload: Workload) -> list[Speed]:
        return [row for row in self.speeds if workload_of(row) == workload]

    def change(self, row: Perplexity) -> Change | None:
        """Perplexity against the full cache on the same tokens; None where the full cache was not measured."""
        baseline = full_row(self.perplexity_rows(corpus_of(row)))
        return perplexity_change(row, baseline) if baseline else None

    def chosen_rows(self, rows: Iterable[_Row]) -> list[_Row]:
        """The rows of the chosen method and setting, or, where none has that very setting, of the same kept share."""
        if self.chosen is None:
            return []
        chosen = self.chosen
        same = [row for row in rows if row.compression.method == chosen.method]
        exact = [row for row in same if row.compression.setting == chosen.setting]
        return exact or [row for row in same if abs(row.compression.keep - chosen.keep) <= _SAME_KEEP]


def kv_source(results: Results, method: Speed | None) -> tuple[Compression | None, str]:
    """Whose KV bytes stand for the method: the speed row's, else those of the longest context, and its name."""
    if method:
        return method.compression, ""
    rows: list[Perplexity | Recall] = [
        *results.chosen_rows(results.perplexities),
        *results.chosen_rows(results.recalls),
    ]
    longest = max(rows, key=lambda row: row.context_tokens, default=None)
    return (longest.compression, f"context {longest.context_tokens} tokens") if longest else (None, "")


def full_row(rows: Iterable[_Row]) -> _Row | None:
    """The first row of the full cache."""
    return next((row for row in rows if row.compression.method == FULL), None)


def full_rows(rows: Iterable[Speed]) -> list[Speed]:
    """The full cache on every engine it was measured with."""
    return [row for row in rows if row.compression.method == FULL]


def fastest(rows: Sequence[Speed]) -> Speed | None:
    """The row of the engine with the shortest median time per output token."""
    return min(rows, key=lambda row: row.tpot_seconds.median, default=None)


def overlap(one: Spread, other: Spread) -> bool:
    """Whether the repeats of two quantities overlap, so that the order of their medians may be chance."""
    return one.low <= other.high and other.low <= one.high


def _choose(run: Run, rows: Sequence[Compression]) -> Compression | None:
    """The method and kept share that the run's settings name first; without them the first compressed row."""
    method = next((m for m in _listed(run.settings.get("method")) if m != FULL), None)
    keep = next((k for k in _listed(run.settings.get("keep")) if isinstance(k, int | float)), None)
    named = [row for row in rows if row.method == method] or list(rows)
    if not named:
        return None
    if keep is None:
        return named[0]
    # A measured share differs from the asked one by whole tokens; equal as printed is equal, and the first row wins.
    return min(named, key=lambda row: round(abs(row.keep - keep), 2))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
