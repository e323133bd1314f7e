"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors with their first R channels rotated; channel c < R / 2 and channel c + R / 2 make a pair.

    Args:
        vectors: (B, H, N, D), R at most D.
        cos: (B, R / 2) of any floating dtype, one angle for each row and pair; used in float32.
        sin: the same.

    Returns:
        (B, H, N, D), contiguous, in the dtype of the vectors; the arithmetic is in float32.
    """
    half = cos.shape[-1]
    cos, sin = (t.float()[:, None, None] for t in (cos, sin))
    wide = vectors.float()
    one, two = wide[..., :half], wide[..., half : 2 * half]
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin, wide[..., 2 * half :]], dim=-1)
    return turned.to(vectors.dtype).contiguous()
