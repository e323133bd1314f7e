"""`CompressionConfig`: every setting of a compression, validated; the only home of their defaults."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pyramidkv.errors import ConfigError
from pyramidkv.methods import METHODS

AMOUNTS = ("budget", "keep", "share", "bytes")
BITS = (16, 8, 4, 2)
HEADS = ("uniform", "adaptive")
DECODES = ("auto", "eager", "graph", "compiled")
KV_DTYPES = ("auto", "float32", "float16", "bfloat16")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """What to keep of a prompt's keys and values.

    Exactly one of `budget`, `keep`, `share` and `bytes` says how much; `method="full"` takes none of them. Settings
    left out have the method's own values; once made, a config holds the values in force.

    Args:
        method: which scorer and layer schedule to use; `pyramidkv.methods()` lists them.
        budget: tokens kept per layer and KV head, averaged over the layers.
        keep: share of the prompt's tokens kept, in (0, 1]. Never fewer than `recent` + 1 tokens per layer.
        share: share of the bytes of the full cache, in (0, 1]; with fewer `bits`, more tokens fit into it.
        bytes: bytes of the whole cache, over all GPUs and with room for new tokens; a number or a text such as "1GiB",
            "800MB".
        window: observation queries: how many of the last queries of a forward are asked what they attend to. 32 for
            most methods, 1024 for "rms", 256 for "echo" and "auto", which ask them about older keys alone.
        recent: newest tokens that every method keeps, never in fewer bits. As many as `window`, but at most 32 for
            "rms", "echo" and "auto".
        kernel: width in tokens of the pooling over scores (SnapKV, arXiv 2404.14469, section 4.2); odd; 1 turns it off.
            5 for most methods, 1 for "rms", "echo" and "auto".
        pooling: "avg" or "max".
        beta: slope of the pyramid (PyramidKV, section 4.2); 1 is uniform, larger is steeper.
        layers: what each layer's budget is to the others', bottom layer first, as numbers or a text of them ("1, 0.5");
            in place of the method's own division. A pair of a number and bits, "0.5:8" in a text, stores that layer in
            so many bits in place of `bits`. `pyramidkv.calibrate` measures both for a model.
        heads: "uniform": every KV head of a layer keeps as many tokens; "adaptive": the pages of 64 tokens that a layer
            can hold go to the heads whose scores are highest (Ada-KV, arXiv 2407.11550). "adaptive" for "auto".
        sinks: first tokens kept by "streamingllm" (arXiv 2309.17453).
        seed: of "random".
        bits: of a stored number: 16 stores it in `kv_dtype`; 8, 4 or 2 store codes, keys scaled per channel over
            pages of 64 tokens, values per token (KIVI, arXiv 2402.02750). 4 for "auto".
        kv_dtype: of what is stored: "auto" (as the model computes), "float32", "float16" or "bfloat16".
        room: slots for new tokens allocated beside the kept ones; a layer grows by as many when they are used up.
        slack: tokens that a layer may hold above its budget while decoding, before it evicts among the prompt's and
            the new ones (R-KV's setting, arXiv 2505.24133); None never evicts while decoding.
        decode: how new tokens are computed in a session: "eager", "graph" (one CUDA graph, replayed for every token),
            "compiled" (the same after `torch.compile`: fastest, a minute to compile once a model), or "auto", a graph
            where one can be captured.
    """

    method: str = "pyramidkv"
    budget: int | None = None
    keep: float | None = None
    share: float | None = None
    bytes: int | str | None = None
    window: int = None  # type: ignore[assignment]  # the method's own
    recent: int = None  # type: ignore[assignment]  # the method's own
    kernel: int = None  # type: ignore[assignment]  # the method's own
    pooling: str = "avg"
    heads: str = None  # type: ignore[assignment]  # the method's own
    beta: float = 20.0
    layers: tuple[float | tuple[float, int], ...] | str | None = None
    sinks: int = 4
    seed: int = 0
    bits: int = None  # type: ignore[assignment]  # the method's own
    kv_dtype: str = "auto"
    room: int = 128
    slack: int | None = None
    decode: str = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _own_number(getattr(self, field.name)))
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ConfigError(f"method={self.method!r}: {unknown(self.method, METHODS)}")
        self._fill()
        amounts = {name: getattr(self, name) for name in AMOUNTS}
        given = [name for name, value in amounts.items() if value is not None]
        if self.method == "full":
            if given:
                raise ConfigError(
                    f"{given[0]}={amounts[given[0]]!r}: method='full' keeps everything and takes no amount"
                )
        elif len(given) != 1:
            every, got = (", ".join(f"{name}=" for name in some) for some in (AMOUNTS, given))
            raise ConfigError(f"give exactly one of {every}; got {got or 'none'}")
        for name, least in (("window", 1), ("recent", 0), ("kernel", 1), ("sinks", 0), ("seed", 0), ("room", 1)):
            _integer(name, getattr(self, name), least)
        if self.bits not in BITS or not isinstance(self.bits, int):
            raise ConfigError(f"bits={self.bits!r}: must be one of {', '.join(map(str, BITS))}")
        if self.slack is not None:
            _integer("slack", self.slack, 1)
            if self.method == "full":
                raise ConfigError(f"slack={self.slack}: method='full' keeps everything and evicts nothing")
        if self.method == "full" and self.bits != 16:
            raise ConfigError(f"bits={self.bits}: method='full' stores what the model computes; use keep=1.0 instead")
        if self.method == "full" and self.heads != "uniform":
            raise ConfigError(f"heads={self.heads!r}: method='full' keeps everything in every head")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel={self.kernel}: must be odd, so that a pooled score stays at its token")
        for name, allowed in (("heads", HEADS), ("kv_dtype", KV_DTYPES), ("decode", DECODES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {unknown(getattr(self, name), allowed)}")
        if self.pooling not in ("avg", "max"):
            raise ConfigError(f"pooling={self.pooling!r}: {unknown(self.pooling, ('avg', 'max'))}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
            if self.method == "full":
                raise ConfigError(f"layers={self.layers!r}: method='full' keeps everything in every layer")
        if not _number(self.beta) or not 1 <= self.beta < math.inf:
            raise ConfigError(f"beta={self.beta!r}: must be 1 (uniform) or more")
        for name, of in (("keep", "prompt's tokens"), ("share", "full cache's bytes")):
            value = getattr(self, name)
            if value is not None and (not _number(value) or not 0 < value <= 1):
                raise ConfigError(f"{name}={value!r}: must be a share of the {of}, above 0 and at most 1")
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes("bytes", self.bytes))
        if self.budget is not None:
            _integer("budget", self.budget, 1)
            if self.budget < self.floor:
                raise ConfigError(
                    f"budget={self.budget}: must be at least {self.floor} tokens per layer "
                    f"(recent={self.recent} are always kept, and {self.floor - self.recent} more); lower recent= or "
                    "window= to go below"
                )

    @classmethod
    def make(cls, **options: Any) -> CompressionConfig:
        """A config from keyword options; an unknown one raises `ConfigError` with the near name."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ConfigError(f"{name}={options[name]!r}: {unknown(name, names)}")
        return cls(**options)

    @classmethod
    def given(cls, config: Any, options: dict[str, Any]) -> CompressionConfig:
        """What a caller gave, as `config` or as keyword options. Raises `ConfigError` for both, or anything else."""
        if config is None:
            return cls.make(**options)
        if options:
            raise ConfigError(f"{next(iter(options))}: give either config= or keyword options, not both")
        if not isinstance(config, cls):
            raise ConfigError(
                f"config={config!r}: must be a CompressionConfig; or give each setting by its name, such as keep=0.25"
            )
        return config

    @property
    def floor(self) -> int:
        """The fewest tokens that a layer may keep; heads that differ have at least a page each to go by."""
        if self.heads == "adaptive":
            from pyramidkv.ops.quantize import PAGE  # here, since it brings torch, which help does without

            return self.recent + PAGE
        return self.recent + 1

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The numbers of `layers`."""
        if not isinstance(self.layers, tuple):  # a config has parsed a text
            return None
        return tuple(layer[0] if isinstance(layer, tuple) else layer for layer in self.layers)

    def bits_of(self, rank: int) -> int:
        """Bits of a stored number in the compressed layer number `rank`."""
        layer = self.layers[rank] if isinstance(self.layers, tuple) else None
        return layer[1] if isinstance(layer, tuple) else self.bits

    def packs(self, rank: int) -> bool:
        """Whether older slots of the compressed layer number `rank` are stored in pages."""
        return self.packs_in(self.bits_of(rank))

    def packs_in(self, bits: int) -> bool:
        """Whether older slots that are stored in so many bits lie in pages."""
        return bits != 16 or self.heads == "adaptive"

    @property
    def free(self) -> int:
        """Free slots of a layer that has just evicted: `room`, and at least `slack`."""
        return max(self.room, self.slack or 0)

    @property
    def amount(self) -> dict[str, Any]:
        """How much is kept, as the one option that says it; empty for "full"."""
        return {name: getattr(self, name) for name in AMOUNTS if getattr(self, name) is not None}

    def describe(self) -> str:
        """The settings that differ from the method's own, as `name=value`; the amount first."""
        own = {f.name: f.default for f in dataclasses.fields(self)} | self._own()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        if self.layers is not None:  # too many to read; a sum tells two lists apart
            values["layers"] = f"{len(self.layers)}_weights_{zlib.crc32(repr(self.layers).encode()):08x}"
        return " ".join(f"{name}={value}" for name, value in values.items() if value != own[name])

    def _own(self) -> dict[str, Any]:
        """The method's own values of the settings that depend on it."""
        method = METHODS[self.method]
        recent = self.window
        if method.recent is not None and isinstance(recent, int):
            recent = min(method.recent, recent)
        own = {name: getattr(method, name) for name in ("window", "kernel", "bits", "heads")}
        return own | {"recent": recent}

    def _fill(self) -> None:
        """Put the method's own values where none were given."""
        for name in ("window", "kernel", "bits", "heads", "recent"):  # the last may depend on the first
            if getattr(self, name) is None:
                object.__setattr__(self, name, self._own()[name])


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


def _layers(value: Any) -> tuple[float | tuple[float, int], ...]:
    """Positive numbers, or pairs of one and bits, from a sequence or a text of them. Raises `ConfigError`."""
    given = [part.split(":") for part in value.split(",")] if isinstance(value, str) else value
    try:
        layers = tuple(_layer(part) for part in given)
    except (TypeError, ValueError):
        layers = ()
    if not layers:
        raise ConfigError(
            f"layers={value!r}: must be positive numbers, one a layer, such as '1.5, 1, 0.5'; "
            f"bits, if any, behind a colon: '1.5, 1:8, 0.5', one of {', '.join(map(str, BITS))}"
        )
    return layers


def _layer(part: Any) -> float | tuple[float, int]:
    """A number, or a pair of one and bits; `ValueError` or `TypeError` for what is neither."""
    number, *bits = part if isinstance(part, (tuple, list)) else (part,)
    weight = float(number)
    if not 0 < weight < math.inf or len(bits) > 1:
        raise ValueError
    if not bits:
        return weight
    if str(bits[0]).strip() not in map(str, BITS):
        raise ValueError
    return weight, int(bits[0])


def _own_number(value: Any) -> Any:
    """A number of another library's (numpy's, from a sweep) as Python's own; everything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {least}")
