"""Whether objects are the very ones that were seen before: what is captured in a graph serves those alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any


def remember(objects: Iterable[Any]) -> list[weakref.ref[Any]]:
    """References that keep nothing alive; what is gone is never the same again, whatever lies there."""
    return [weakref.ref(x) for x in objects]


def same(known: Sequence[weakref.ref[Any]], now: Sequence[object]) -> bool:
    """Whether these are what was remembered, in that order."""
    return len(known) == len(now) and all(ref() is x for ref, x in zip(known, now, strict=True))
