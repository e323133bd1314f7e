"""The one exception tree, and the one warning, that this package raises."""


class PyramidKVError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(PyramidKVError, ValueError):
    """An argument is outside what is allowed; the message names the argument, its value and what is allowed."""


class UnsupportedError(PyramidKVError, NotImplementedError):
    """A model, a cache or a way of decoding that compression cannot serve; the message says what to do instead."""


class DataError(PyramidKVError):
    """A corpus, a results file or a model file that cannot be had or read; nothing else is put in its place."""


class CompressionWarning(UserWarning):
    """Compression was asked for and did not take place."""
