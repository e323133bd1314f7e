"""`pyramidkv bench`: the report's table, measured."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramidkv.cli.naming import as_typed, called
from pyramidkv.cli.options import Device, Dtype, Force, Json, Model, compression_options, config_from
from pyramidkv.cli.output import calm_libraries, err, json_out, keeping, note, out, show_table, warn_beyond_positions

if TYPE_CHECKING:
    from pyramidkv.config import CompressionConfig
    from pyramidkv.evaluate.bench import Progress, Settings

_QUALITY, _SPEED = "Quality", "Speed"


@compression_options()
def bench(
    model: Model = "neox-16m",
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the results. Default: results/TIME.", metavar="DIR")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the results in --out; skip what is done.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="perplexity, recall, speed or serving; may be repeated. Default: the first three."),
    ] = None,
    ablations: Annotated[
        bool,
        typer.Option(help='Also measure every other method, and beta 1 and 2, at equal bytes. Default: "auto" alone.'),
    ] = False,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="python-reference, wikitext-2 or pg19; may be repeated. Default, without --text: the first, and the "
            "other two if the hub answers.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text of your own, as NAME=FILE_OR_FOLDER; may be repeated.", rich_help_panel=_QUALITY),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens compressed, of each chunk.", rich_help_panel=_QUALITY)] = 1536,
    target: Annotated[int, typer.Option(help="Tokens scored after them.", rich_help_panel=_QUALITY)] = 512,
    chunks: Annotated[int, typer.Option(help="Chunks of each corpus.", rich_help_panel=_QUALITY)] = 24,
    recall_context: Annotated[
        list[int] | None,
        typer.Option(help="Context of the recall tasks; may be repeated. Default: 2048.", rich_help_panel=_QUALITY),
    ] = None,
    recall_examples: Annotated[int, typer.Option(help="Examples of each recall task.", rich_help_panel=_QUALITY)] = 16,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.", rich_help_panel=_SPEED)] = 3840,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it.", rich_help_panel=_SPEED)] = 128,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows; may be repeated. Default: 1.", rich_help_panel=_SPEED)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds of all engines.", rich_help_panel=_SPEED)] = 5,
    requests: Annotated[
        int,
        typer.Option(help="Requests of serving, with up to --prompt and --new-tokens tokens.", rich_help_panel=_SPEED),
    ] = 16,
    memory: Annotated[
        str | None,
        typer.Option(
            help="KV bytes that serving may use at once. Default: a quarter of the full cache's of all requests.",
            metavar="SIZE",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **options: Any,
) -> None:
    """Measure perplexity, recall, time and memory against the full cache; write results.jsonl and a report.

    A run that was cut off goes on with --out DIR --resume.

    Examples:

        pyramidkv bench

        pyramidkv bench --model EleutherAI/pythia-2.8b --device cuda --prompt 6144

        pyramidkv bench --model random:pythia-2.8b --device cuda --prompt 6144 --batch 1 --batch 8

        torchrun --nproc-per-node 8 -m pyramidkv bench --metric perplexity --metric recall

        pyramidkv bench --metric serving --requests 32

        pyramidkv bench --text wikitext-2=wiki.test.txt --text pg19=books/ --ablations
    """
    import pyramidkv.report
    from pyramidkv.config import parse_bytes
    from pyramidkv.errors import ConfigError
    from pyramidkv.evaluate.bench import DEFAULT_METRICS, Settings, run
    from pyramidkv.evaluate.ranks import from_environment

    if resume and folder is None:
        raise ConfigError("--resume: give the folder to go on in, with --out DIR")
    config = config_from(options)
    settings = Settings(
        configs=(config,),
        model=model,
        device=device,
        dtype=dtype,
        metrics=tuple(metric or DEFAULT_METRICS),
        corpora=tuple(corpus or ()),
        text=tuple(text or ()),
        context=context,
        target=target,
        chunks=chunks,
        recall_context=tuple(recall_context or (2048,)),
        recall_examples=recall_examples,
        prompt=prompt,
        batch=tuple(batch or (1,)),
        new_tokens=new_tokens,
        repeats=repeats,
        requests=requests,
        memory=None if memory is None else parse_bytes("memory", memory),
    )
    settings.check()
    first = from_environment().first
    settings = replace(settings, configs=(config, *_that_fit(settings, _others(config, ablations), shown=first)))
    pyramidkv.report.require_packages()
    where = folder or Path("results") / datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S")
    calm_libraries()
    if first:
        warn_of_positions(settings)
    with (
        keeping(lambda: f"finished measurements are in {where}; go on with: --out {where} --resume"),
        progress(shown=first) as show,
        called(tokens="recall_context"),
    ):
        results = run(settings, where, resume=resume, force=force, progress=show)
    if not first:
        return  # of several processes that share a measurement, the first writes and prints
    show_report([results], where, overwrite=resume or force, as_json=as_json)


def warn_of_positions(settings: Settings) -> None:
    """Warn where quality would be measured behind the positions that the model was made for."""
    from pyramidkv.models.source import load_config

    lengths = {"context= and target=": settings.context + settings.target} if "perplexity" in settings.metrics else {}
    if "recall" in settings.metrics:
        lengths["recall_context="] = max(settings.recall_context)
    config = load_config(settings.model)
    for name, tokens in lengths.items():
        warn_beyond_positions(config, f"{name}: {tokens} tokens", tokens)


def _others(config: CompressionConfig, ablations: bool) -> list[CompressionConfig]:
    """What to measure beside `config`, at equal bytes: the preset "auto"; for ablations every method and the slopes."""
    from pyramidkv.config import CompressionConfig
    from pyramidkv.methods import METHODS

    others = []
    for name in METHODS if ablations else ("auto",):
        if name in ("full", config.method):
            continue
        amount = config.amount
        if METHODS[name].bits != config.bits and "keep" in amount:  # a share of the bytes, not of the tokens
            amount = {"share": amount["keep"]}
        if "budget" in amount and METHODS[name].bits != config.bits:
            continue  # equal tokens are not equal bytes
        others.append(CompressionConfig(method=name, recent=config.recent, **amount))
    if ablations and config.method == "pyramidkv":
        others += [replace(config, beta=beta) for beta in (1.0, 2.0) if beta != config.beta]
    return others


def _that_fit(settings: Settings, others: list[CompressionConfig], *, shown: bool) -> Iterator[CompressionConfig]:
    """The companions that these lengths can be measured with; a line for each of the others."""
    from pyramidkv.errors import ConfigError

    for other in others:
        try:
            replace(settings, configs=(*settings.configs, other)).check()
        except ConfigError as error:
            if shown:
                err.print(as_typed(f"not measured beside it: {other.method} ({error})"), markup=False, soft_wrap=True)
        else:
            yield other


@contextmanager
def progress(*, shown: bool = True) -> Iterator[Progress]:
    """A bar a job, on stderr; where nobody looks through a window, a line as a job begins and one as it ends."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=err, transient=False, disable=not shown)
    jobs: dict[str, Any] = {}

    def say(job: str, done: int, total: int) -> None:
        if shown and (job not in jobs or done == total):
            note(f"{job}: {done}/{total} done")
        jobs[job] = None

    if not err.is_terminal:
        yield say
        return

    def show(job: str, done: int, total: int) -> None:
        if not jobs:
            bars.start()  # not before: without a bar it would leave an empty line
        if job not in jobs:
            jobs[job] = bars.add_task(job, total=total)
        bars.update(jobs[job], completed=done)

    try:
        yield show
    finally:
        if jobs:
            bars.stop()


def show_report(results: Sequence[Path], folder: Path, *, overwrite: bool, as_json: bool) -> None:
    """Write the report beside the results and print its tables."""
    import pyramidkv.report
    from pyramidkv.report import Results, headline, methods_table, serving_tables, summary_table

    read = Results.from_files(*results)
    written = pyramidkv.report.write(results, folder, force=overwrite)
    if as_json:
        json_out({"headline": headline(read), "files": [str(path) for path in (*results, *written)]})
        return
    if read.chosen is not None or not read.servings:
        show_table(summary_table(read))
    if len(read.variants) > 1:
        show_table(methods_table(read))
    for table in serving_tables(read):
        show_table(table)
    out.print(headline(read), markup=False, soft_wrap=not out.is_terminal)
    for path in results:
        out.print(f"results: {path}", markup=False, soft_wrap=True)
    for path in written:
        out.print(f"wrote {path}", markup=False, soft_wrap=True)
