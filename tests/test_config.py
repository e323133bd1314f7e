"""Every bad setting is a `ConfigError` that names the argument, its value and what is allowed."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidkv import CompressionConfig, ConfigError, PyramidKVError
from pyramidkv.config import parse_bytes

BAD = [
    ({"method": "snapk", "budget": 64}, r"method='snapk': .*did you mean 'snapkv'.*pyramidkv"),
    ({"method": 3, "budget": 64}, r"method=3: .*pyramidkv"),
    ({"method": ["snapkv"], "budget": 64}, r"method=\['snapkv'\]: .*pyramidkv"),
    ({}, "exactly one of budget=, keep=, share=, bytes=; got none"),
    ({"budget": 64, "keep": 0.5}, "exactly one of budget=, keep=, share=, bytes=; got budget=, keep="),
    ({"budget": 64, "keep": 0.5, "bytes": 10**9}, "got budget=, keep=, bytes="),
    ({"method": "full", "budget": 64}, "budget=64: method='full' keeps everything"),
    ({"method": "full", "keep": 0.5}, "keep=0.5: method='full' keeps everything"),
    ({"budget": 32}, r"budget=32: must be at least 33 .*recent=32"),
    ({"budget": 8, "window": 4, "recent": 8}, "budget=8: must be at least 9"),
    ({"budget": 0}, "budget=0: must be a whole number, at least 1"),
    ({"budget": -5}, "budget=-5: must be a whole number, at least 1"),
    ({"budget": 64.0}, "budget=64.0: must be a whole number"),
    ({"budget": "64"}, "budget='64': must be a whole number"),
    ({"budget": True}, "budget=True: must be a whole number"),
    ({"keep": 0}, "keep=0: must be a share .* above 0 and at most 1"),
    ({"keep": 1.01}, "keep=1.01: must be a share"),
    ({"keep": -0.1}, "keep=-0.1: must be a share"),
    ({"keep": float("nan")}, "keep=nan: must be a share"),
    ({"keep": "0.5"}, "keep='0.5': must be a share"),
    ({"keep": True}, "keep=True: must be a share"),
    ({"bytes": "1 parsec"}, "bytes='1 parsec': must be a positive number of bytes.*GiB"),
    ({"bytes": 0}, "bytes=0: must be a positive number"),
    ({"bytes": -4}, "bytes=-4: must be a positive number"),
    ({"bytes": True}, "bytes=True: must be a positive number"),
    ({"bytes": "0.2"}, "bytes='0.2': must be a positive number"),
    ({"bytes": "nan"}, "bytes='nan': must be a positive number"),
    ({"budget": 64, "window": 0}, "window=0: must be a whole number, at least 1"),
    ({"budget": 64, "window": 2.5}, "window=2.5: must be a whole number"),
    ({"budget": 64, "recent": -1}, "recent=-1: must be a whole number, at least 0"),
    ({"budget": 64, "kernel": 0}, "kernel=0: must be a whole number, at least 1"),
    ({"budget": 64, "kernel": 4}, "kernel=4: must be odd"),
    ({"budget": 64, "pooling": "mean"}, r"pooling='mean': unknown; .*allowed: avg, max"),
    ({"budget": 64, "pooling": None}, r"pooling=None: unknown; allowed: avg, max"),
    ({"budget": 64, "beta": 0.9}, r"beta=0.9: must be 1 \(uniform\) or more"),
    ({"budget": 64, "beta": float("nan")}, "beta=nan: must be"),
    ({"budget": 64, "beta": float("inf")}, "beta=inf: must be"),
    ({"budget": 64, "beta": "20"}, "beta='20': must be"),
    ({"budget": 64, "sinks": -1}, "sinks=-1: must be a whole number, at least 0"),
    ({"budget": 64, "seed": -1}, "seed=-1: must be a whole number, at least 0"),
    ({"budget": 64, "room": 0}, "room=0: must be a whole number, at least 1"),
    ({"buget": 64}, r"buget=64: unknown; did you mean 'budget'\?.*allowed: .*window"),
    ({"budget": 64, "kernel_size": 5}, r"kernel_size=5: unknown; did you mean 'kernel'\?"),
    ({"budget": 64, "zzz": 5}, r"zzz=5: unknown; allowed: method, budget"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_a_bad_value_names_itself_and_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.make(**options)


def test_a_config_error_is_a_value_error_of_this_package():
    with pytest.raises(ValueError) as caught:
        CompressionConfig(budget=-1)
    assert isinstance(caught.value, PyramidKVError)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 33},
        {"budget": 1, "recent": 0},
        {"keep": 1},
        {"keep": 1e-9},
        {"bytes": "1GiB", "beta": 1},
        {"method": "full"},
        {"budget": 64, "kernel": 1, "sinks": 0, "room": 1, "window": 1},
    ],
    ids=str,
)
def test_the_edges_of_what_is_allowed_are_allowed(options):
    config = CompressionConfig.make(**options)
    assert all(getattr(config, name) == value for name, value in options.items() if name != "bytes")


def test_numbers_of_numpy_are_numbers():
    swept = CompressionConfig(keep=np.float32(0.5), window=np.int64(16), beta=np.float64(2))
    assert swept == CompressionConfig(keep=0.5, window=16, beta=2.0)
    assert (type(swept.keep), type(swept.window)) == (float, int)
    with pytest.raises(ConfigError, match=r"bits=4\.0"):
        CompressionConfig(keep=0.5, bits=4.0)


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        CompressionConfig(budget=64).budget = 3


def test_recent_is_the_window_unless_said_otherwise():
    assert (CompressionConfig(budget=64).recent, CompressionConfig(budget=64).floor) == (32, 33)
    assert (CompressionConfig(budget=64, recent=5).recent, CompressionConfig(budget=64, recent=0).floor) == (
        5,
        1,
    )


def test_a_description_shows_what_differs_from_the_defaults():
    assert CompressionConfig(budget=64, beta=2.0).describe() == "budget=64 beta=2.0"
    assert CompressionConfig(bytes="1kb").describe() == "bytes=1000"
    one, other = (CompressionConfig(budget=64, layers=(1.0, 2.0, w)).describe() for w in (3.0, 4.0))
    assert one.startswith("budget=64 layers=3_weights_") and one != other and len(one) == len(other)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (5, 5),
        ("5", 5),
        ("5B", 5),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("800MB", 800_000_000),
        (" 1.5 GiB ", 3 << 29),
        ("2gib", 2 << 30),
        ("0.1GB", 100_000_000),
        (1e6, 1_000_000),
        (9007199254740993, 9007199254740993),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_bytes_are_read_exactly(text, number):
    assert parse_bytes("bytes", text) == number


@pytest.mark.parametrize("text", ["", "GiB", "1 2", "1e9", "-1", "1TB!", "1,5GB", None, [1]])
def test_what_is_no_number_of_bytes_is_an_error(text):
    with pytest.raises(ConfigError, match=re.escape(f"memory={text!r}: must be a positive number of bytes")):
        parse_bytes("memory", text)


@given(st.integers(1, 2**70), st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30), ("", 0)]))
def test_bytes_of_any_size_are_exact(number, unit):
    assert parse_bytes("bytes", f"{number}{unit[0]}") == number << unit[1]
