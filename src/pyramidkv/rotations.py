"""Rotary position embeddings in one launch, or in few calls for a token on a CPU.

The models of `transformers` write each of some ten steps of it to memory and read it again: an eighth of the time of a
prefill of 6144 tokens on Pythia-2.8B's shape. Their attention modules all call the function `apply_rotary_pos_emb` of
their file; under a session they call ours, which gives the same numbers, to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from pyramidkv.ops.rotate import rotate
from pyramidkv.slices import replace_each

CALLED = "apply_rotary_pos_emb"


def rotate_at_once(model: torch.nn.Module) -> Callable[[], None]:
    """Have the attention modules of a model rotate queries and keys by `ops.rotate` where that can serve.

    Returns what puts the model back as it was. A module whose forward does not call `apply_rotary_pos_emb`, or has been
    replaced already (accelerate's hooks), is left alone.
    """
    modules = (m for m in model.modules() if "forward" not in vars(m) and CALLED in _names(type(m).forward))
    return replace_each(modules, "forward", _rotating)


def _names(function: Any) -> tuple[str, ...]:
    """The global names that a function, undecorated, reads."""
    code = getattr(function, "__code__", None)
    return () if code is None or hasattr(function, "__wrapped__") else code.co_names


def _rotating(forward: Any) -> Any:
    """A bound forward which finds ours under the name of its file's function."""
    plain: Any = forward.__func__
    own = {**plain.__globals__, CALLED: _ours(plain.__globals__[CALLED])}
    function = FunctionType(plain.__code__, own, plain.__name__, plain.__defaults__, plain.__closure__)
    function.__kwdefaults__ = plain.__kwdefaults__
    rotating = MethodType(function, forward.__self__)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # torch's compiler fuses the model's own steps, and looks globals up in the module of a function's name.
        return forward(*args, **kwargs) if torch.compiler.is_compiling() else rotating(*args, **kwargs)

    return run


def _ours(plain: Any) -> Any:
    @functools.wraps(plain)
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(q, k, cos, sin, *args, **kwargs) if args or kwargs else rotate(q, k, cos, sin, plain)

    return rotated
