"""Several results files as one: the shares of a curve may have been measured in runs of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyramidkv.errors import DataError
from pyramidkv.evaluate.schema import Perplexity, Recall, Record, Run, Serving, Speed, cast_run

_SAME_NATS = 1e-3  # what kernels and thread counts may change of a chunk's mean; another text or method changes more
_CHOICE = ("method", "keep")  # of the settings: what the first file's headline and table are about


def combine(files: Sequence[tuple[Path, Sequence[Record]]]) -> list[Record]:
    """The records of all files behind one head, rows that several files have (the full cache's) once.

    The headline and the first table are of the first file's method and amount.

    Args:
        files: each file's path, for messages, and its records; the first record is its `Run`.

    Raises:
        DataError: the files cannot share an axis: other models or dtypes, other tokens of a corpus of the same name,
            other questions of a task, two results of one measurement, or times of more than one file.
    """
    if len(files) == 1:
        return list(files[0][1])
    first, head = files[0][0], cast_run(files[0][1])
    kept: dict[tuple[object, ...], tuple[Path, Record]] = {}
    timed: Path | None = None
    for path, records in files:
        _same_model(first, head, path, cast_run(records))
        if any(isinstance(record, Speed | Serving) for record in records):
            if timed:
                raise DataError(f"{timed} and {path}: times of different runs can't be compared; give one file of them")
            timed = path
        for record in records[1:]:
            _same_tokens(kept.values(), path, record)
            where, before = kept.setdefault(_key(record), (path, record))
            if not _agree(before, record):
                raise DataError(
                    f"{where} and {path}: two results of {_words(record)}; give one of the files, or measure both again"
                )
    return [_head([cast_run(records) for _, records in files]), *(record for _, record in kept.values())]


def _same_model(first: Path, head: Run, path: Path, other: Run) -> None:
    for name in ("model", "model_parameters", "weights_random", "dtype"):
        mine, theirs = getattr(head, name), getattr(other, name)
        if mine != theirs:
            raise DataError(f"{first} and {path}: {name} is {mine!r} and {theirs!r}; a report is of one model")


def _same_tokens(kept: Iterable[tuple[Path, Record]], path: Path, record: Record) -> None:
    """Changes share an axis if they are changes on the same tokens."""
    if not isinstance(record, Perplexity):
        return
    for where, other in kept:
        if where == path or not isinstance(other, Perplexity) or other.corpus != record.corpus:
            continue
        for name in ("context_tokens", "target_tokens", "corpus_sha256"):
            if getattr(other, name) != getattr(record, name):
                values = f"{getattr(other, name)!r} and {getattr(record, name)!r}"
                raise DataError(
                    f"{where} and {path}: corpus {record.corpus!r} with {name} {values} can't share an axis"
                )
        if len(other.chunk_nll) != len(record.chunk_nll):
            counts = f"{len(other.chunk_nll)} and {len(record.chunk_nll)}"
            raise DataError(f"{where} and {path}: corpus {record.corpus!r} with {counts} chunks can't share an axis")


def _key(record: Record) -> tuple[object, ...]:
    """What was measured; records of the same key are results of the same measurement."""
    if isinstance(record, Perplexity):
        corpus = (record.model, record.corpus, record.corpus_sha256, record.context_tokens, record.target_tokens)
        return (record.kind, *corpus, record.compression.method, record.compression.setting)
    if isinstance(record, Recall):
        task = (record.model, record.task, record.context_tokens, record.question_aware)
        return (record.kind, *task, record.compression.method, record.compression.setting)
    return (record,) if not isinstance(record, Run) else ("run",)


def _agree(one: Record, other: Record) -> bool:
    if isinstance(one, Perplexity) and isinstance(other, Perplexity):
        pairs = zip(one.chunk_nll, other.chunk_nll, strict=False)
        return len(one.chunk_nll) == len(other.chunk_nll) and all(
            math.isclose(a, b, rel_tol=0.0, abs_tol=_SAME_NATS) for a, b in pairs
        )
    if isinstance(one, Recall) and isinstance(other, Recall):
        return (one.correct, one.probes) == (other.correct, other.probes)
    return True


def _words(record: Record) -> str:
    if isinstance(record, Perplexity | Recall):
        where = record.corpus if isinstance(record, Perplexity) else record.task
        return f"{record.compression.method} {record.compression.setting}".rstrip() + f" on {where!r}"
    return record.kind


def _head(runs: Sequence[Run]) -> Run:
    """The first run's head, with what the others add."""
    first = runs[0]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    settings = {name: _merged([run.settings[name] for run in runs if name in run.settings]) for name in names}
    return dataclasses.replace(
        first,
        command="\n".join(dict.fromkeys(run.command for run in runs)),
        started_utc=", ".join(dict.fromkeys(run.started_utc for run in runs)),
        device="; ".join(dict.fromkeys(run.device for run in runs)),
        versions={
            name: ", ".join(dict.fromkeys(run.versions[name] for run in runs if name in run.versions))
            for name in dict.fromkeys(name for run in runs for name in run.versions)
        },
        settings=settings | {name: first.settings[name] for name in _CHOICE if name in first.settings},
    )


def _merged(values: Sequence[Any]) -> Any:
    """The value that all runs have, or the list of those that they have."""
    if all(value == values[0] for value in values):
        return values[0]
    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    return [part for place, part in enumerate(parts) if part not in parts[:place]]
