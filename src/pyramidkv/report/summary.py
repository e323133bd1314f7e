"""The report's own table: one line for each metric, the full cache beside the chosen method.

The baseline is the full cache at its best: for each metric the engine that does best on that metric. The method is
one engine, the one with the shortest time per token, on every line. A line that was not measured says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from pyramidkv.evaluate.schema import Change, Perplexity, Skipped, Speed, Spread
from pyramidkv.report.results import (
    Corpus,
    Results,
    Workload,
    fastest,
    full_row,
    full_rows,
    kv_share,
    kv_source,
    overlap,
)
from pyramidkv.report.table import NOT_MEASURED, Cell, Table, Tone
from pyramidkv.report.text import (
    enumeration,
    faster,
    interval,
    method_name,
    percent,
    seconds,
    share,
    significant,
    size,
    spread,
)

RANDOM_WEIGHTS = "random weights"
_NO_RECORD = "no record in the results file"
_UNREADABLE = "not readable on this device"
_QUALITY = re.compile(r"\b(perplexity|ppl)\b", re.IGNORECASE)
_SAID = re.compile(r"^not measured(?:: (.*)| \((.*)\))$")
_SPEED = re.compile(r"\b(speed|memory|ttft|tpot|throughput)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Pair:
    """A baseline row and a method row of one metric; either may be missing."""

    baseline: Speed | None
    method: Speed | None


def summary_table(results: Results) -> Table:
    """The report's table: perplexity per corpus, KV cache memory, max memory, TPOT, throughput, TTFT."""
    reasons = _Reasons(results)
    workload = results.workloads[0] if results.workloads else None
    rows = _perplexity_rows(results, reasons) + _speed_rows(results, workload, reasons)
    for reason, what in reasons.unused().items():
        rows.append((Cell(enumeration(what)), _missing(reason), NOT_MEASURED, NOT_MEASURED))
    return Table(_title(results), _columns(results), tuple(rows), tuple(_notes(results, workload)))


def workload_tables(results: Results) -> list[Table]:
    """The memory and time lines again, for every further batch and prompt length."""
    return [
        Table(
            f"Memory and times again: {describe(workload)}",
            _columns(results),
            tuple(_speed_rows(results, workload, _Reasons(results))),
        )
        for workload in results.workloads[1:]
    ]


def describe(workload: Workload) -> str:
    """A batch and lengths in words."""
    return f"batch {workload.batch}, prompt {workload.prompt_tokens} tokens, {workload.new_tokens} new tokens"


def corpus_label(results: Results, corpus: Corpus) -> str:
    """A corpus by name; with its context length and model where those tell two of them apart."""
    label = corpus.name
    if len({c.context_tokens for c in results.corpora if c.name == corpus.name}) > 1:
        label += f" @ {corpus.context_tokens}"
    return label + model_suffix(results, corpus.model)


def model_suffix(results: Results, model: str) -> str:
    """The model in brackets, where a row is not of the run's own model."""
    return "" if model == results.run.model else f" ({model})"


def _title(results: Results) -> str:
    if results.chosen is None:
        return results.run.model
    setting = results.chosen.setting or "defaults"
    return f"{results.run.model}: full cache and {method_name(results.chosen.method)} ({setting})"


def _columns(results: Results) -> tuple[str, ...]:
    return ("Metric", "Baseline", method_name(results.chosen.method) if results.chosen else "Method", "Improvement")


class _Reasons:
    """Why lines are missing: hands out the reasons of `Skipped` records, and remembers which found a line."""

    def __init__(self, results: Results) -> None:
        self._skipped = list(results.skipped)
        self._used: set[int] = set()
        self._random = results.run.weights_random

    def speed(self) -> str:
        return self._find(lambda s: bool(_SPEED.search(s.what))) or _NO_RECORD

    def perplexity(self, corpus: str | None = None) -> str:
        found = self._find(lambda s: bool(_QUALITY.search(s.what)) and (corpus is None or corpus in s.what))
        return found or (RANDOM_WEIGHTS if self._random else _NO_RECORD)

    def corpora(self, measured: set[str]) -> list[tuple[str, str]]:
        """(corpus, reason) of every corpus that has no row at all."""
        found = []
        for index, skipped in enumerate(self._skipped):
            corpus = skipped.what.rpartition(" on ")[2]
            if _QUALITY.search(skipped.what) and " on " in skipped.what and corpus not in measured:
                self._used.add(index)
                found.append((corpus, skipped.reason))
        return found

    def unused(self) -> dict[str, list[str]]:
        """What found no line, by its reason: one line of the table for each reason."""
        found: dict[str, list[str]] = {}
        for index, skipped in enumerate(self._skipped):
            if index not in self._used:
                found.setdefault(skipped.reason, []).append(skipped.what)
        return found

    def _find(self, fits: Callable[[Skipped], bool]) -> str | None:
        for index, skipped in enumerate(self._skipped):
            if fits(skipped):
                self._used.add(index)
                return skipped.reason
        return None


