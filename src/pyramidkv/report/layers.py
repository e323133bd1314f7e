"""`layers.png`: how many tokens each layer was given, and which positions of the prompt it kept."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pyramidkv.errors import DataError
from pyramidkv.evaluate.schema import Layers
from pyramidkv.report.methods import layers_label
from pyramidkv.report.panels import fit
from pyramidkv.report.results import Results
from pyramidkv.report.series import colour_of
from pyramidkv.report.style import RC, WIDTH, png

MOST = 8  # records in one figure; a caption says how many were left out
_BINS = 96
_ABOVE, _BELOW, _LEFT = 0.36, 0.56, 0.55  # inches around the axes
_BUDGETS, _GAP, _SCALE = 2.1, 0.25, 0.14  # inches: width of the bars, gap to the map, width of its colour scale


def layers_figure(results: Results) -> bytes | None:
    """The figure as a PNG, one row for each record; None where the file has no such records."""
    records = results.layers[:MOST]
    if not records:
        return None
    with matplotlib.rc_context(RC):
        return png(_figure(results, records))


def layers_caption(results: Results) -> str:
    """What the figure shows, and how many records it leaves out."""
    text = "Left: tokens that each layer may keep. Right: which positions it kept, as a share of its KV heads."
    left_out = len(results.layers) - MOST
    return f"{text} The first {MOST} of {len(results.layers)} records are drawn." if left_out > 0 else text


def kept_share(record: Layers, bins: int) -> NDArray[np.float64]:
    """`(layers, bins)`: in each stretch of the prompt, the share of (KV head, position) pairs that were kept."""
    edges = np.linspace(0, record.prompt_tokens, bins + 1).round()
    rows = []
    for layer, heads in enumerate(record.kept_positions):
        positions = np.concatenate([np.asarray(head, dtype=np.int64) for head in heads])
        if positions.size and not 0 <= positions.min() <= positions.max() < record.prompt_tokens:
            raise DataError(
                f"layers of {record.method!r}: layer {layer} kept a position outside 0..{record.prompt_tokens - 1}"
            )
        rows.append(np.histogram(positions, edges)[0] / (len(heads) * np.diff(edges)))
    return np.array(rows)


def _figure(results: Results, records: tuple[Layers, ...]) -> Figure:
    heights = [min(max(1.3, 0.06 * len(record.budget_tokens)), 3.0) for record in records]
    total = sum(heights) + len(records) * (_ABOVE + _BELOW)
    figure = Figure(figsize=(WIDTH, total))
    top = total
    left = _LEFT + _BUDGETS + _GAP
    width = WIDTH - left - _SCALE - 0.65
    for record, height in zip(records, heights, strict=True):
        bottom = (top - _ABOVE - height) / total
        bars = figure.add_axes((_LEFT / WIDTH, bottom, _BUDGETS / WIDTH, height / total))
        _draw_budgets(bars, record, layers_label(results, record), colour_of(results, record.method, record.setting))
        grid = figure.add_axes((left / WIDTH, bottom, width / WIDTH, height / total), sharey=bars)
        scale = figure.add_axes(((left + width + 0.1) / WIDTH, bottom, _SCALE / WIDTH, height / total))
        _draw_positions(grid, scale, record)
        top -= _ABOVE + height + _BELOW
    return figure


def _draw_budgets(axes: Axes, record: Layers, label: str, colour: str) -> None:
    axes.barh(range(len(record.budget_tokens)), record.budget_tokens, height=0.8, color=colour)
    axes.set_title(fit(label, _BUDGETS + 0.2))
    axes.set_xlabel("budget, tokens")
    axes.set_ylabel("layer (0: at the input)")
    axes.set_ylim(len(record.budget_tokens) - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_positions(axes: Axes, scale: Axes, record: Layers) -> None:
    shares = kept_share(record, min(_BINS, record.prompt_tokens))
    image = axes.imshow(
        100 * shares,
        # Below linear: the recent window is kept whole, and would leave everything else nearly white.
        norm=PowerNorm(0.6, vmin=0, vmax=100),
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
        extent=(0, record.prompt_tokens, len(shares) - 0.5, -0.5),
    )
    axes.set_title("kept, % of KV heads", fontweight="normal")
    axes.set_xlabel("position in the prompt")
    axes.tick_params(labelleft=False)
    axes.figure.colorbar(image, cax=scale, ticks=[0, 10, 25, 50, 100])
