"""`CompressionConfig`: every setting of a compression, validated; the only home of their defaults."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pyramidkv.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """What to keep of a prompt's keys and values.

    Exactly one of `budget`, `keep` and `bytes` says how much; `method="full"` takes none of them.

    Args:
        method: which scorer and layer schedule to use; `pyramidkv.methods()` lists them.
        budget: tokens kept per layer and KV head, averaged over the layers.
        keep: share of the prompt's tokens kept, in (0, 1]. Never fewer than `recent` + 1 tokens per layer.
        bytes: bytes of the whole cache, room for new tokens included; a number or a text such as "1GiB", "800MB".
        window: observation queries: how many of the last queries of a forward are asked what they attend to.
        recent: newest tokens that every method keeps. Default: `window`.
        kernel: width in tokens of the pooling over scores (SnapKV, arXiv 2404.14469, section 4.2); odd; 1 turns it off.
        pooling: "avg" or "max".
        beta: slope of the pyramid (PyramidKV, section 4.2); 1 is uniform, larger is steeper.
        sinks: first tokens kept by "streamingllm" (arXiv 2309.17453).
        seed: of "random".
        room: slots for new tokens allocated beside the kept ones; a layer grows by as many when they are used up.
    """

    method: str = "pyramidkv"
    budget: int | None = None
    keep: float | None = None
    bytes: int | str | None = None
    window: int = 32
    recent: int | None = None
    kernel: int = 5
    pooling: str = "avg"
    beta: float = 20.0
    sinks: int = 4
    seed: int = 0
    room: int = 128

    def __post_init__(self) -> None:
        # Imported here, since scorers read this class; a method's name can only be checked against them.
        from pyramidkv.scorers import METHODS

        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: {unknown(self.method, METHODS)}")
        amounts = {"budget": self.budget, "keep": self.keep, "bytes": self.bytes}
        given = [name for name, value in amounts.items() if value is not None]
        if self.method == "full":
            if given:
                raise ConfigError(
                    f"{given[0]}={amounts[given[0]]!r}: method='full' keeps everything and takes no amount"
                )
        elif len(given) != 1:
            raise ConfigError(f"give exactly one of budget, keep and bytes; got {', '.join(given) or 'none'}")
        for name, least in (("window", 1), ("kernel", 1), ("sinks", 0), ("seed", 0), ("room", 1)):
            _integer(name, getattr(self, name), least)
        if self.recent is not None:
            _integer("recent", self.recent, 0)
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel={self.kernel}: must be odd, so that a pooled score stays at its token")
        if self.pooling not in ("avg", "max"):
            raise ConfigError(f"pooling={self.pooling!r}: {unknown(self.pooling, ('avg', 'max'))}")
        if not _number(self.beta) or not 1 <= self.beta < math.inf:
            raise ConfigError(f"beta={self.beta!r}: must be 1 (uniform) or more")
        if self.keep is not None and (not _number(self.keep) or not 0 < self.keep <= 1):
            raise ConfigError(f"keep={self.keep!r}: must be a share of the prompt, above 0 and at most 1")
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes("bytes", self.bytes))
        if self.budget is not None:
            _integer("budget", self.budget, 1)
            if self.budget < self.floor:
                raise ConfigError(
                    f"budget={self.budget}: must be at least {self.floor} tokens per layer "
                    f"(recent={self.recent_tokens} are always kept, and one more); lower recent or window to go below"
                )

    @classmethod
    def make(cls, **options: Any) -> CompressionConfig:
        """A config from keyword options; an unknown one raises `ConfigError` with the near name."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ConfigError(f"{name}={options[name]!r}: {unknown(name, names)}")
        return cls(**options)

    @property
    def recent_tokens(self) -> int:
        """Newest tokens that are always kept."""
        return self.window if self.recent is None else self.recent

    @property
    def floor(self) -> int:
        """The fewest tokens that a layer may keep."""
        return self.recent_tokens + 1

    def describe(self) -> str:
        """The settings that differ from the defaults, as `name=value`; the amount first."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        return " ".join(f"{k}={v}" for k, v in shown.items() if v != type(self).__dataclass_fields__[k].default)


def unknown(name: object, allowed: Any) -> str:
    """'unknown; did you mean X? allowed: ...' for an error message."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown; {hint}allowed: {', '.join(allowed)}"


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from a number or a text such as "1.5GiB" or "800MB". Raises `ConfigError` naming the argument."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    # A fraction, not a float: a float holds no more than 53 bits of a number of bytes.
    size = int(Fraction(match[1]) * _UNITS.get(match[2].lower(), 0)) if match else 0
    if isinstance(value, bool) or size < 1:
        raise ConfigError(f"{name}={value!r}: must be a positive number of bytes, such as 500000000, '800MB' or '1GiB'")
    return size


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {least}")
