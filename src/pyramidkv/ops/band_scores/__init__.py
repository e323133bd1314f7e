"""How much attention each key gets from the queries of the tokens around it, asked again from behind the sequence.

A Triton kernel where it can run, else plain torch.
"""

from __future__ import annotations

from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.band_scores import naive
from pyramidkv.ops.kernels import why_naive

__all__ = ["band_scores", "why_naive"]


def band_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    valid: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Root of the sum of squared attention that each key gets from the queries of the tokens around it.

    The definition, arguments and result are those of `naive.band_scores`: (B, Hq, K, D) queries and (B, Hkv, K, D) keys
    give (B, Hkv, K) float32. The kernel multiplies in the dtype of its inputs and adds in float32.
    """
    if scaling > 0 and query.dtype == key.dtype and kernels.why_naive(query) is None:
        from pyramidkv.ops.band_scores import triton

        with kernels.on(query.device):
            return triton.band_scores(query, key, scaling, valid, angles)
    return naive.band_scores(query, key, scaling, valid, angles)
