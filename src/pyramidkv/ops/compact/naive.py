"""The plain torch definition: a gather of each tensor."""

from __future__ import annotations

import torch
from torch import Tensor

Slots = tuple[Tensor, Tensor, Tensor]  # keys (B, H, K, D), values (B, H, K, Dv) and positions (B, H, K) int32


def compact(sources: Slots, index: Tensor, targets: Slots) -> None:
    """Copy the slots `index` of the sources into the first slots of the targets, in their dtype.

    Args:
        sources: keys (B, H, K, D), values (B, H, K, Dv), positions (B, H, K) int32.
        index: (B, H, N) int64 indices into K; -1 for an empty slot, which becomes zeros, at position -1.
        targets: keys, values and positions of C >= N slots, which share no memory with the sources. Slots from N on
            are left as they are.
    """
    kept = index.shape[-1]
    where, empty = index.clamp(min=0), index < 0
    for source, target in zip(sources[:2], targets[:2], strict=True):
        wide = where[..., None].expand(-1, -1, -1, source.shape[-1])
        part = target[:, :, :kept]
        if part.dtype == source.dtype:  # straight into the buffer
            torch.gather(source, 2, wide, out=part)
        else:
            part.copy_(source.gather(2, wide))
        part.masked_fill_(empty[..., None], 0)
    targets[2][..., :kept] = sources[2].gather(2, where).masked_fill_(empty, -1)
