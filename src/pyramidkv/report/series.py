"""The curves of a figure: a method whose settings differ in the budget alone is one curve, otherwise it is several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyramidkv.evaluate.schema import Compression
from pyramidkv.report.results import Results, Variant
from pyramidkv.report.style import looks
from pyramidkv.report.text import method_name

_BUDGETS = ("keep=", "budget=", "share=", "bytes=")
_ALWAYS = ("bits=", "heads=")  # another kind of compression, not another detail of the same


@dataclass(frozen=True)
class Series:
    """The points that share a colour, a marker and a name in the legend."""

    name: str
    colour: str
    marker: str
    variants: tuple[Variant, ...]
    strong: bool  # the chosen method's, drawn to stand out

    def holds(self, compression: Compression) -> bool:
        return Variant(compression.method, compression.setting) in self.variants


def series_of(results: Results) -> tuple[Series, ...]:
    """Every curve, the chosen method's first, the others in the order of the file."""
    chosen = Variant(results.chosen.method, results.chosen.setting) if results.chosen else None
    variants = sorted(results.variants, key=lambda variant: variant != chosen)
    names = {variant: _name(variant, variants) for variant in variants}
    look = looks(list(dict.fromkeys(names.values())))
    return tuple(
        Series(
            name,
            *look[name],
            tuple(v for v in variants if names[v] == name),
            chosen is not None and names[chosen] == name,
        )
        for name in look
    )


def colour_of(results: Results, method: str, setting: str) -> str:
    """The colour of the curve of a method at a setting, or of its first; without one, the next that is free."""
    series = series_of(results)
    own = [s for s in series if any(v.method == method for v in s.variants)]
    own.sort(key=lambda s: Variant(method, setting) not in s.variants)
    return own[0].colour if own else looks([*(s.name for s in series), method])[method][0]


def _name(variant: Variant, variants: Sequence[Variant]) -> str:
    """The method, its bits and heads, and those words of its settings, but the budget, that are not in all."""
    own = [v.setting.split() for v in variants if v.method == variant.method]
    words = [word for word in variant.setting.split() if not word.startswith(_BUDGETS)]
    shown = [word for word in words if word.startswith(_ALWAYS) or not all(word in other for other in own)]
    return " ".join([method_name(variant.method), *shown])
