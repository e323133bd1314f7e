"""Reports of results files: tables, pictures, Markdown and one self-contained page. Nothing here measures.

The tables need no optional package, so that a terminal can show them; `write` needs those of `pyramidkv[report]`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from pyramidkv.errors import ConfigError
from pyramidkv.report.headline import headline
from pyramidkv.report.methods import engines_table, methods_table
from pyramidkv.report.results import Results
from pyramidkv.report.serving import serving_tables
from pyramidkv.report.summary import summary_table, workload_tables
from pyramidkv.report.table import Cell, Table

__all__ = [
    "Cell",
    "Results",
    "Table",
    "engines_table",
    "headline",
    "methods_table",
    "require_packages",
    "serving_tables",
    "summary_table",
    "workload_tables",
    "write",
]

_RESULT, _LAYERS, _MARKDOWN, _PAGE = "result.png", "layers.png", "report.md", "report.html"


def write(results: Path | Sequence[Path], out: Path, *, force: bool = False) -> list[Path]:
    """Write `result.png`, `report.md` and `report.html`, and `layers.png` where layers were recorded, into `out`.

    `results` is a results file, or several of one model that are reported as one.

    Nothing is written before all of it has been made. Raises `ConfigError` if a file is already there and `force` is
    not given, if `out` cannot be written, or if a package is missing; `DataError` if `results` cannot be read
    or combined.
    """
    require_packages()
    _refuse_overwrite(out, force)
    made = _make(Results.from_files(*([results] if isinstance(results, Path) else results)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in {_RESULT, _LAYERS} - made.keys():
            (out / name).unlink(missing_ok=True)  # with force: a picture of an earlier run beside this run's report
        for name, data in made.items():
            part = out / f".{name}.part"
            part.write_bytes(data)
            os.replace(part, out / name)
    except OSError as error:
        raise ConfigError(f"out={str(out)!r}: {error.strerror}; give a folder that can be written") from error
    return [out / name for name in made]


def _make(results: Results) -> dict[str, bytes]:
    """The files by name, in the order in which `write` reports them."""
    # Imported late: these need matplotlib and jinja2, and the tables above must not.
    from pyramidkv.report.content import content_of
    from pyramidkv.report.layers import layers_caption, layers_figure
    from pyramidkv.report.markdown import markdown
    from pyramidkv.report.page import Picture, page
    from pyramidkv.report.plot import result_caption, result_figure

    drawn = (
        (_RESULT, result_figure(results), result_caption(results)),
        (_LAYERS, layers_figure(results), layers_caption(results)),
    )
    pictures = [Picture(name, png, caption) for name, png, caption in drawn if png is not None]
    content = content_of(results)
    text = markdown(content, [(picture.name, picture.caption) for picture in pictures])
    return {picture.name: picture.png for picture in pictures} | {
        _MARKDOWN: text.encode(),
        _PAGE: page(content, pictures).encode(),
    }


def require_packages() -> None:
    """Raise `ConfigError` if a package that `write` needs is missing; better before a long measurement than after."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"a report needs {' and '.join(missing)}: pip install 'pyramidkv[report]'")


def _refuse_overwrite(out: Path, force: bool) -> None:
    there = [out / name for name in (_RESULT, _LAYERS, _MARKDOWN, _PAGE) if (out / name).exists()]
    if there and not force:
        raise ConfigError(f"out={str(out)!r}: {str(there[0])!r} is already there; --force overwrites it")
