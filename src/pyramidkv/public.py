"""What users import from `pyramidkv`. Importing it makes "pyramidkv" known to `transformers` as an attention."""

from pyramidkv.attention import register as _register_attention
from pyramidkv.cache import PyramidKVCache
from pyramidkv.calibration import calibrate
from pyramidkv.chunks import prefill
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import CompressionWarning, ConfigError, DataError, PyramidKVError, UnsupportedError
from pyramidkv.methods import methods, register
from pyramidkv.monkeypatch import replace_gptneox, replace_llama, replace_mistral
from pyramidkv.scorers import Observation, Scorer
from pyramidkv.session import Session, compress

__all__ = [
    "CompressionConfig",
    "CompressionWarning",
    "ConfigError",
    "DataError",
    "Observation",
    "PyramidKVCache",
    "PyramidKVError",
    "Scorer",
    "Session",
    "UnsupportedError",
    "calibrate",
    "compress",
    "methods",
    "prefill",
    "register",
    "replace_gptneox",
    "replace_llama",
    "replace_mistral",
]

_register_attention()
