"""`pyramidkv report`: tables, pictures and a page from a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyramidkv.cli.options import Force, Json


def report(
    results: Annotated[Path, typer.Argument(help="A results.jsonl of `pyramidkv bench`, or the folder that holds it.")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write. Default: beside the results.", metavar="DIR")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a report of a results file: result.png, report.md, report.html.

    Examples:

        pyramidkv report results/results.jsonl

        pyramidkv report results --out docs/report --force
    """
    from pyramidkv.cli.bench import show_report
    from pyramidkv.evaluate.schema import RESULTS

    if results.is_dir():
        results = results / RESULTS
    show_report(results, folder or results.parent, overwrite=force, as_json=as_json)
