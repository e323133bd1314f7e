"""`pyramidkv recall`: long-range recall per method and budget."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pyramidkv.cli.bench import progress, warn_of_positions
from pyramidkv.cli.naming import called
from pyramidkv.cli.options import Device, Dtype, Json, Model, compression_options
from pyramidkv.cli.output import calm_libraries, json_out, keeping, out


@compression_options(
    "budget", "share", "bytes", "window", "recent", "kernel", "pooling", "heads", "beta", "layers", "sinks", "seed",
    "bits", "kv_dtype",
)  # fmt: skip
def recall(
    model: Model = "neox-16m",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="May be repeated. Default: every method.")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            "--keep",
            "-k",
            help="Share of the tokens kept; may be repeated. Default, without another amount: 0.5, 0.25, 0.125.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="kv, needle or tracking; may be repeated. Default: all three.")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated. Default: 2048.")] = None,
    examples: Annotated[int, typer.Option(help="Examples of each task and context.")] = 20,
    question_aware: Annotated[
        bool, typer.Option(help="Compress context and question together. Default: the question is not known.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also keep the results.jsonl in this folder.", metavar="DIR")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the results in --out; skip what is done.")
    ] = False,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **options: Any,
) -> None:
    """Ask for facts from a long context that was compressed before the question was known.

    The full cache is always measured beside the methods.

    Examples:

        pyramidkv recall

        pyramidkv recall --method pyramidkv --method snapkv --keep 0.25 --task kv --context 4096

        pyramidkv recall --method auto --share 0.125
    """
    from pyramidkv.config import CompressionConfig
    from pyramidkv.errors import ConfigError
    from pyramidkv.evaluate.bench import Settings, run
    from pyramidkv.evaluate.ranks import from_environment
    from pyramidkv.evaluate.tasks import TASKS
    from pyramidkv.methods import METHODS

    if resume and folder is None:
        raise ConfigError("--resume: give the folder to go on in, with --out DIR")
    chosen = method or [m for m in METHODS if m != "full"]
    if "full" in chosen:
        raise ConfigError("method='full': give methods that compress; the full cache is always measured beside them")
    if any(options[name] is not None for name in ("budget", "share", "bytes")):
        amounts: Sequence[float | None] = keep or [None]  # with --keep too, the config says that one amount is enough
    else:
        amounts = keep or [0.5, 0.25, 0.125]
    settings = Settings(
        configs=tuple(CompressionConfig.make(method=m, keep=k, **options) for k in amounts for m in chosen),
        model=model,
        device=device,
        dtype=dtype,
        metrics=("recall",),
        tasks=tuple(task or TASKS),
        recall_context=tuple(context or (2048,)),
        recall_examples=examples,
        question_aware=question_aware,
    )
    ours = {"recall_context": "context", "recall_examples": "examples", "tokens": "context"}
    with called(**ours):
        settings.check()
    first = from_environment().first
    calm_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        where = folder or Path(scratch)
        kept = f"finished measurements are in {folder}" if folder else "nothing was kept; --out DIR would have"
        with keeping(lambda: kept), progress(shown=first) as show, called(**ours):
            if first:
                warn_of_positions(settings)
            results = run(settings, where, resume=resume, progress=show)
        if first:
            _show(results, as_json)


def _show(results: Path, as_json: bool) -> None:
    from rich.table import Table

    from pyramidkv.evaluate import schema

    rows = schema.pick(schema.read(results), schema.Recall)
    columns = list(dict.fromkeys((r.task, r.context_tokens) for r in rows))
    methods = list(dict.fromkeys((r.compression.method, r.compression.setting) for r in rows))
    cells = {(r.compression.method, r.compression.setting, r.task, r.context_tokens): r for r in rows}
    if as_json:
        json_out(
            [
                {
                    "task": r.task,
                    "context_tokens": r.context_tokens,
                    "method": r.compression.method,
                    "setting": r.compression.setting,
                    "kv_bytes_share": r.compression.kv_bytes / r.compression.full_kv_bytes,
                    "question_aware": r.question_aware,
                    "accuracy": r.accuracy,
                    "accuracy_interval_95": schema.accuracy_interval(r),
                    "probes": sum(r.probes),
                }
                for r in rows
            ]
        )
        return
    table = Table(title="Recall: share of questions answered exactly, with 95% intervals")
    table.add_column("method")
    table.add_column("setting")
    table.add_column("KV bytes", justify="right")
    for task, length in columns:
        table.add_column(f"{task} {length}", justify="right")
    for method, setting in methods:
        found = [cells[method, setting, task, length] for task, length in columns]
        share = found[0].compression.kv_bytes / found[0].compression.full_kv_bytes
        shown = [
            f"{r.accuracy:.0%} [{low:.0%}, {high:.0%}]" for r in found for low, high in [schema.accuracy_interval(r)]
        ]
        table.add_row(method, setting, f"{share:.1%}", *shown)
    out.print(table)
