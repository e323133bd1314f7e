"""The products with weights in a decoding step, by the kernel for few rows (`ops/linear`) where it serves.

`PRODUCTS` is entered around the forward of a step, and nowhere else: in there `torch.nn.functional.linear` on plain
tensors of 1 to 16 rows becomes an op, which chooses by shape, strides, dtype and device. What computes otherwise, such
as a quantised module, is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

from pyramidkv.ops.linear import LARGEST, linear, why_torch


@torch.library.custom_op("pyramidkv::linear", mutates_args=())
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`functional.linear` of x, (..., K), with (N, K) and (N,): (..., N), contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    of = functional.linear if why_torch(rows, weight, bias) else linear
    return of(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


@product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class Products(TorchFunctionMode):
    """Has products of few rows go through the op; the mode of a thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and not kwargs and _few(*args):
            x, weight, *bias = args
            return product(x, weight, bias[0] if bias else None)
        return func(*args, **(kwargs or {}))


def _few(x: Any, weight: Any, bias: Any = None) -> bool:
    plain = all(type(t) in (Tensor, Parameter) for t in (x, weight, *(() if bias is None else (bias,))))
    return plain and weight.ndim == 2 and 1 <= math.prod(x.shape[:-1]) <= LARGEST


PRODUCTS = Products()
