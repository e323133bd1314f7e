"""The kinds of panel that a figure is made of: curves over KV bytes, intervals side by side, bars. No records here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pyramidkv.report.style import GREY, INK

_EQUAL = 0.05  # shares of the bytes that differ by less are drawn side by side
_BESIDE, _SPREAD = 0.07, 0.21  # inches between two such points; most from the first to the last, of the axes
_BAR = 0.46  # inches of one bar and the label above it
_CHARACTER = 0.088  # inches of a character of 10 pt bold type, on the generous side
_TICK = 0.42  # of a tick's label on an axis from left to right, such as "+1000"
_WIDE = 12.0  # largest over smallest change from which a linear axis would hide the small ones


Kind = Literal["change", "accuracy"]


@dataclass(frozen=True)
class Point:
    """A value in percent at a KV share in percent, and its interval; an interval without a bound is not drawn."""

    share: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One method over its KV shares."""

    name: str
    colour: str
    marker: str
    points: tuple[Point, ...]
    strong: bool


@dataclass(frozen=True)
class Curves:
    """Values over KV bytes share, one curve for each method, with the full cache as a line across."""

    title: str
    label: str
    curves: tuple[Curve, ...]
    full: float | None
    kind: Kind
    among: tuple[Point, ...] = ()  # points of its neighbours, whose scale it shares

    left: ClassVar[float] = 0.82  # inches to the left of the axes: its ticks and label

    @property
    def height(self) -> float:
        """Inches of the axes."""
        return 2.1 if self.kind == "change" else 1.8

    def draw(self, axes: Axes) -> None:
        axes.set_title(fit(self.title, _inches(axes) + self.left - 0.3))
        axes.set_ylabel(self.label)
        axes.yaxis.set_label_coords((0.24 - self.left) / _inches(axes), 0.5)  # clear of the longest tick, "+1000"
        axes.set_xlabel("KV bytes, % of full")
        axes.grid(True, axis="y")
        if self.full is not None:
            axes.axhline(self.full, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        every = [point for curve in self.curves for point in curve.points]
        _share_axis(axes, [point.share for point in every])
        for curve in self.curves:
            points = sorted(curve.points, key=lambda point: point.share)
            self._draw_curve(axes, curve, points, [_right(axes, p.share, self._shift(axes, curve, p)) for p in points])
        if self.kind == "accuracy":
            axes.set_ylim(-4, 104)
            axes.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
        else:
            _change_axis(axes, [*every, *self.among], "y")
            if axes.get_yscale() == "linear":
                low, high = _bounds([*every, *self.among])
                margin = 0.05 * (high - low or 1.0)
                axes.set_ylim(low - margin, high + margin)

    def _shift(self, axes: Axes, curve: Curve, point: Point) -> float:
        """Inches to the right, or left, of a point: at equal bytes, intervals would hide one another."""
        beside = [c for c in self.curves if any(abs(p.share - point.share) < _EQUAL * point.share for p in c.points)]
        step = min(_BESIDE, _SPREAD * _inches(axes) / len(beside))
        return step * (beside.index(curve) - (len(beside) - 1) / 2)

    @staticmethod
    def _draw_curve(axes: Axes, curve: Curve, points: Sequence[Point], at: Sequence[float]) -> None:
        axes.errorbar(
            at,
            [point.value for point in points],
            yerr=_errors(points),
            color=curve.colour,
            marker=curve.marker,
            markersize=6.5 if curve.strong else 5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=2.4 if curve.strong else 1.3,
            elinewidth=1.0,
            zorder=4 if curve.strong else 3,
        )


@dataclass(frozen=True)
class Estimate:
    """One value in percent with its interval, under the label of its line."""

    line: str
    value: float
    low: float
    high: float
    text: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Intervals:
    """Estimates with their intervals on lines below one another: what is drawn when there is one setting only."""

    title: str
    label: str
    estimates: tuple[Estimate, ...]
    kind: Kind

    left: ClassVar[float] = 0.16

    @property
    def lines(self) -> list[str]:
        return list(dict.fromkeys(estimate.line for estimate in self.estimates))

    @property
    def height(self) -> float:
        """Inches of the axes."""
        return (_BAR + 0.02) * len(self.lines)

    def draw(self, axes: Axes) -> None:
        axes.set_title(fit(self.title, _inches(axes) + self.left - 0.3))
        axes.set_xlabel(self.label)
        axes.grid(True, axis="x")
        lines = self.lines
        for estimate in self.estimates:
            self._draw_estimate(axes, estimate, len(lines) - 1 - lines.index(estimate.line))
        for index, line in enumerate(alike(lines, 1.15 * _inches(axes))):  # not bold: narrower
            _label_above(axes, line, len(lines) - 1 - index)
        axes.set_ylim(-0.42, len(lines) - 0.36)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        if self.kind == "accuracy":
            axes.set_xlim(0, 104)
            axes.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
            return
        axes.axvline(0, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        _change_axis(axes, self.estimates, "x")
        if axes.get_xscale() == "linear":
            low, high = _bounds(self.estimates)
            span = high - low or 1.0
            axes.set_xlim(low - 0.04 * span, high + 0.32 * span)

    def _draw_estimate(self, axes: Axes, estimate: Estimate, at: float) -> None:
        axes.errorbar(
            [estimate.value],
            [at],
            xerr=_errors([estimate]),
            color=estimate.colour,
            marker=estimate.marker,
            markersize=14 if estimate.marker == "|" else 8,
            markeredgewidth=3 if estimate.marker == "|" else 0,
            elinewidth=2.2,
            zorder=2 if estimate.marker == "|" else 3,
        )
        if estimate.text:
            right = estimate.high if math.isfinite(estimate.high) else estimate.value
            axes.annotate(
                estimate.text, (right, at), (7, 0), textcoords="offset points", va="center", fontweight="bold"
            )


@dataclass(frozen=True)
class Bar:
    """One bar: its label, how long it is, the spread of the repeats, and where theory says it could end."""

    label: str
    value: float
    low: float
    high: float
    text: str
    colour: str
    base: float = 0.0  # the part of the bar that is drawn pale: weights, which compression cannot touch
    floor: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars below one another with their names above them and their values beside them."""

    title: str
    label: str
    bars: tuple[Bar, ...]

    left: ClassVar[float] = 0.16

    @property
    def height(self) -> float:
        """Inches of the axes."""
        return _BAR * len(self.bars)

    def draw(self, axes: Axes) -> None:
        axes.set_title(fit(self.title, _inches(axes) + self.left - 0.3))
        axes.set_xlabel(self.label)
        longest = max(bar.high for bar in self.bars)
        width = _inches(axes)
        # The axis ends where the bar and the text beside it fit, for the bar that asks for most.
        room = [bar.high * width / max(width - _CHARACTER * (len(bar.text) + 1), 0.3 * width) for bar in self.bars]
        for index, bar in enumerate(self.bars):
            self._draw_bar(axes, bar, len(self.bars) - 1 - index, longest)
        axes.set_xlim(0, max(longest, *room) or 1.0)
        axes.set_ylim(-0.32, len(self.bars) - 0.32)
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))

    @staticmethod
    def _draw_bar(axes: Axes, bar: Bar, at: float, longest: float) -> None:
        axes.barh(at, bar.value - bar.base, left=bar.base, height=0.42, color=bar.colour, zorder=2)
        if bar.base:
            axes.barh(at, bar.base, height=0.42, color=bar.colour, alpha=0.35, linewidth=0, zorder=2)
        if bar.high > bar.low:
            axes.errorbar(
                [bar.value], [at], xerr=[[bar.value - bar.low], [bar.high - bar.value]], color=INK, elinewidth=1.4
            )
        if bar.floor is not None:
            axes.plot([bar.floor] * 2, [at - 0.23, at + 0.23], color=INK, linewidth=2.4, zorder=4)
        axes.text(bar.high + 0.02 * longest, at, bar.text, va="center", fontweight="bold")
        _label_above(axes, bar.label, at)


Panel = Curves | Intervals | Bars


def fit(text: str, inches: float) -> str:
    """The text, cut where it would run out of its panel."""
    most = max(8, int(inches / _CHARACTER))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def alike(lines: Sequence[str], inches: float) -> Sequence[str]:
    """The lines; where one is too long, all without what follows their last comma: none says more than the others."""
    if all(fit(line, inches) == line for line in lines):
        return lines
    return [line.rpartition(", ")[0] or line for line in lines]


def _shorter(text: str, inches: float) -> str:
    """The text; where it is too long, without what follows its last comma; or cut."""
    short = text.rpartition(", ")[0]
    return short if short and fit(text, inches) != text and fit(short, inches) == short else fit(text, inches)


def _inches(axes: Axes) -> float:
    return float(axes.bbox.width / axes.figure.dpi)


def _right(axes: Axes, share: float, inches: float) -> float:
    """The share that lies so many inches to the right, on an axis that has its limits."""
    x, y = axes.transData.transform((share, axes.get_ylim()[1]))
    return float(axes.transData.inverted().transform((x + inches * axes.figure.dpi, y))[0])


def _label_above(axes: Axes, text: str, at: float) -> None:
    axes.annotate(
        _shorter(text, 1.15 * _inches(axes)),  # not bold: narrower
        (0, at + 0.23),
        xycoords=axes.get_yaxis_transform(),
        va="bottom",
        fontsize=9.5,
        annotation_clip=False,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=5,
    )


def _bounds(points: Sequence[Point | Estimate]) -> tuple[float, float]:
    """From the lowest to the highest that is drawn, no change included."""
    drawn = [0.0, *(b for p in points for b in (p.value, p.low, p.high) if math.isfinite(b))]
    return min(drawn), max(drawn)


def _errors(points: Sequence[Point | Estimate]) -> list[list[float]]:
    """Distances to both bounds; an infinite interval (one chunk) has no bar."""
    finite = [math.isfinite(point.high) for point in points]
    below = [max(0.0, p.value - p.low) if ok else 0.0 for p, ok in zip(points, finite, strict=True)]
    above = [max(0.0, p.high - p.value) if ok else 0.0 for p, ok in zip(points, finite, strict=True)]
    return [below, above]


def _share_axis(axes: Axes, shares: Sequence[float]) -> None:
    low, high = min(shares), max(shares)
    if high < 1.8 * low:
        margin = max(0.15 * high, 1.0)
        axes.set_xlim(max(0.0, low - margin), high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.18, high * 1.18)
    halves = [100 / 2**k for k in range(12)]
    axes.xaxis.set_major_locator(FixedLocator([h for h in halves if low / 1.15 <= h <= high * 1.15]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))


def _decades(low: float, high: float, most: float) -> list[float]:
    """Ticks of a symmetric logarithm: 0, 1, 3, 10, 30, ...; fewer where more than `most` would be seen."""
    seen: list[float] = []
    for steps, every in (((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        sizes = [step * 10.0**k for k in range(0, 8, every) for step in steps]
        seen = [tick for tick in (0.0, *sizes, *(-size for size in sizes)) if low <= tick <= high]
        if len(seen) <= most:
            break
    return sorted(seen)


def _change_axis(axes: Axes, points: Sequence[Point | Estimate], which: Literal["x", "y"]) -> None:
    """A linear axis with signed ticks, or a symmetric logarithm where the changes span more than a decade or so."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    sizes = [abs(point.value) for point in points if point.value]
    if sizes and max(sizes) > _WIDE * max(min(sizes), 1.0):
        # Linear within 1%, where noise lives; decades beyond.
        scale, limit = (axes.set_xscale, axes.set_xlim) if which == "x" else (axes.set_yscale, axes.set_ylim)
        scale("symlog", linthresh=1.0, linscale=0.5)
        axis.set_minor_locator(NullLocator())
        highest = max(max(point.value, point.high if math.isfinite(point.high) else 0.0) for point in points)
        lowest = min(min(point.value, point.low if math.isfinite(point.high) else 0.0) for point in points)
        ends = min(-0.3, lowest * (1.4 if lowest < 0 else 0.0)), highest * (1.4 if which == "y" else 4.0)
        limit(*ends)
        most = _inches(axes) / _TICK if which == "x" else math.inf  # beside one another, labels soon overlap
        axis.set_major_locator(FixedLocator(_decades(*ends, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