def _missing(reason: str) -> Cell:
    """A reason may say itself that the line is not measured; the cell says it once."""
    return Cell("not measured", _SAID.sub(r"\1\2", reason), "missing")


def _perplexity_rows(results: Results, reasons: _Reasons) -> list[tuple[Cell, ...]]:
    rows = []
    for corpus in results.corpora:
        measured = results.perplexity_rows(corpus)
        baseline = full_row(measured)
        method = next(iter(results.chosen_rows(measured)), None)
        cells = [
            _perplexity_cell(row) if row else _missing(reasons.perplexity(corpus.name)) for row in (baseline, method)
        ]
        change = results.change(method) if method else None
        improvement = change_cell(change) if change else NOT_MEASURED
        rows.append((Cell(f"{corpus_label(results, corpus)} PPL"), *cells, improvement))
    for name, reason in reasons.corpora({corpus.name for corpus in results.corpora}):
        rows.append((Cell(f"{name} PPL"), _missing(reason), NOT_MEASURED, NOT_MEASURED))
    if not rows:
        rows.append((Cell("Perplexity"), _missing(reasons.perplexity()), NOT_MEASURED, NOT_MEASURED))
    return rows


def _perplexity_cell(row: Perplexity) -> Cell:
    return Cell(significant(row.perplexity, 4))


def change_cell(change: Change) -> Cell:
    """A perplexity change, and whether its interval leaves a direction: more perplexity is worse."""
    if not math.isfinite(change.high):
        return Cell(interval(change))
    if change.low <= 0 <= change.high:
        return Cell(interval(change), "no difference found")
    return Cell(interval(change), "worse" if change.value > 0 else "better", "worse" if change.value > 0 else "better")


def _speed_rows(results: Results, workload: Workload | None, reasons: _Reasons) -> list[tuple[Cell, ...]]:
    measured = results.speed_rows(workload) if workload else []
    full = full_rows(measured)
    method = fastest(results.chosen_rows(measured))
    ttft = _Pair(min(full, key=lambda row: row.ttft_seconds.median, default=None), method)
    tpot = _Pair(fastest(full), method)
    memory = _Pair(min(full, key=lambda row: row.max_memory_bytes or float("inf"), default=None), method)
    suffix = model_suffix(results, workload.model) if workload else ""
    rows = [
        _kv_row(results, method),
        _max_memory_row(memory, reasons),
        _time_row("TPOT", tpot, lambda row: row.tpot_seconds, reasons),
        _throughput_row(tpot, reasons),
        _time_row("TTFT", ttft, lambda row: row.ttft_seconds, reasons),
    ]
    return [(Cell(metric.value + suffix, metric.detail), *cells) for metric, *cells in rows]


def _kv_row(results: Results, method: Speed | None) -> tuple[Cell, ...]:
    """KV bytes of the speed row; where no speed was measured, of the longest context that was compressed."""
    compression, tokens = kv_source(results, method)
    if compression is None:
        return Cell("KV cache memory"), _missing(_NO_RECORD), _missing(_NO_RECORD), NOT_MEASURED
    change = kv_share(compression) - 1
    return (
        Cell("KV cache memory", tokens),
        Cell(size(compression.full_kv_bytes), "same tokens, uncompressed"),
        Cell(size(compression.kv_bytes, compression.full_kv_bytes), f"{share(kv_share(compression))} of full"),
        _less_cell(change),
    )


def _max_memory_row(pair: _Pair, reasons: _Reasons) -> tuple[Cell, ...]:
    unit_of = max((row.max_memory_bytes or 0 for row in (pair.baseline, pair.method) if row), default=0)
    cells = [_memory_cell(row, unit_of, reasons) for row in (pair.baseline, pair.method)]
    before, after = (row.max_memory_bytes if row else None for row in (pair.baseline, pair.method))
    return Cell("Max memory"), *cells, _less_cell(after / before - 1) if before and after else NOT_MEASURED


