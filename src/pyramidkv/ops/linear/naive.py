"""The plain torch definition, in float32."""

from __future__ import annotations

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of a few rows with the rows of a weight.

    Args:
        x: (M, K).
        weight: (N, K).
        bias: (N,); None: 0.

    Returns:
        (M, N) in the dtype of x.
    """
    out = x.float() @ weight.float().T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
