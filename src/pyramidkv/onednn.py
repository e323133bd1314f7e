"""A session's products with weights on a CPU, in float32: by oneDNN in place of MKL (`ops/linear/onednn.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyramidkv.ops.linear.onednn import linear, serves, why_no_onednn
from pyramidkv.slices import replace_each


def multiply_by_onednn(model: torch.nn.Module) -> Callable[[], None]:
    """Have every `torch.nn.Linear` of a model with float32 weights on a CPU ask oneDNN where that serves, call by call.

    Returns what puts the model back as it was. A subclass, such as a quantised module, or a module whose forward has
    been replaced already (accelerate's hooks), is left alone.
    """
    return replace_each(filter(_plain, model.modules()) if why_no_onednn() is None else (), "forward", _by_onednn)


def _plain(module: torch.nn.Module) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _by_onednn(forward: Any) -> Any:
    module = forward.__self__

    @functools.wraps(forward)
    def run(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if torch.compiler.is_compiling() or not serves(x, weight, bias):
            out: Tensor = forward(x)
            return out
        return linear(x, weight, bias)

    return run
