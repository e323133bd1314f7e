"""How every figure looks: sizes, fonts, a palette that colour-blind readers can tell apart, and the PNG it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.2  # inches: a page's text width; the type is large enough to be read at half of it
DPI = 300
INK, GREY = "#222222", "#6e6e6e"

# Okabe and Ito's palette without black (the text) and yellow (too light on white), and darker ones for length: as many
# as `bench --ablations` measures.
_PALETTE = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
    "#5B3A8E", "#7A5230", "#8F8F1E", "#1F5F6F", "#9E1B4B",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # no factor in common with the colours, so that the pairs repeat late

RC: Any = {  # matplotlib types its keys one by one
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name, in order: the first stands out; a print without colour can be read."""
    return {name: (_PALETTE[i % len(_PALETTE)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def png(figure: Figure) -> bytes:
    """The figure as a PNG of print resolution."""
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
