"""Every method at every setting, quality beside bytes; and every engine at every batch and prompt length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyramidkv.evaluate.schema import Compression, Layers, Recall, Speed, accuracy_interval
from pyramidkv.report.results import (
    FULL,
    Corpus,
    Measured,
    Results,
    Task,
    Variant,
    Workload,
    fastest,
    kv_share,
)
from pyramidkv.report.summary import corpus_label, describe, model_suffix
from pyramidkv.report.table import NOT_MEASURED, Cell, Table
from pyramidkv.report.text import (
    bounds,
    method_name,
    percent,
    seconds,
    share,
    shares,
    significant,
    size,
    spread,
    task_name,
)


def methods_table(results: Results) -> Table:
    """One line for each method and setting: perplexity change per corpus, recall per task, KV bytes, TTFT, TPOT."""
    workload = results.workloads[0] if results.workloads else None
    columns = ["Method", "KV of full"]
    columns += [f"{corpus_label(results, corpus)} PPL" for corpus in results.corpora]
    columns += [task_label(results, task) for task in results.tasks]
    columns += ["TTFT", "TPOT"] if workload else []
    full = Variant(FULL, "")
    variants = [full] if _compressions(results, full) else []
    order = {method: place for place, method in enumerate(dict.fromkeys(v.method for v in results.variants))}
    variants += sorted(results.variants, key=lambda v: (-_kept_class(results, v), order[v.method]))
    shared = shared_words([variant.setting for variant in results.variants])
    notes = ["Compare lines of equal KV bytes."]
    if results.corpora:
        notes.append("PPL: change against the full cache, its 95% interval, and the perplexity.")
    if results.tasks:
        probes = sorted({sum(row.probes) for row in results.recalls})
        counted = f"{probes[0]}" if len(probes) == 1 else f"{probes[0]} to {probes[-1]}"
        notes.append(f"Recall: exact match of {counted} probes, and its 95% interval.")
    if shared:
        notes.append(f"On every line: {' '.join(shared)}.")
    if workload:
        notes.append(f"TTFT and TPOT: {describe(workload)}, fastest engine of each line, median with min-max.")
    rows = tuple(_row(results, workload, variant, shared) for variant in variants)
    return Table("All methods and settings", tuple(columns), rows, tuple(notes))


def engines_table(results: Results) -> Table:
    """One line for each engine, batch and prompt length as measured: nothing is chosen here."""
    columns = ("Engine", "Method", "KV cache", "Max memory", "TTFT", "TPOT", "Floor of TPOT", "Throughput")
    rows = tuple(_engine_row(results, row) for workload in results.workloads for row in results.speed_rows(workload))
    return Table("All engines", columns, rows, (*_floor_note(results), "Times: median with min-max."))


def _floor_note(results: Results) -> tuple[str, ...]:
    """By which rates the floors of a table were divided; nothing where there are none."""
    rows = [row for workload in results.workloads for row in results.speed_rows(workload) if row.tpot_floor_seconds]
    rates = sorted({row.read_bytes_per_second for row in rows if row.read_bytes_per_second is not None})
    by = []
    if rates:
        by.append(f"the rate at which the device read random numbers ({', '.join(_rate(r) for r in rates)})")
    if any(row.read_bytes_per_second is None for row in rows):
        by.append("the rate of a copy of ones, in older records")
    return (f"Floor: (weight bytes + KV bytes) / {', or '.join(by)}.",) if by else ()


def _rate(bytes_per_second: float) -> str:
    return f"{significant(bytes_per_second / 1e9)} GB/s"


def task_label(results: Results, task: Task) -> str:
    """A recall task by name, with what tells two of the same name apart."""
    label = task_name(task.name)
    if len({t.context_tokens for t in results.tasks if t.name == task.name}) > 1:
        label += f" @ {task.context_tokens}"
    if task.question_aware:
        label += " (question seen)"
    return label + model_suffix(results, task.model)


def layers_label(results: Results, record: Layers) -> str:
    """Whose layers a record is of; where there are several of one method, with what its setting has that not all have.

    Older records have no setting: there the share of the tokens kept tells them apart.
    """
    name = method_name(record.method)
    settings = [other.setting for other in results.layers if other.method == record.method]
    if len(settings) < 2:
        return name
    if all(settings):
        common = shared_words(settings)
        return " ".join([name, *(word for word in record.setting.split() if word not in common)])
    tokens = sum(record.budget_tokens) / len(record.budget_tokens)
    return f"{name}, {share(tokens / record.prompt_tokens)} kept"


def accuracy_cell(row: Recall) -> Cell:
    """An accuracy with its 95% interval."""
    low, high = accuracy_interval(row)
    return Cell(share(row.accuracy), f"{share(low)[:-1]}-{share(high)}")


def shared_words(settings: Sequence[str]) -> list[str]:
    """The words that all settings have, said once below the table; none for a single setting."""
    if len(settings) < 2:
        return []
    return [word for word in settings[0].split() if all(word in setting.split() for setting in settings)]


def _fits(compression: Compression, variant: Variant) -> bool:
    if variant.method == FULL:  # one full cache, whatever words a record has for its setting
        return compression.method == FULL
    return (compression.method, compression.setting) == variant


def _compressions(results: Results, variant: Variant) -> list[Compression]:
    """What a variant kept in every row that measured it: speed rows first, then perplexity, then recall."""
    rows: list[Measured] = [*results.speeds, *results.perplexities, *results.recalls]
    return [row.compression for row in rows if _fits(row.compression, variant)]


def _kept_class(results: Results, variant: Variant) -> int:
    """KV shares that differ by less than a fifth or so are one class: whole tokens round differently per method."""
    return round(4 * math.log2(kv_share(_compressions(results, variant)[0])))


def _row(results: Results, workload: Workload | None, variant: Variant, shared: Sequence[str]) -> tuple[Cell, ...]:
    words = [word for word in variant.setting.split() if word not in shared]
    cells = [Cell(method_name(variant.method), "" if variant.method == FULL else " ".join(words))]
    cells.append(_kv_cell(_compressions(results, variant)))
    cells += [_perplexity_cell(results, corpus, variant) for corpus in results.corpora]
    cells += [_recall_cell(results, task, variant) for task in results.tasks]
    if workload:
        rows = [row for row in results.speed_rows(workload) if _fits(row.compression, variant)]
        cells += _time_cells(fastest(rows))
    return tuple(cells)


def _kv_cell(found: Sequence[Compression]) -> Cell:
    if not found:
        return NOT_MEASURED
    return Cell(shares([kv_share(c) for c in found]), size(found[0].kv_bytes))


def _perplexity_cell(results: Results, corpus: Corpus, variant: Variant) -> Cell:
    rows = [row for row in results.perplexity_rows(corpus) if _fits(row.compression, variant)]
    if not rows:
        return NOT_MEASURED
    if variant.method == FULL:
        return Cell(significant(rows[0].perplexity, 4))
    change = results.change(rows[0])
    if change is None:
        return Cell(significant(rows[0].perplexity, 4), "no full cache to compare with")
    return Cell(percent(change.value), f"{bounds(change)}; {significant(rows[0].perplexity, 4)}")


def _recall_cell(results: Results, task: Task, variant: Variant) -> Cell:
    rows = [row for row in results.recall_rows(task) if _fits(row.compression, variant)]
    return accuracy_cell(rows[0]) if rows else NOT_MEASURED


def _time_cells(row: Speed | None) -> list[Cell]:
    if row is None:
        return [NOT_MEASURED, NOT_MEASURED]
    return [Cell(seconds(times.median), spread(times)) for times in (row.ttft_seconds, row.tpot_seconds)]


def _engine_row(results: Results, row: Speed) -> tuple[Cell, ...]:
    compression = row.compression
    workload = f"batch {row.batch}, prompt {row.prompt_tokens}, {row.new_tokens} new"
    floor = row.tpot_floor_seconds
    return (
        Cell(row.engine, workload + model_suffix(results, row.model)),
        Cell(method_name(compression.method), compression.setting if compression.method != FULL else ""),
        Cell(size(compression.kv_bytes), f"{share(kv_share(compression))} of full"),
        Cell(size(row.max_memory_bytes), f"{size(row.weights_bytes)} weights")
        if row.max_memory_bytes is not None
        else NOT_MEASURED,
        *_time_cells(row),
        Cell(seconds(floor), f"TPOT is {significant(row.tpot_seconds.median / floor, 2)}x") if floor else NOT_MEASURED,
        Cell(f"{significant(row.throughput_tokens_per_second)} tok/s"),
    )
