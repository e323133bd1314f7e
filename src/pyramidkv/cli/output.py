"""What a command prints: results to stdout, everything else to stderr. Nothing here computes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from pyramidkv.cli.naming import as_typed

if TYPE_CHECKING:
    from pyramidkv.report.table import Table

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


WIDE = 160  # characters a line where nobody looks through a window: in a file, in a pipe


def show_table(table: Table) -> None:
    """A table on stdout, in the width of the terminal."""
    width = out.width if out.is_terminal or "COLUMNS" in os.environ else WIDE
    Console(highlight=False, width=width).print(table.rich(width))  # `out` prints nothing wider than itself


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line about what was kept."""


@contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """While open, Ctrl-C ends the command with the line that `what()` returns, such as where the results so far are."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(what()) from None


def json_out(value: Any) -> None:
    """A result for another program, on stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A line about what is going on, on stderr."""
    err.print(Text(text, style="dim"), soft_wrap=True)


def warning(text: str) -> None:
    """A line about what may be wrong, on stderr."""
    _labelled("warning", "yellow", text)


def warn_beyond_positions(model_config: Any, what: str, tokens: int) -> None:
    """Warn where `what` takes a model beyond the positions that it was made for."""
    most = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", tokens)
    if tokens > most:
        warning(f"{what}: more than the model's {most} positions; what it says behind them may be nonsense")


def error(text: str) -> None:
    """The one line that a failed command ends with, on stderr."""
    _labelled("error", "red", text)


def _labelled(label: str, colour: str, text: str) -> None:
    line = " ".join(as_typed(text).split())
    err.print(Text.assemble((f"{label}:", f"bold {colour}"), (f" {line}", colour)), soft_wrap=True)


def calm_libraries() -> None:
    """Keep transformers' progress bars and advice off the terminal; its errors still come through as ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
