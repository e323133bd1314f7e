"""Attention of a whole prompt by torch, for comparison."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ops.measuring import microseconds
from ops.shapes import Model

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def attend(x: Inputs, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*x, is_causal=True, enable_gqa=x.query.shape[1] != x.key.shape[1])


def row(model: Model, keys: int, backends: dict[str, SDPBackend] = BACKENDS) -> dict:
    x = Inputs(*(model.random(1, heads, keys, model.size) for heads in (model.heads, model.kv_heads, model.kv_heads)))
    times = {name: microseconds(partial(attend, backend=backend), [x]) for name, backend in backends.items()}
    return {"model": model.name, "keys": keys, **times}
