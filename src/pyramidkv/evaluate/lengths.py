"""Which lengths mean something: of a prompt that a config would keep whole, compression can't be measured."""

from __future__ import annotations

from collections.abc import Iterable

from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.methods import METHODS


def check_length(name: str, tokens: int, configs: Iterable[CompressionConfig]) -> None:
    """Raise `ConfigError` unless every config drops something of a prompt of `tokens` tokens.

    `name` is the setting that holds the length, for the message. The full cache goes with every length.
    """
    if tokens < 1:
        raise ConfigError(f"{name}={tokens}: must be at least 1 token")
    for config in configs:
        if config.method == "full":
            continue
        if tokens <= config.floor:
            raise ConfigError(
                f"{name}={tokens}: must be longer than the {config.floor} tokens that method={config.method!r} always "
                f"keeps (recent={config.recent} and {config.floor - config.recent} more)"
            )
        if tokens < config.window != METHODS[config.method].window:  # a method's own window is "up to"
            raise ConfigError(f"window={config.window}: must be at most {name}={tokens}")
        if config.budget is not None and config.budget >= tokens:
            raise ConfigError(f"budget={config.budget}: must be below {name}={tokens}, or nothing is compressed")
