"""How much attention a set of queries pays to each key: a Triton kernel where it can run, else plain torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.kernels import why_naive
from pyramidkv.ops.window_scores import naive

__all__ = ["why_naive", "window_scores"]


def window_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    *,
    power: int = 1,
    per_visible: bool = False,
    behind: bool = False,
    asking: Tensor | None = None,
) -> Tensor:
    """Power mean of the attention probability that the last queries of a sequence give to each key.

    The definition, arguments and result are those of `naive.window_scores`: (B, Hq, W, D) queries and (B, Hkv, K, D)
    keys give (B, Hkv, K) float32. The kernel multiplies in the dtype of its inputs and adds in float32.
    """
    kind: dict[str, Any] = {"power": power, "per_visible": per_visible, "behind": behind, "asking": asking}
    served = scaling > 0 and power in (1, 2) and query.dtype == key.dtype and kernels.why_naive(query) is None
    if served:
        from pyramidkv.ops.window_scores import triton

        with kernels.on(query.device):
            return triton.window_scores(query, key, scaling, valid, **kind)
    return naive.window_scores(query, key, scaling, valid, **kind)
