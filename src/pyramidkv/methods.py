"""The table of methods: a name, a scorer, a layer schedule, and the method's own settings. `scorers.py` fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

# A subclass of `scorers.Scorer`, which this table need not know.
ScorerClass = TypeVar("ScorerClass", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A scorer and the layer schedule it goes with; `scorer` is None for the full cache."""

    name: str
    schedule: str
    scorer: Callable[..., Any] | None
    summary: str
    # Its own values of settings that a user may leave out; see `CompressionConfig`.
    window: int = 32
    recent: int | None = None  # None: as many as `window`
    kernel: int = 5
    bits: int = 16
    heads: str = "uniform"


METHODS: dict[str, Method] = {"full": Method("full", "uniform", None, "keep everything: the baseline")}


def register(
    name: str, *, schedule: str = "uniform", summary: str = "", **settings: Any
) -> Callable[[ScorerClass], ScorerClass]:
    """Make a scorer available as `method=name`, with layer budgets by `schedule` ("uniform" or "pyramid").

    `summary` is one line for lists of methods; without it, the first line of the scorer's docstring. `settings` are the
    method's own values of `window`, `recent`, `kernel`, `bits` and `heads`, where they differ from the usual.
    """

    def add(scorer: ScorerClass) -> ScorerClass:
        line = summary or (scorer.__doc__ or "").strip().split("\n")[0]
        METHODS[name] = Method(name, schedule, scorer, line, **settings)
        return scorer

    return add


def methods() -> dict[str, str]:
    """Every method's name and what it does, in one line each."""
    return {name: method.summary for name, method in METHODS.items()}
