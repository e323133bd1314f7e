"""The report in one or two sentences, computed from the records."""

from __future__ import annotations

from collections.abc import Sequence

from pyramidkv.evaluate.schema import Spread
from pyramidkv.report.methods import task_label
from pyramidkv.report.results import Results, fastest, full_row, full_rows, kv_share, overlap
from pyramidkv.report.serving import serving_sentence
from pyramidkv.report.summary import corpus_label, describe, model_suffix
from pyramidkv.report.text import enumeration, faster, interval, method_name, seconds, share, shares


def headline(results: Results) -> str:
    """What the chosen method costs and gains, in the order quality, recall, time; what was not measured is said."""
    if results.chosen is None:
        return serving_sentence(results) or "No compressed cache was measured."
    kept = [kv_share(row.compression) for row in results.chosen_rows(results.perplexities)]
    kept += [kv_share(row.compression) for row in results.chosen_rows(results.recalls)]
    kept += [kv_share(row.compression) for row in results.chosen_rows(results.speeds)]
    clauses = [clause for clause in (_perplexity(results), _recall(results), _speed(results)) if clause]
    name = method_name(results.chosen.method)
    if not clauses:
        return f"{name} kept {shares(kept)} of the KV memory; there is no full cache to compare it with."
    text = f"At {shares(kept)} of the KV memory, {name} {enumeration(clauses)}."
    if results.run.weights_random:
        return f"{text} Quality was not measured: the weights are random."
    if not results.perplexities:
        return f"{text} Perplexity was not measured."
    return text


def _perplexity(results: Results) -> str:
    if results.run.weights_random:
        return ""
    parts = []
    for corpus in results.corpora:
        row = next(iter(results.chosen_rows(results.perplexity_rows(corpus))), None)
        change = results.change(row) if row else None
        if change:
            parts.append(f"{interval(change)} on {corpus_label(results, corpus)}")
    return f"changes perplexity by {enumeration(parts)}" if parts else ""


def _recall(results: Results) -> str:
    if results.run.weights_random:
        return ""
    parts = []
    for task in results.tasks:
        rows = results.recall_rows(task)
        row, full = next(iter(results.chosen_rows(rows)), None), full_row(rows)
        if row:
            against = f" (full cache: {share(full.accuracy)})" if full else ""
            parts.append(f"{share(row.accuracy)} of the {task_label(results, task)} questions{against}")
    return f"answers {enumeration(parts)}" if parts else ""


def _speed(results: Results) -> str:
    if not results.workloads:
        return ""
    workload = results.workloads[0]
    measured = results.speed_rows(workload)
    row, full = fastest(results.chosen_rows(measured)), full_rows(measured)
    if row is None or not full:
        return ""
    tpot = _compared("per token", row.tpot_seconds, [r.tpot_seconds for r in full])
    ttft = _compared("to the first token", row.ttft_seconds, [r.ttft_seconds for r in full])
    return f"takes {tpot} and {ttft}, at {describe(workload)}{model_suffix(results, workload.model)}"


def _compared(what: str, after: Spread, baselines: Sequence[Spread]) -> str:
    before = min(baselines, key=lambda spread: spread.median)
    unit_of = max(after.median, before.median)
    verdict = "spreads overlap" if overlap(before, after) else faster(before.median, after.median)
    times = seconds(after.median, unit_of), seconds(before.median, unit_of)
    return f"{times[0]} {what} (full cache at its best: {times[1]}; {verdict})"
