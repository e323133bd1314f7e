"""Tensor parallelism: which of a model's KV heads this process holds.

`transformers` splits the weights and adds up the results (`tp_plan`); each process, or rank, then runs the same code on
its own heads. Budgets come from the whole model's shape, so they are equal on every rank, and what a head keeps does
not depend on the heads of other ranks: nothing has to be sent between them. See docs/parallel.md.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from pyramidkv.errors import ConfigError
from pyramidkv.shape import cache_shape

_KEY_LAYERS = ("k_proj", "query_key_value")


def first_head(whole: int, local: int) -> int:
    """Index in the model of the first KV head of this rank, which holds `local` of `whole` heads.

    Ranks that share a model have numbers in a row, since the tensor-parallel dimension of the device meshes that
    `transformers` makes is the last. Raises `ConfigError` if the heads that are not here can't be on other ranks.
    """
    if local == whole:
        return 0
    if whole % local or not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            f"past_key_values: the model's config says {whole} KV heads, and the new keys have {local}: without tensor "
            "parallelism they must be as many, with it a part that divides them"
        )
    return dist.get_rank() % (whole // local) * local


def ranks_of(model: Any) -> int:
    """How many processes hold a part of the model each; 1 without tensor parallelism."""
    return getattr(model, "tp_size", None) or 1


def check_heads(model: Any) -> None:
    """Raise `ConfigError` if a tensor-parallel model has KV heads that can't be split evenly over its ranks."""
    ranks = ranks_of(model)
    plan = (getattr(model, "tp_plan", None) or {}) if ranks > 1 else {}
    if not any(
        style == "colwise" and any(key in name.split(".") for key in _KEY_LAYERS) for name, style in plan.items()
    ):
        return  # every rank has all heads
    for layer in cache_shape(model.config).layers:
        if layer.kv_heads % ranks:
            raise ConfigError(
                f"model: its {layer.kv_heads} KV heads can't be split evenly over {ranks} ranks of tensor parallelism; "
                "take a number of ranks that divides them (torchrun --nproc-per-node, tp_size)"
            )
