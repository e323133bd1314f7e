"""`result.png`: quality against KV bytes, memory, and speed. Panels without data are left out, never drawn empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyramidkv.evaluate.schema import Perplexity, Recall, Speed, Spread, accuracy_interval
from pyramidkv.report.methods import task_label
from pyramidkv.report.panels import Bar, Bars, Curve, Curves, Estimate, Intervals, Kind, Panel, Point, fit
from pyramidkv.report.results import (
    FULL,
    Corpus,
    Results,
    Task,
    Workload,
    fastest,
    full_row,
    full_rows,
    kv_share,
    kv_source,
    overlap,
)
from pyramidkv.report.series import Series, series_of
from pyramidkv.report.style import GREY, RC, WIDTH, png
from pyramidkv.report.summary import corpus_label, describe
from pyramidkv.report.text import enumeration, faster, method_name, percent, seconds, share, size

# Inches around the axes of a panel: its title, its ticks and axis label, and the gap to its neighbour.
_ABOVE, _BELOW, _BETWEEN = 0.36, 0.56, 0.14
_LEGEND = 0.27  # inches of one line of the legend
_LEGEND_COLUMNS = 4
_MOST_ABREAST = 5  # curves that can be told apart in panels of a third of the width
_Row = TypeVar("_Row", Perplexity, Recall)


def result_figure(results: Results) -> bytes | None:
    """The figure as a PNG; None where the file has nothing to draw."""
    rows = _rows(results)
    if not rows:
        return None
    with matplotlib.rc_context(RC):
        return png(_figure(results, rows))


def result_caption(results: Results) -> str:
    """What the figure shows, for readers who see it without the report."""
    parts = []
    if results.perplexities or results.recalls:
        parts.append(
            "Quality: error bars are 95% intervals, the full cache is dashed or a grey mark. Points of curves at equal "
            "KV bytes are drawn side by side."
        )
    if results.speeds:
        parts.append(
            f"Memory and times at {enumeration([describe(w) for w in results.workloads])}: medians with min-max; "
            "figures in brackets compare with the best engine of the full cache."
        )
    return " ".join(parts)


def _figure(results: Results, rows: Sequence[Sequence[Panel]]) -> Figure:
    """Placed by hand, in inches: panels of very different heights stay aligned, however many there are."""
    handles = _legend(results, rows)
    columns = _columns(handles)
    legend = _LEGEND * -(-len(handles) // columns) + 0.1 if handles else 0.0
    heights = [_ABOVE + max(panel.height for panel in row) + _BELOW for row in rows]
    total = legend + sum(heights)
    figure = Figure(figsize=(WIDTH, total))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    top = total - legend
    for row, height in zip(rows, heights, strict=True):
        span = WIDTH / max(len(row), 2)
        for place, panel in enumerate(row):
            corner = (place * span + panel.left, top - _ABOVE - panel.height)
            size_in = (span - panel.left - _BETWEEN, panel.height)
            axes = figure.add_axes((corner[0] / WIDTH, corner[1] / total, size_in[0] / WIDTH, size_in[1] / total))
            panel.draw(axes)
            axes.set_title(f"{next(letters, '')}  {axes.get_title(loc='left')}", x=(0.16 - panel.left) / size_in[0])
            if place and isinstance(panel, Curves):
                axes.set_ylabel("")  # the same as its neighbour's
        top -= height
    if handles:
        figure.legend(handles=handles, loc="upper center", ncols=columns, handlelength=2.2, columnspacing=1.4)
    return figure


def _legend(results: Results, rows: Sequence[Sequence[Panel]]) -> list[Line2D]:
    """One legend for all curves, or for the two marks of a recall panel; none where every line is labelled."""
    panels = [panel for row in rows for panel in row]
    full = Line2D([], [], color=GREY, linestyle=(0, (4, 3)), label=method_name(FULL))
    if any(isinstance(panel, Curves) for panel in panels):
        return [full, *(_handle(series) for series in series_of(results))]
    if any(isinstance(panel, Intervals) and len(panel.estimates) > len(panel.lines) for panel in panels):
        series = series_of(results)[0]
        return [
            Line2D(
                [], [], color=GREY, marker="|", markersize=12, markeredgewidth=3, linewidth=0, label=full.get_label()
            ),
            Line2D([], [], color=series.colour, marker="o", markersize=8, linewidth=2.2, label=series.name),
        ]
    return []


def _columns(handles: Sequence[Line2D]) -> int:
    """The most columns that their names fit in; a name that is too long for two is cut."""
    for columns in range(_LEGEND_COLUMNS, 1, -1):
        width = WIDTH / columns - 0.4  # of the line or the mark
        if all(fit(str(handle.get_label()), width) == handle.get_label() for handle in handles):
            return columns
    for handle in handles:
        handle.set_label(fit(str(handle.get_label()), width))
    return columns


def _handle(series: Series) -> Line2D:
    width = 2.4 if series.strong else 1.3
    return Line2D([], [], color=series.colour, marker=series.marker, linewidth=width, label=series.name)


def _rows(results: Results) -> list[list[Panel]]:
    """Rows of panels: perplexity, recall, memory, speed; two to a row, or three where there are three of a kind."""
    curves = series_of(results)
    if len(results.variants) == 1:
        groups = [[_all_perplexity(results, curves[0]), _all_recall(results, curves[0])]]
    else:
        groups = [
            [_perplexity_panel(results, corpus, curves) for corpus in results.corpora],
            [_recall_panel(results, task, curves) for task in results.tasks],
        ]
    groups += [[_kv_bars(results), _memory_bars(results)], [_ttft_bars(results), _tpot_bars(results)]]
    return [row for group in groups for row in _wrapped([panel for panel in group if panel])]


def _perplexity_panel(results: Results, corpus: Corpus, curves: Sequence[Series]) -> Panel | None:
    several = _several_amounts(results.perplexity_rows(corpus), curves)
    return (_perplexity_curves if several else _perplexity_lines)(results, corpus, curves)


def _recall_panel(results: Results, task: Task, curves: Sequence[Series]) -> Panel | None:
    several = _several_amounts(results.recall_rows(task), curves)
    return (_recall_curves if several else _recall_lines)(results, task, curves)


def _several_amounts(rows: Sequence[_Row], curves: Sequence[Series]) -> bool:
    """Whether any method has more than one point: points at equal bytes are easier to tell apart on labelled lines."""
    return any(sum(series.holds(row.compression) for row in rows) > 1 for series in curves)


def _wrapped(panels: Sequence[Panel]) -> list[list[Panel]]:
    crowded = any(isinstance(panel, Curves) and len(panel.curves) > _MOST_ABREAST for panel in panels)
    width = 3 if len(panels) % 3 == 0 and not crowded else 2
    return [list(panels[start : start + width]) for start in range(0, len(panels), width)]


def _perplexity_curves(results: Results, corpus: Corpus, all_series: Sequence[Series]) -> Panel | None:
    def point(row: Perplexity) -> Point | None:
        return _change_point(results, row)

    curves = _curves(results.perplexity_rows(corpus), all_series, point)
    title = f"{corpus_label(results, corpus)} perplexity"
    among = tuple(p for row in results.perplexities if row.compression.method != FULL and (p := point(row)))
    return Curves(title, "change, %", curves, 0.0, "change", among) if curves else None


def _recall_curves(results: Results, task: Task, all_series: Sequence[Series]) -> Panel | None:
    rows = results.recall_rows(task)
    full = full_row(rows)
    curves = _curves(rows, all_series, _accuracy_point)
    level = 100 * full.accuracy if full else None
    title = f"{task_label(results, task)} recall"
    return Curves(title, "exact match, %", curves, level, "accuracy") if curves else None


def _curves(
    rows: Sequence[_Row], all_series: Sequence[Series], point: Callable[[_Row], Point | None]
) -> tuple[Curve, ...]:
    curves = []
    for series in all_series:
        points = tuple(p for p in (point(row) for row in rows if series.holds(row.compression)) if p)
        if points:
            curves.append(Curve(series.name, series.colour, series.marker, points, series.strong))
    return tuple(curves)


def _change_point(results: Results, row: Perplexity) -> Point | None:
    change = results.change(row)
    if change is None:
        return None
    return Point(100 * kv_share(row.compression), 100 * change.value, 100 * change.low, 100 * change.high)


def _accuracy_point(row: Recall) -> Point:
    low, high = accuracy_interval(row)
    return Point(100 * kv_share(row.compression), 100 * row.accuracy, 100 * low, 100 * high)


def _all_perplexity(results: Results, series: Series) -> Panel | None:
    """Every corpus in one panel, for a run of one method at one setting."""
    estimates = [
        _change_estimate(corpus_label(results, corpus), point, series)
        for corpus in results.corpora
        for row in results.chosen_rows(results.perplexity_rows(corpus))
        if (point := _change_point(results, row))
    ]
    return _intervals("Perplexity", "change against the full cache, %", estimates, "change")


def _perplexity_lines(results: Results, corpus: Corpus, all_series: Sequence[Series]) -> Panel | None:
    """Every method on one corpus, for a run of several methods at one setting each."""
    rows = results.perplexity_rows(corpus)
    estimates = [
        _change_estimate(f"{series.name}, {share(kv_share(row.compression))} of KV", point, series)
        for series in all_series
        for row in rows
        if series.holds(row.compression) and (point := _change_point(results, row))
    ]
    title = f"{corpus_label(results, corpus)} perplexity"
    return _intervals(title, "change against the full cache, %", estimates, "change")


def _all_recall(results: Results, series: Series) -> Panel | None:
    """Every task in one panel, the full cache beside the method, for a run of one method at one setting."""
    estimates = []
    for task in results.tasks:
        rows = results.recall_rows(task)
        full, method = full_row(rows), next(iter(results.chosen_rows(rows)), None)
        line = f"{task_label(results, task)}: {_accuracies(method, full)}"
        if full:
            estimates.append(_full_estimate(line, full))
        if method:
            estimates.append(_accuracy_estimate(line, method, series))
    return _intervals("Recall", "exact match, %", estimates, "accuracy")


def _recall_lines(results: Results, task: Task, all_series: Sequence[Series]) -> Panel | None:
    """Every method on one task, for a run of several methods at one setting each."""
    rows = results.recall_rows(task)
    full = full_row(rows)
    of_all, of_each = _of_kv(rows, all_series)
    estimates = [_full_estimate(f"{method_name(FULL)}: {share(full.accuracy)}", full)] if full else []
    estimates += [
        _accuracy_estimate(f"{series.name}: {share(row.accuracy)}{of_each(row)}", row, series)
        for series in all_series
        for row in rows
        if series.holds(row.compression)
    ]
    return _intervals(f"{task_label(results, task)} recall{of_all}", "exact match, %", estimates, "accuracy")


def _of_kv(rows: Sequence[Recall], all_series: Sequence[Series]) -> tuple[str, Callable[[Recall], str]]:
    """The share of the KV bytes: for the title of a narrow panel if it is that of all lines, else for each line."""
    held = [row.compression for row in rows if any(series.holds(row.compression) for series in all_series)]
    shares = {share(kv_share(compression)) for compression in held}
    if len(shares) == 1:
        return f", {shares.pop()} of KV", lambda row: ""
    return "", lambda row: f", {share(kv_share(row.compression))} of KV"


def _accuracies(method: Recall | None, full: Recall | None) -> str:
    texts = [share(method.accuracy)] if method else []
    return ", ".join([*texts, f"full cache {share(full.accuracy)}"] if full else texts)


def _intervals(title: str, label: str, estimates: Sequence[Estimate], kind: Kind) -> Panel | None:
    return Intervals(title, label, tuple(estimates), kind) if estimates else None


def _change_estimate(line: str, point: Point, series: Series) -> Estimate:
    return Estimate(line, point.value, point.low, point.high, percent(point.value / 100), series.colour, "o")


def _accuracy_estimate(line: str, row: Recall, series: Series) -> Estimate:
    point = _accuracy_point(row)
    return Estimate(line, point.value, point.low, point.high, "", series.colour, "o")


def _full_estimate(line: str, row: Recall) -> Estimate:
    value = 100 * row.accuracy
    return Estimate(line, value, value, value, "", GREY, "|")


def _kv_bars(results: Results) -> Panel | None:
    """The full cache's KV bytes and the method's, on every workload; without speed rows, of the longest context."""
    bars: list[Bar] = []
    workloads: list[Workload | None] = [*results.workloads]
    for workload in workloads or [None]:
        method = fastest(results.chosen_rows(results.speed_rows(workload))) if workload else None
        compression, context = kv_source(results, method)
        if compression is None:
            continue
        where = _where(results, method) if method else f", {context}"
        full, kept = compression.full_kv_bytes, compression.kv_bytes
        bars.append(_bar(f"{method_name(FULL)}{where}", full / 1e6, size(full), GREY))
        text = f"{size(kept, full)} ({percent(kept / full - 1)})"
        bars.append(_bar(f"{method_name(compression.method)}{where}", kept / 1e6, text, _accent(results)))
    return _bars("KV cache memory", "GB" if _in_gb(bars) else "MB", bars, 1e3 if _in_gb(bars) else 1.0)


def _memory_bars(results: Results) -> Panel | None:
    bars = []
    for row, baseline in _compared(results, lambda row: row.max_memory_bytes or float("inf")):
        if row.max_memory_bytes is None:
            continue
        text = size(row.max_memory_bytes)
        if baseline and baseline.max_memory_bytes:
            text += f" ({percent(row.max_memory_bytes / baseline.max_memory_bytes - 1)})"
        bar = _bar(_engine(results, row), row.max_memory_bytes / 1e6, text, _colour(results, row))
        bars.append(dataclasses.replace(bar, base=min(row.weights_bytes, row.max_memory_bytes) / 1e6))
    unit = "GB" if _in_gb(bars) else "MB"
    return _bars("Max memory", f"{unit} (pale: weights)", bars, 1e3 if unit == "GB" else 1.0)


def _ttft_bars(results: Results) -> Panel | None:
    return _time_bars(results, "TTFT", "to the first token", lambda row: row.ttft_seconds)


def _tpot_bars(results: Results) -> Panel | None:
    return _time_bars(results, "TPOT", "per output token", lambda row: row.tpot_seconds, floor=True)


def _time_bars(
    results: Results, title: str, label: str, times: Callable[[Speed], Spread], *, floor: bool = False
) -> Panel | None:
    compared = _compared(results, lambda row: times(row).median)
    longest = max((times(row).median for row, _ in compared), default=0.0)
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    bars = []
    for row, baseline in compared:
        measured = times(row)
        text = seconds(measured.median, longest)
        if baseline and overlap(times(baseline), measured):
            text += " (spreads overlap)"
        elif baseline:
            text += f" ({faster(times(baseline).median, measured.median)})"
        low, value, high = (scale * t for t in (measured.low, measured.median, measured.high))
        theory = row.tpot_floor_seconds * scale if floor and row.tpot_floor_seconds else None
        bars.append(Bar(_engine(results, row), value, low, high, text, _colour(results, row), floor=theory))
    if any(bar.floor is not None for bar in bars):
        label += ", line: floor"
    return _bars(title, f"{unit} {label}", bars, 1.0)


def _compared(results: Results, key: Callable[[Speed], float]) -> list[tuple[Speed, Speed | None]]:
    """Every row of the full cache, then the method's, each of which is compared with the best of the full cache."""
    compared: list[tuple[Speed, Speed | None]] = []
    for workload in results.workloads:
        rows = results.speed_rows(workload)
        full = full_rows(rows)
        best = min(full, key=key, default=None)
        compared += [(row, None) for row in full]
        compared += [(row, best) for row in results.chosen_rows(rows)]
    return compared


