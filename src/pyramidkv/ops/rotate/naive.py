"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with the rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2) of their tokens.

    Channel c < R / 2 and channel c + R / 2 make a pair, as the models of `transformers` have it; each of the two
    products and their sum is rounded to the dtype, as there.

    Args:
        query: (B, Hq, T, D).
        key: (B, Hkv, T, D).
        cos: (1 or B, T, R), R even and at most D, in the dtype of the queries; its halves may differ.
        sin: the same.

    Returns:
        The same shapes and dtype; channels from R on are as they were.
    """
    return _rotated(query, cos[:, None], sin[:, None]), _rotated(key, cos[:, None], sin[:, None])


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    pairs, rest = vectors[..., :size], vectors[..., size:]
    one, two = pairs.chunk(2, dim=-1)
    turned = pairs * cos + torch.cat([-two, one], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
