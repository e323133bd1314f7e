"""The plain torch definition: sorted positions as one bit a token, all that remains of them beside packed slots."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_positions(positions: Tensor, index: Tensor, into: Tensor) -> None:
    """A bit for the position of each chosen slot, and none for any other.

    Args:
        positions: (B, H, K) int32; -1 for an empty slot.
        index: (B, H, N) into K, so that positions rise, behind -1s for none.
        into: (B, H, bytes) uint8, to be written, a bit for every position; the lowest of the first byte is position 0.
    """
    rows, heads, _ = index.shape
    chosen = positions.gather(2, index.clamp(min=0)).masked_fill(index < 0, -1)
    width = 8 * into.shape[2]
    bits = torch.zeros(rows, heads, width + 1, dtype=torch.uint8, device=positions.device)
    bits.scatter_(2, chosen.long().where(chosen >= 0, width), 1)  # the last column is thrown away
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=positions.device)
    into.copy_((bits[..., :width].reshape(*into.shape, 8) * weight).sum(-1, dtype=torch.uint8))


def unpack_positions(bitmap: Tensor, slots: int) -> Tensor:
    """(B, H, slots) int32: the set positions in rising order, behind -1 where there are fewer than `slots`."""
    shift = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = ((bitmap[..., None] >> shift) & 1).flatten(2).bool()  # (B, H, tokens)
    order = torch.arange(bits.shape[2], dtype=torch.int32, device=bitmap.device)
    found = order.where(bits, -1).sort(dim=-1).values
    if found.shape[2] < slots:
        found = torch.nn.functional.pad(found, (slots - found.shape[2], 0), value=-1)
    return found[..., found.shape[2] - slots :]
