"""Serving at equal memory: one table for each set of requests, one line for each engine."""

from __future__ import annotations

from pyramidkv.evaluate.schema import Serving
from pyramidkv.report.results import FULL, Results
from pyramidkv.report.table import NOT_MEASURED, Cell, Table
from pyramidkv.report.text import method_name, percent, seconds, significant, size, spread

_COLUMNS = ("Method", "Rows at once", "KV cache", "Max memory", "Tokens/s", "Mean TTFT")


def serving_tables(results: Results) -> list[Table]:
    """A table for each set of requests and memory; changes are against the fastest full cache."""
    groups: dict[tuple[int, int, int, int], list[Serving]] = {}
    for row in results.servings:
        groups.setdefault((row.requests, row.prompt_tokens, row.new_tokens, row.memory_bytes), []).append(row)
    return [_table(rows) for rows in groups.values()]


def serving_sentence(results: Results) -> str:
    """The rate of the first compressed method beside the fastest full cache's; empty where either is missing."""
    rows = results.servings
    method = next((row for row in rows if row.compression.method != FULL), None)
    full = [row for row in rows if row.compression.method == FULL]
    if method is None or not full:
        return ""
    best = max(full, key=lambda row: row.throughput_tokens_per_second)
    rate, base = method.throughput_tokens_per_second, best.throughput_tokens_per_second
    return (
        f"With {size(method.memory_bytes)} for the KV cache, {method_name(method.compression.method)} serves "
        f"{method.requests} requests at {significant(rate)} tokens/s, {method.batch} rows at once; the full cache at "
        f"{significant(base)}, {best.batch} rows ({percent(rate / base - 1)})."
    )


def _table(rows: list[Serving]) -> Table:
    first = rows[0]
    title = (
        f"Serving {first.requests} requests of up to {first.prompt_tokens} prompt and {first.new_tokens} new tokens, "
        f"with {size(first.memory_bytes)} for the KV cache"
    )
    full = [row.throughput_tokens_per_second for row in rows if row.compression.method == FULL]
    best = max(full, default=None)
    return Table(title, _COLUMNS, tuple(_row(row, best) for row in rows), ("Medians with min-max.",))


def _row(row: Serving, best: float | None) -> tuple[Cell, ...]:
    rate, kept = row.throughput_tokens_per_second, row.compression
    change = "" if best is None or kept.method == FULL else percent(rate / best - 1)
    return (
        Cell(method_name(kept.method), row.engine if kept.method == FULL else kept.setting),
        Cell(str(row.batch)),
        Cell(size(kept.kv_bytes)),
        NOT_MEASURED if row.max_memory_bytes is None else Cell(size(row.max_memory_bytes)),
        Cell(significant(rate), change),
        Cell(seconds(row.mean_ttft_seconds.median), spread(row.mean_ttft_seconds)),
    )
