"""The `pyramidkv` command. One module a command; each imports torch only when it runs, so that help comes at once."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pyramidkv.cli import naming, output
from pyramidkv.errors import CompressionWarning, PyramidKVError

_COMMANDS = ("bench", "recall", "calibrate", "plan", "generate", "report", "doctor")
_FAILED, _INTERRUPTED = 2, 130


class _Group(TyperGroup):
    """Turns the errors that users can do something about into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        show = warnings.showwarning

        def show_ours(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, CompressionWarning):
                output.warning(str(message))
            else:
                show(message, category, *rest, **more)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", CompressionWarning)
                warnings.showwarning = show_ours
                return super().invoke(ctx)
        except PyramidKVError as error:
            output.error(str(error))
            raise SystemExit(_FAILED) from error
        except KeyboardInterrupt as interrupt:
            output.note(f"interrupted: {interrupt}" if str(interrupt) else "interrupted; nothing was written")
            raise SystemExit(_INTERRUPTED) from interrupt


app = typer.Typer(
    cls=_Group,
    help="KV-cache compression for transformers: measure it, plan it, try it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog="Start with: pyramidkv doctor",
)


def _version(wanted: bool) -> None:
    if wanted:
        import pyramidkv

        typer.echo(f"pyramidkv {pyramidkv.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _with_torch(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with all of the package imported before it runs and nothing of it before; errors as it was typed."""
    names = naming.typed_names(command)

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        import_module("pyramidkv.public")
        with naming.typed(names):
            command(*arguments, **options)

    return run


for _name in _COMMANDS:
    app.command(_name)(_with_torch(getattr(import_module(f"pyramidkv.cli.{_name}"), _name)))


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character must not end a benchmark
    app()
