"""`pyramidkv report`: tables, pictures and a page from results files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyramidkv.cli.options import Force, Json


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS",
            help="A results.jsonl of `pyramidkv bench`, or the folder that holds it; several of one model.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write. Default, for one file: beside it.", metavar="DIR"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a report of one results file, or of several as one: result.png, report.md, report.html.

    With the shape of what each layer kept, if it was measured, in layers.png.

    Examples:

        pyramidkv report results/results.jsonl

        pyramidkv report results --out docs/report --force

        pyramidkv report share-12/ share-25/ --out curves
    """
    from pyramidkv.cli.bench import show_report
    from pyramidkv.errors import ConfigError
    from pyramidkv.evaluate.schema import RESULTS

    if folder is None and len(results) > 1:
        raise ConfigError("--out: several results files are reported in a folder of their own; give --out DIR")
    paths = [path / RESULTS if path.is_dir() else path for path in results]
    show_report(paths, folder or paths[0].parent, overwrite=force, as_json=as_json)
