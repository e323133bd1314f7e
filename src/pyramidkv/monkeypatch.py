"""The `replace_*` names of the original PyramidKV code: compression for every model of a family, by one call.

A thin form of `compress`: the first call of a model of that class opens a session on it, and "fullkv" closes them all.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from typing import Any

import transformers

from pyramidkv.config import CompressionConfig, unknown
from pyramidkv.errors import ConfigError
from pyramidkv.methods import METHODS
from pyramidkv.session import Session

_NONE = ("fullkv", "full")
_sessions: dict[type, weakref.WeakSet[Session]] = {}  # a session lives as long as its model, which holds its hook


def replace_gptneox(method: str = "pyramidkv", **options: Any) -> None:
    """Compress every `GPTNeoXForCausalLM` from its next call on; "fullkv" puts the class and its models back.

    Raises `ConfigError` for an unknown method or option; options are those of `CompressionConfig`.
    """
    _replace(transformers.GPTNeoXForCausalLM, method, options)


def replace_llama(method: str = "pyramidkv", **options: Any) -> None:
    """Compress every `LlamaForCausalLM`; see `replace_gptneox`."""
    _replace(transformers.LlamaForCausalLM, method, options)


def replace_mistral(method: str = "pyramidkv", **options: Any) -> None:
    """Compress every `MistralForCausalLM`; see `replace_gptneox`."""
    _replace(transformers.MistralForCausalLM, method, options)


def _replace(model_class: type, method: str, options: dict[str, Any]) -> None:
    if not isinstance(method, str):
        raise ConfigError(f"method={method!r}: {unknown(method, ['fullkv', *METHODS])}")
    if method.lower() in _NONE:
        if options:
            raise ConfigError(f"{next(iter(options))}: method={method!r} keeps everything and takes no options")
        _restore(model_class)
        return
    if method.lower() not in METHODS:
        raise ConfigError(f"method={method!r}: {unknown(method, ['fullkv', *METHODS])}")
    config = CompressionConfig.make(method=method.lower(), **options)
    _restore(model_class)
    sessions = _sessions[model_class] = weakref.WeakSet()
    plain_call, plain_generate = model_class.__call__, model_class.generate  # type: ignore[attr-defined]

    def is_open(model: Any) -> bool:
        return any(session.model is model for session in sessions)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_open(self):
            sessions.add(Session(self, config).open())
        return plain_call(self, *args, **kwargs)

    @functools.wraps(plain_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_open(self):
            return plain_generate(self, *args, **kwargs)
        sessions.add(Session(self, config).open())
        return self.generate(*args, **kwargs)  # which is the session's now

    model_class.__call__ = call  # type: ignore[method-assign]
    model_class.generate = generate  # type: ignore[attr-defined]


def _restore(model_class: type) -> None:
    sessions = list(_sessions.pop(model_class, ()))
    for name in {"__call__", "generate"} & set(vars(model_class)):
        delattr(model_class, name)
    with ExitStack() as stack:  # closes them all, even if the warning of one is an error
        for session in sessions:
            stack.callback(session.close)
