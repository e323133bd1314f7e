"""How many tokens each layer may keep: pure integer arithmetic, no torch.

The schedules give real-valued shares; `apportion` makes them integers whose sum is exact. What a model or a cache
does with the numbers is not decided here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from pyramidkv.errors import ConfigError


def apportion(shares: Sequence[Fraction], total: int, low: int, high: int) -> list[int]:
    """Integers that sum to `total`, each in [low, high], as close to `shares` as those limits allow.

    A share that a limit cuts off is given back to the others in equal parts (one common shift, so the slope between
    the unclamped layers stays what the schedule says). Remainders go to the largest fractional parts, lower layers
    first. Raises `ConfigError` if no such integers exist.
    """
    count = len(shares)
    if not count * low <= total <= count * high:
        raise ConfigError(
            f"total={total}: {count} layers of {low} to {high} tokens allow {count * low} to {count * high}"
        )
    if sum(shares) == total and low <= min(shares) and max(shares) <= high:
        return _rounded(list(shares), total)
    # sum(clamp(share + shift)) is piecewise linear and rising in `shift`: find the piece that reaches the total.
    breaks = sorted({bound - share for share in shares for bound in (low, high)})
    reached = bisect_right(breaks, Fraction(total), key=lambda shift: _clamped_sum(shares, shift, low, high))
    below = breaks[max(reached - 1, 0)]
    free = [share for share in shares if low <= share + below < high]
    missing = total - _clamped_sum(shares, below, low, high)
    shift = below + (missing / len(free) if free else 0)
    return _rounded([min(max(share + shift, Fraction(low)), Fraction(high)) for share in shares], total)


def _rounded(exact: Sequence[Fraction], total: int) -> list[int]:
    """Largest remainder: every value rounded down, the missing units to the largest fractional parts."""
    tokens = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (tokens[i] - exact[i], i))
    for i in by_remainder[: total - sum(tokens)]:
        tokens[i] += 1
    return tokens


def _clamped_sum(shares: Sequence[Fraction], shift: Fraction, low: int, high: int) -> Fraction:
    return sum((min(max(share + shift, Fraction(low)), Fraction(high)) for share in shares), Fraction(0))


def pyramid_shares(layers: int, average: Fraction, window: int, beta: Fraction) -> list[Fraction]:
    """PyramidKV's schedule (arXiv 2406.02069, section 4.2): linear from the bottom layer down to the top one.

    With x = average - window tokens to spread per layer, the top layer gets x / beta, the bottom 2 x - x / beta, and
    every layer its window on top of that. The mean is exactly `average`.
    """
    spread = average - window
    top = spread / beta
    bottom = 2 * spread - top
    if layers == 1:
        return [average]
    return [window + bottom - (bottom - top) * Fraction(layer, layers - 1) for layer in range(layers)]


def uniform_shares(layers: int, average: Fraction) -> list[Fraction]:
    """The same number of tokens for every layer (SnapKV, H2O, StreamingLLM)."""
    return [average] * layers


def weighted_shares(weights: Sequence[float], average: Fraction) -> list[Fraction]:
    """Each layer's share in proportion to its weight; the mean is exactly `average`."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = average * len(exact) / sum(exact)
    return [weight * unit for weight in exact]


@lru_cache(maxsize=4096)
def layer_budgets(
    schedule: str,
    *,
    layers: int,
    total: int,
    prompt: int,
    window: int,
    least: int,
    beta: float,
    weights: tuple[float, ...] | None = None,
) -> tuple[int, ...]:
    """Tokens kept by each layer, bottom layer first: `total` in all, between `least` and `prompt` each.

    A prompt that fits is kept whole. `schedule` is "pyramid" or "uniform"; `weights`, one a layer, take its place.
    """
    if total >= layers * prompt:
        return (prompt,) * layers
    average = Fraction(total, layers)
    if weights is not None:
        shares = weighted_shares(weights, average)
    elif schedule == "pyramid":
        shares = pyramid_shares(layers, average, window, Fraction(str(beta)))
    else:
        shares = uniform_shares(layers, average)
    return tuple(apportion(shares, total, min(least, prompt), prompt))


def total_for_share(keep: float, *, layers: int, prompt: int) -> int:
    """Tokens over all layers for a share of the prompt, rounded down; `keep` is the decimal that its text says."""
    return int(Fraction(str(keep)) * layers * prompt)