def _engine(results: Results, row: Speed) -> str:
    """The engine, and for a compressed cache the method, by the name it has elsewhere in the figure."""
    name, method = row.engine.removeprefix("transformers "), row.compression.method
    if method != FULL:
        name = name.removeprefix("pyramidkv ").replace(method, method_name(method))
        name = name if method_name(method) in name else f"{method_name(method)}, {name}"
    return name + _where(results, row)


def _where(results: Results, row: Speed) -> str:
    """Batch and prompt length, where the run has several."""
    workloads = results.workloads
    words = [f"batch {row.batch}"] if len({w.batch for w in workloads}) > 1 else []
    words += [f"prompt {row.prompt_tokens}"] if len({w.prompt_tokens for w in workloads}) > 1 else []
    return "".join(f", {word}" for word in words)


def _colour(results: Results, row: Speed) -> str:
    return GREY if row.compression.method == FULL else _accent(results)


def _accent(results: Results) -> str:
    return series_of(results)[0].colour


def _bar(label: str, value: float, text: str, colour: str) -> Bar:
    return Bar(label, value, value, value, text, colour)


def _in_gb(bars: Sequence[Bar]) -> bool:
    return any(bar.value >= 1e3 for bar in bars)


def _bars(title: str, label: str, bars: Sequence[Bar], per: float) -> Panel | None:
    """A panel of bars, their lengths divided by `per`."""
    if not bars:
        return None
    scaled = [
        dataclasses.replace(b, value=b.value / per, low=b.low / per, high=b.high / per, base=b.base / per) for b in bars
    ]
    return Bars(title, label, tuple(scaled))
