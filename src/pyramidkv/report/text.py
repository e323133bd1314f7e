"""Numbers as text: bytes, times, shares and changes, always with their unit and an honest sign. No records here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyramidkv.evaluate.schema import Change, Spread

_NAMES = {
    "full": "Full cache",
    "auto": "auto (4 bits)",
    "h2o": "H2O",
    "knorm": "Key norm",
    "pyramidkv": "PyramidKV",
    "random": "Random",
    "rms": "RMS window",
    "snapkv": "SnapKV",
    "streamingllm": "StreamingLLM",
}


def method_name(method: str) -> str:
    """The name of a method as papers print it; a method not known here keeps its own."""
    return _NAMES.get(method, method)


def task_name(task: str) -> str:
    """The name of a recall task in words; a task not known here keeps its own."""
    return {"kv": "key-value"}.get(task, task)


def size(n: float, unit_of: float | None = None) -> str:
    """Decimal GB or MB, three significant digits; `unit_of` lets two sizes that are compared share a unit."""
    unit, scale = ("GB", 1e9) if (n if unit_of is None else unit_of) >= 1e9 else ("MB", 1e6)
    return f"{significant(n / scale)} {unit}"


def significant(x: float, digits: int = 3) -> str:
    """`x` with so many significant digits, never in exponent form."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    # Round first: 9.996 is 10.0, not 10.00.
    rounded = float(f"{x:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def share(fraction: float) -> str:
    """A part of a whole: 0.2534 is "25.3%"."""
    return f"{100 * fraction:.1f}%"


def shares(fractions: Sequence[float]) -> str:
    """The range of several parts of a whole; one number where they agree as printed."""
    low, high = share(min(fractions)), share(max(fractions))
    return low if low == high else f"{low[:-1]}-{high}"


def percent(fraction: float) -> str:
    """A signed change: 0.084 is "+8.4%"; two decimals below 1%, so that a small loss does not read as none."""
    return f"{_signed(fraction)}%"


def faster(before: float, after: float) -> str:
    """How one time compares with an earlier: a factor where it is much shorter, a percentage where it is not."""
    ratio = before / after
    return f"x{significant(ratio, 2)} faster" if ratio >= 1.05 else percent(1 / ratio - 1)


def interval(change: Change) -> str:
    """A change with its 95% interval: "+8.4% [+7.1, +9.8]"."""
    return f"{percent(change.value)} {bounds(change)}"


def bounds(change: Change) -> str:
    """The 95% interval alone; a single chunk has none."""
    if not math.isfinite(change.high):
        return "[one chunk, no interval]"
    return f"[{_signed(change.low)}, {_signed(change.high)}]"


def _signed(fraction: float) -> str:
    value = 100 * fraction
    text = f"{value:+.2f}" if abs(value) < 0.995 else f"{value:+.0f}" if abs(value) >= 199.5 else f"{value:+.1f}"
    return "+0.00" if text == "-0.00" else text


def seconds(value: float, unit_of: float | None = None) -> str:
    """A time in s or ms, three significant digits; `unit_of` lets two times that are compared share a unit."""
    scale, unit = _time_unit(value if unit_of is None else unit_of)
    return f"{significant(value * scale)} {unit}"


def spread(times: Spread, unit_of: float | None = None) -> str:
    """The smallest and largest of repeated times, in the unit of `seconds`, which stands beside it."""
    scale, _ = _time_unit(times.median if unit_of is None else unit_of)
    return f"{significant(times.low * scale)}-{significant(times.high * scale)}"


def _time_unit(value: float) -> tuple[float, str]:
    return (1.0, "s") if value >= 1 else (1e3, "ms")


def enumeration(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
