"""KV-cache compression for transformers."""

from pyramidkv.errors import CompressionWarning, ConfigError, DataError, PyramidKVError, UnsupportedError

__all__ = ["CompressionWarning", "ConfigError", "DataError", "PyramidKVError", "UnsupportedError"]
