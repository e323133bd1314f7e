"""Options that commands share. Those of a compression come from `CompressionConfig`: its fields, docs and defaults."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from pyramidkv.config import CompressionConfig

DEFAULT_KEEP = 0.25  # when a command is given no amount at all

_AMOUNTS = ("keep", "budget", "share", "bytes")
_FLAGS = {"keep": ("--keep", "-k"), "budget": ("--budget", "-b")}
_ORDER = ("method", *_AMOUNTS)
_TYPES: dict[Any, Any] = {
    int | str | None: str | None,
    tuple[float | tuple[float, int], ...] | str | None: str | None,
}  # an option has one type; the config parses the text

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="neox-16m, random:SHAPE, a folder, a .gguf file or a hub id.", metavar="NAME"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16; auto is float32 on a CPU.", metavar="DTYPE")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for another program.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that are already there.")]


def compression_options(*names: str) -> Callable[[Command], Command]:
    """Give a command the options of a compression in place of its `**options`.

        @compression_options()                       # all of them
        @compression_options("window", "beta")       # or some: the command sets the others itself
        def command(model: Model, **options: Any) -> None:
            config = config_from(options)

    Args:
        names: fields of `CompressionConfig`; none for all.
    """
    help_of, types = _documented(), get_type_hints(CompressionConfig)
    fields = {f.name: f for f in dataclasses.fields(CompressionConfig)}
    chosen = [name for name in (*_ORDER, *(n for n in fields if n not in _ORDER)) if not names or name in names]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[
                    _TYPES.get(types[name], types[name]),
                    typer.Option(
                        *_FLAGS.get(name, (_flag(name),)),
                        help=help_of[name],
                        metavar=_metavar(name, fields[name].default),
                        rich_help_panel="What to keep" if name in _ORDER else "How to choose it",
                    ),
                ],
                default=fields[name].default,
            )
            for name in chosen
        ]

        @functools.wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            command(*arguments, **options)

        run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
        return run  # type: ignore[return-value]

    return decorate


def config_from(options: Mapping[str, Any], **more: Any) -> CompressionConfig:
    """The config of a command's options; `more` goes before them.

    With no amount among them, and a method that takes one, `keep` is `DEFAULT_KEEP`. Raises `ConfigError`.
    """
    given = {name: value for name, value in {**options, **more}.items() if value is not None}
    if given.get("method") != "full" and not any(name in given for name in _AMOUNTS):
        given["keep"] = DEFAULT_KEEP
    return CompressionConfig.make(**given)


def _documented() -> dict[str, str]:
    """The help of every field: its line in the docstring of `CompressionConfig`, the one place where it is written."""
    arguments = inspect.cleandoc(CompressionConfig.__doc__ or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", arguments, flags=re.MULTILINE)
    help_of = {name: " ".join(text.split()) for name, text in entries}
    help_of = {name: text[0].upper() + text[1:] for name, text in help_of.items()}
    for name in help_of:
        help_of[name] = re.sub(r"`(\w+)`", lambda found: _flag(found[1]), help_of[name])
    help_of["method"] = help_of["method"].replace("`pyramidkv.methods()`", "`pyramidkv doctor`")
    help_of["layers"] = help_of["layers"].replace("`pyramidkv.calibrate`", "`pyramidkv calibrate`")
    help_of["keep"] += f" {DEFAULT_KEEP} if no amount is given."
    return help_of


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(name: str, default: Any) -> str:
    if name == "bytes":
        return "SIZE"
    if name == "layers":
        return "NUMBERS"
    if name in ("keep", "share") or isinstance(default, float):
        return "NUMBER"
    return "NAME" if isinstance(default, str) or name == "heads" else "N"
