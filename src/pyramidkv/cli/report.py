"""`pyramidkv report`: tables, pictures and a page from a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyramidkv.cli.options import Force, Json
from pyramidkv.cli.output import json_out, out


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
    import pyramidkv.report
    from pyramidkv.report import Results, headline, summary_table

    if results.is_dir():
        results = results / "results.jsonl"
    read = Results.from_file(results)
    paths = pyramidkv.report.write(results, folder or results.parent, force=force)
    if as_json:
        json_out({"headline": headline(read), "files": [str(path) for path in paths]})
        return
    out.print(summary_table(read).rich())
    out.print(headline(read), markup=False)
    for path in paths:
        out.print(f"wrote {path}", markup=False, soft_wrap=True)
