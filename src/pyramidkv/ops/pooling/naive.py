"""The plain torch definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d


def pool(scores: Tensor, kernel: int, kind: str, valid: Tensor | None = None, old: int | None = None) -> Tensor:
    """Each score averaged ("avg") or maximised ("max") with its neighbours, `kernel` slots wide.

    Args:
        scores: (B, H, K), never below 0 where they are valid.
        kernel: odd.
        kind: "avg" or "max".
        valid: (B, 1 or H, K) bool; False leaves a slot out, as what lies beyond both ends is left out.
        old: the others, from this slot on, are not pooled and are nobody's neighbours; None: there are none.

    Returns:
        (B, H, K); slots left out may have any score.
    """
    if old is not None and old < scores.shape[-1]:
        some = None if valid is None else valid[..., :old]
        return torch.cat([pool(scores[..., :old], kernel, kind, some), scores[..., old:]], dim=-1)
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    pad = kernel // 2
    if kind == "max":
        shown = scores if valid is None else scores.masked_fill(~valid, 0.0)
        return max_pool1d(shown, kernel, stride=1, padding=pad)
    if valid is None:
        return avg_pool1d(scores, kernel, stride=1, padding=pad, count_include_pad=False)
    total = avg_pool1d(scores.masked_fill(~valid, 0.0), kernel, stride=1, padding=pad)
    share = avg_pool1d(valid.float(), kernel, stride=1, padding=pad)
    return total / share.clamp(min=1 / (2 * kernel))  # no valid neighbour: the score is 0 either way
