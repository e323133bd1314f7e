"""Products in float32 on an AMD CPU by oneDNN, where torch would ask MKL.

MKL is Intel's: on AMD's CPUs it multiplies at less than half the rate of oneDNN, which comes with torch too, and its
products of one row with a weight run on one thread. Torch reaches oneDNN in float32 by one op, made for what its
compiler generates; it promises it to nobody.

oneDNN keeps what it makes for each number of rows, most of a megabyte, and a thousand of them. So a prompt goes in
pieces of few sizes; what is left over is torch's.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter, functional

FEW = 16  # rows that go as they are
_PIECES = (1024, 512, 256, 128, 64)  # rows

_OP = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def why_no_onednn() -> str | None:
    """Why no product goes there; None if those that `serves` says do."""
    if _OP is None:
        return f"torch {torch.__version__} has no product by oneDNN"
    if "AuthenticAMD" not in _processor():
        return "MKL was measured to be slow on AMD's CPUs alone"
    return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn is turned off"


@cache
def _processor() -> str:
    """What the system says of the CPU; its maker among it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes these. It has no gradient, and knows no subclasses of tensors."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    given = (weight,) if bias is None else (weight, bias)
    return all(type(t) is Parameter and t.dtype == x.dtype and t.device == x.device for t in given)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of (N, K), plus (N,): (..., N), as `naive.linear` of all rows."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count <= FEW or count == _PIECES[0]:
        return _product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    out = x.new_empty(count, weight.shape[0])
    at = 0
    for size in _PIECES:
        while at + size <= count:
            out[at : at + size] = _product(rows[at : at + size], weight, bias)
            at += size
    if at < count:
        out[at:] = functional.linear(rows[at:], weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _OP is not None
    out: Tensor = _OP(rows, weight, bias, "none", [], "")
    return out
