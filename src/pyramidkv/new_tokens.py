"""Which of the tokens of one forward are real; what the mask function hands to every layer in place of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a forward, the same for all layers."""

    valid: Tensor | None  # (B, Q) bool, False for padding; None: all real
    counts: tuple[int, ...] | None  # real tokens of each row; None with `valid`

    def to(self, device: torch.device) -> NewTokens:
        """On the device of a layer; layers of one model may lie on several."""
        if self.valid is None or self.valid.device == device:
            return self
        return NewTokens(self.valid.to(device), self.counts)

    def without_last(self, tokens: int) -> NewTokens:
        """All but the last `tokens`, which must be real."""
        if self.valid is None or self.counts is None:
            return self
        return NewTokens(self.valid[:, :-tokens], tuple(n - tokens for n in self.counts))


ALL_REAL = NewTokens(None, None)
