"""Errors name what was typed: what the library calls `keep=1.5` is `--keep 1.5` on the command line.

The library writes an argument as `name=`, with its value or without, wherever a message speaks of one; so a message can
be told here in the words of a command. What stands in quotes is the user's and stays as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from pyramidkv.errors import PyramidKVError

_names: ContextVar[Mapping[str, str]] = ContextVar("names", default=MappingProxyType({}))  # of an argument: as typed

_ARGUMENT = re.compile(
    r"""(?<!\w) (?: '[^']*' | "[^"]*" )  # quoted; an apostrophe follows a letter
      | (?<![\w./=-]) (?P<name>\w+) = (?P<switch>True\b)? (?P<value>(?=[^\s,;:)]))?""",
    re.VERBOSE,
)


def typed_names(command: Callable[..., None]) -> dict[str, str]:
    """What is typed for each parameter of a command, by the parameter's name and by the option's."""
    names = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for about in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(about, ArgumentInfo):
                names[name] = name.upper()
            elif isinstance(about, OptionInfo):
                # typer takes the first flag for a default, until it looks
                given = about.default, *(about.param_decls or ())
                flags = [flag for flag in given if isinstance(flag, str) and flag.startswith("--")]
                flag = flags[0] if flags else f"--{name.replace('_', '-')}"
                names |= {flag[2:].replace("-", "_"): flag, name: flag}
    return names


@contextmanager
def typed(names: Mapping[str, str]) -> Iterator[None]:
    """While open, errors of this package that pass through, and `as_typed`, speak of `names`."""
    token = _names.set(names)
    try:
        yield
    except PyramidKVError as error:
        error.args = (as_typed(str(error)),)
        raise
    finally:
        _names.reset(token)


def called(**others: str) -> Any:
    """`typed`, for a part of a command where the library has other names: `called(recall_context="context")`."""
    names = _names.get()
    return typed({**names, **{other: names[name] for other, name in others.items() if name in names}})


def as_typed(text: str) -> str:
    """A message of the library, in the words of the command that runs."""
    names = _names.get()

    def word(found: re.Match[str]) -> str:
        if found["name"] not in names:
            return found[0]
        value = found["value"] is not None and found["switch"] is None
        return names[found["name"]] + (" " if value else "")

    return _ARGUMENT.sub(word, text)