def _memory_cell(row: Speed | None, unit_of: float, reasons: _Reasons) -> Cell:
    if row is None:
        return _missing(reasons.speed())
    if row.max_memory_bytes is None:
        return _missing(_UNREADABLE)
    besides = size(row.max_memory_bytes - row.weights_bytes, unit_of)
    return Cell(size(row.max_memory_bytes, unit_of), f"{besides} besides weights; {row.engine}")


def _less_cell(change: float) -> Cell:
    tone: Tone = "better" if change < 0 else "worse" if change > 0 else ""
    return Cell(percent(change), {"better": "less", "worse": "more"}.get(tone, "the same"), tone)


def _time_row(metric: str, pair: _Pair, times: Callable[[Speed], Spread], reasons: _Reasons) -> tuple[Cell, ...]:
    measured = [times(row) for row in (pair.baseline, pair.method) if row]
    unit_of = max((spread.median for spread in measured), default=0.0)
    cells = [
        _time_cell(row, times(row), unit_of, floor=metric == "TPOT") if row else _missing(reasons.speed())
        for row in (pair.baseline, pair.method)
    ]
    if len(measured) < 2:
        return Cell(metric), *cells, NOT_MEASURED
    return Cell(metric), *cells, faster_cell(*measured)


def _time_cell(row: Speed, times: Spread, unit_of: float, *, floor: bool) -> Cell:
    detail = spread(times, unit_of)
    if floor and row.tpot_floor_seconds:
        ratio = significant(times.median / row.tpot_floor_seconds, 2)
        detail += f"; {ratio}x its floor of {seconds(row.tpot_floor_seconds, unit_of)}"
    return Cell(seconds(times.median, unit_of), f"{detail}; {row.engine}")


def faster_cell(before: Spread, after: Spread) -> Cell:
    """How much faster, as a factor, or how much slower, in percent; overlapping spreads are no difference."""
    value, change = faster(before.median, after.median), percent(after.median / before.median - 1)
    if value == change:
        value += " (slower)" if after.median > before.median else " (faster)"
    if overlap(before, after):
        return Cell(value, "spreads overlap: no difference found")
    if after.median > before.median:
        return Cell(value, tone="worse")
    return Cell(value, "" if change in value else f"{change} time", "better")


def _throughput_row(pair: _Pair, reasons: _Reasons) -> tuple[Cell, ...]:
    metric = Cell("Throughput")
    cells = [
        Cell(f"{significant(row.throughput_tokens_per_second)} tok/s", _throughput_spread(row))
        if row
        else _missing(reasons.speed())
        for row in (pair.baseline, pair.method)
    ]
    if pair.baseline is None or pair.method is None:
        return metric, *cells, NOT_MEASURED
    change = pair.method.throughput_tokens_per_second / pair.baseline.throughput_tokens_per_second - 1
    if overlap(pair.baseline.tpot_seconds, pair.method.tpot_seconds):
        return metric, *cells, Cell(percent(change), "spreads overlap: no difference found")
    return metric, *cells, Cell(percent(change), "more" if change > 0 else "less", "better" if change > 0 else "worse")


def _throughput_spread(row: Speed) -> str:
    low, high = (significant(row.batch / seconds) for seconds in (row.tpot_seconds.high, row.tpot_seconds.low))
    return f"{low}-{high}"


def _notes(results: Results, workload: Workload | None) -> list[str]:
    notes = []
    if results.perplexities:
        sizes = sorted({(row.context_tokens, row.target_tokens, len(row.chunk_nll)) for row in results.perplexities})
        described = "; ".join(f"{n} chunks of {c} context and {t} scored tokens" for c, t, n in sizes)
        notes.append(f"PPL: {described}; [95% interval] of the change, paired over chunks.")
    if workload:
        rows = results.speed_rows(workload)
        repeats = sorted({len(row.tpot_seconds.samples) for row in rows})
        counted = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        notes.append(
            f"Memory and times: {describe(workload)}; median of {counted} repeats with min-max; "
            "the baseline is the full cache's best engine on each line."
        )
        if any(row.weights_random for row in rows):
            notes.append("Times and memory were taken with random weights of the model's true shape.")
    if results.run.weights_random and (results.perplexities or results.recalls):
        notes.append("The weights are random: perplexity and recall say nothing about quality.")
    return notes
