"""What a report says, in order, before it is Markdown or HTML: both are made of this one value."""

from __future__ import annotations

from dataclasses import dataclass

from pyramidkv.evaluate.schema import Layers
from pyramidkv.report.headline import headline
from pyramidkv.report.methods import engines_table, layers_label, methods_table
from pyramidkv.report.results import FULL, Results
from pyramidkv.report.serving import serving_tables
from pyramidkv.report.summary import corpus_label, summary_table, workload_tables
from pyramidkv.report.table import Cell, Table
from pyramidkv.report.text import method_name, significant, size


@dataclass(frozen=True)
class Content:
    """The parts of a report."""

    title: str
    headline: str
    summary: tuple[Table, ...]
    comparison: tuple[Table, ...]
    budgets: tuple[Table, ...]
    run: Table
    corpora: Table | None
    chunks: Table | None
    command: str


def content_of(results: Results) -> Content:
    """Everything that a report says in words and tables."""
    several = results.perplexities or results.recalls
    comparison = ([methods_table(results)] if several else []) + ([engines_table(results)] if results.speeds else [])
    only_served = results.chosen is None and bool(results.servings)
    comparison += serving_tables(results)
    return Content(
        title=f"KV cache compression of {results.run.model}",
        headline=headline(results),
        summary=() if only_served else (summary_table(results), *workload_tables(results)),
        comparison=tuple(comparison),
        budgets=tuple(_budgets(results, record) for record in results.layers),
        run=_run(results),
        corpora=_corpora(results) if results.corpora else None,
        chunks=_chunks(results) if results.perplexities else None,
        command=results.run.command,
    )


def _run(results: Results) -> Table:
    run = results.run
    facts = {
        "Model": run.model,
        "Parameters": f"{run.model_parameters:,}",
        "Weights": "random" if run.weights_random else "pretrained",
        "Data type": run.dtype,
        "Device": run.device,
        "Started (UTC)": run.started_utc,
        **{f"{name} version": version for name, version in run.versions.items()},
        **{f"setting {name}": _words(value) for name, value in run.settings.items()},
        "Schema of the results": str(run.schema_version),
    }
    return Table("The run", ("What", "Value"), tuple((Cell(what), Cell(value)) for what, value in facts.items()))


def _words(value: object) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)


def _corpora(results: Results) -> Table:
    rows = []
    for corpus in results.corpora:
        chunks = sorted({len(row.chunk_nll) for row in results.perplexity_rows(corpus)})
        counts = (chunks[0] if len(chunks) == 1 else f"{chunks[0]}-{chunks[-1]}"), corpus.context_tokens
        cells = (corpus_label(results, corpus), *counts, corpus.target_tokens, corpus.sha256)
        rows.append(tuple(Cell(str(cell)) for cell in cells))
    columns = ("Corpus", "Chunks", "Context tokens", "Scored tokens", "SHA-256 of the text")
    return Table("The texts", columns, tuple(rows))


def _chunks(results: Results) -> Table:
    rows = [
        (
            Cell(corpus_label(results, corpus)),
            Cell(
                method_name(row.compression.method), "" if row.compression.method == FULL else row.compression.setting
            ),
            Cell(" ".join(f"{nll:.4f}" for nll in row.chunk_nll)),
        )
        for corpus in results.corpora
        for row in results.perplexity_rows(corpus)
    ]
    title = "Mean negative log likelihood of each chunk, nats per token, in the order of the text"
    return Table(title, ("Corpus", "Method", "Chunks"), tuple(rows))


def _budgets(results: Results, record: Layers) -> Table:
    rows = tuple(
        (Cell(str(layer)), Cell(str(tokens)), Cell(size(kv_bytes)), Cell(significant(_mean_kept(record, layer), 4)))
        for layer, (tokens, kv_bytes) in enumerate(zip(record.budget_tokens, record.kv_bytes, strict=True))
    )
    total = (
        Cell("all"),
        Cell(str(sum(record.budget_tokens))),
        Cell(size(sum(record.kv_bytes))),
        Cell(significant(sum(_mean_kept(record, layer) for layer in range(len(record.kept_positions))), 6)),
    )
    title = f"{layers_label(results, record)}: budget of each layer, prompt of {record.prompt_tokens} tokens"
    return Table(title, ("Layer", "Budget, tokens", "KV bytes", "Kept, tokens per KV head"), (*rows, total))


def _mean_kept(record: Layers, layer: int) -> float:
    heads = record.kept_positions[layer]
    return sum(len(head) for head in heads) / len(heads)
