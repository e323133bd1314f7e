"""Layer budgets: the paper's formula worked by hand, exact integer totals, floors, and clamps given back."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pyramidkv.budget import apportion, layer_budgets, pyramid_shares, total_for_share
from pyramidkv.errors import ConfigError

NO_LIMIT = 10**9


def budgets(schedule="pyramid", *, layers, total, prompt=NO_LIMIT, window=32, least=None, beta=20.0):
    least = window + 1 if least is None else least
    return layer_budgets(schedule, layers=layers, total=total, prompt=prompt, window=window, least=least, beta=beta)


def paper(layers, average, window, beta):
    """Section 4.2 with the window on top: the two ends, and a straight line between them."""
    x = average - window
    top, bottom = x / beta, 2 * x - x / beta
    return [window + bottom - (bottom - top) * i / max(layers - 1, 1) for i in range(layers)]


def test_the_worked_example():
    got = budgets(layers=32, total=32 * 512, prompt=1536)
    assert (got[0], got[-1]) == (968, 56)
    assert sum(got) == 32 * 512
    # 912 tokens of slope over 31 steps: 29 or 30 between neighbours.
    assert {low - high for high, low in pairwise(got)} == {-29, -30}


@pytest.mark.parametrize(
    ("layers", "average", "window", "beta", "expected"),
    [
        (3, 14, 8, 3.0, (18, 14, 10)),  # x = 6: top 2, bottom 10
        (2, 120, 20, 20.0, (215, 25)),  # x = 100: top 5, bottom 195
        (5, 60, 10, 2.0, (85, 73, 60, 47, 35)),  # x = 50: 85, 72.5, 60, 47.5, 35; the odd token to the lower half
        (4, 50, 8, 1.0, (50, 50, 50, 50)),
        (1, 77, 32, 20.0, (77,)),
    ],
)
def test_worked_by_hand(layers, average, window, beta, expected):
    assert budgets(layers=layers, total=layers * average, window=window, beta=beta) == expected


@pytest.mark.parametrize("layers", range(1, 81))
def test_every_depth_follows_the_paper_within_one_token(layers):
    got = budgets(layers=layers, total=layers * 512)
    exact = paper(layers, 512, 32, 20) if layers > 1 else [512]
    assert sum(got) == layers * 512
    assert all(abs(g - e) < 1 for g, e in zip(got, exact, strict=True))


def test_a_layer_above_the_prompt_is_cut_and_the_others_share_the_excess():
    # x = 92: the line is 187.4, 129.1, 70.9, 12.6. At 120 the lower two are cut, and 160 are left for the upper two:
    # each gets 38.3 more, and their distance stays 58.3.
    assert budgets(layers=4, total=400, prompt=120, window=8) == (120, 120, 109, 51)


def test_floors_hold_and_the_others_pay_for_them():
    got = budgets(layers=4, total=4 * 40, window=32, least=36)
    assert got[-1] == 36
    assert sum(got) == 160
    assert min(got) == 36


def test_a_prompt_that_fits_is_kept_whole():
    assert budgets(layers=3, total=300, prompt=100) == (100, 100, 100)
    assert budgets(layers=3, total=299, prompt=100) != (100, 100, 100)


def test_a_prompt_shorter_than_the_floor_is_kept_whole():
    assert budgets(layers=3, total=3 * 33, prompt=20, window=32) == (20, 20, 20)
    assert budgets(layers=3, total=3 * 33, prompt=0, window=32) == (0, 0, 0)


def test_no_silent_uniform_fallback():
    """Where the top layer would fall below its floor, the pyramid stays a pyramid."""
    got = budgets(layers=8, total=8 * 40, window=32, beta=200.0)
    assert got[0] > got[3] > got[-1]
    assert len(set(got)) > 2


def test_a_total_that_no_limits_allow_is_an_error_with_the_range():
    with pytest.raises(ConfigError, match="total=5: 3 layers of 2 to 9 tokens allow 6 to 27"):
        apportion([Fraction(2)] * 3, 5, 2, 9)
    with pytest.raises(ConfigError, match="total=28"):
        apportion([Fraction(9)] * 3, 28, 2, 9)
    with pytest.raises(ConfigError, match="total=10"):
        budgets(layers=2, total=10, window=32)


@pytest.mark.parametrize(
    ("keep", "layers", "prompt", "total"),
    [(0.25, 4, 100, 100), (0.1, 3, 10, 3), (0.7, 10, 10, 70), (0.29, 1, 100, 29), (1.0, 5, 7, 35), (0.001, 2, 99, 0)],
)
def test_a_share_means_the_decimal_that_it_shows(keep, layers, prompt, total):
    assert total_for_share(keep, layers=layers, prompt=prompt) == total


plans = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 80),
        "average": st.integers(1, 3000),
        "extra": st.integers(0, 79),
        "prompt": st.integers(1, 4000),
        "window": st.integers(0, 256),
        "beta": st.sampled_from([1.0, 1.5, 2.0, 3.7, 20.0, 500.0]),
    }
)


@given(plans, st.sampled_from(["pyramid", "uniform"]))
def test_totals_are_exact_and_limits_hold(p, schedule):
    total = p["layers"] * p["average"] + p["extra"] % p["layers"]
    least = p["window"] + 1
    assume(p["average"] >= least)
    got = budgets(schedule, layers=p["layers"], total=total, prompt=p["prompt"], window=p["window"], beta=p["beta"])
    assert sum(got) == min(total, p["layers"] * p["prompt"])
    assert all(min(least, p["prompt"]) <= g <= p["prompt"] for g in got)
    assert all(type(g) is int for g in got)
    if schedule == "uniform" or p["beta"] == 1.0:
        assert max(got) - min(got) <= 1
    if schedule == "pyramid":
        assert all(low >= high for low, high in pairwise(got))


@given(plans)
def test_without_clamps_every_layer_is_within_a_token_of_the_exact_line(p):
    total = p["layers"] * p["average"] + p["extra"] % p["layers"]
    average = Fraction(total, p["layers"])
    assume(average >= p["window"])
    exact = paper(p["layers"], average, p["window"], Fraction(str(p["beta"])))
    if p["layers"] == 1:
        exact = [average]
    assert sum(exact) == total
    assert pyramid_shares(p["layers"], average, p["window"], Fraction(str(p["beta"]))) == exact
    got = budgets(layers=p["layers"], total=total, window=p["window"], least=0, beta=p["beta"])
    assert all(abs(g - e) < 1 for g, e in zip(got, exact, strict=True))


@given(st.lists(st.fractions(-50, 150, max_denominator=20), min_size=1, max_size=12), st.data())
def test_apportion_meets_any_possible_total_with_one_common_shift(shares, data):
    low = data.draw(st.integers(0, 20))
    high = data.draw(st.integers(low, 100))
    total = data.draw(st.integers(len(shares) * low, len(shares) * high))
    got = apportion(shares, total, low, high)
    assert sum(got) == total
    assert all(low <= g <= high for g in got)
    # Between layers that no limit cuts, differences are those of the shares.
    free = [(g, s) for g, s in zip(got, shares, strict=True) if low + 1 < g < high - 1]
    for (g1, s1), (g2, s2) in pairwise(free):
        assert abs((g1 - g2) - (s1 - s2)) < 2
    # And a larger share never gets fewer tokens.
    for (s1, g1), (s2, g2) in pairwise(sorted(zip(shares, got, strict=True))):
        assert s1 == s2 or g1 <= g2
