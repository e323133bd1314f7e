"""Which of the tokens of one forward are real; what the mask function hands to every layer in place of a mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of a forward, and what is worked out of them once for all layers."""

    valid: Tensor | None = None  # (B, Q) bool, False for padding; None: all real
    counts: tuple[int, ...] | None = None  # real tokens of each row; None with `valid`
    _known: dict[Any, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> NewTokens:
        """On the device of a layer; layers of one model may lie on several."""
        if self.valid is None or self.valid.device == device:
            return self
        return NewTokens(self.valid.to(device), self.counts)

    def without_last(self, tokens: int) -> NewTokens:
        """All but the last `tokens`, which must be real."""
        if self.valid is None or self.counts is None:
            return NewTokens()
        return NewTokens(self.valid[:, :-tokens], tuple(n - tokens for n in self.counts))

    def positions(
        self, seen: int, tokens: int, offset: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Positions of the `tokens` columns from `seen` on among the real tokens of their row, and the new `offset`.

        The former are (1 or B, 1, tokens) int32, -1 for padding; the latter, (B, 1, 1) int32, is what to add to a
        column for a row's position. No one may write into them: layers where all this is the same share them.
        """
        key = seen, tokens, offset, device
        if key not in self._known:
            self._known[key] = self._positions(*key)
        return self._known[key]

    def _positions(
        self, seen: int, tokens: int, offset: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        columns = torch.arange(seen, seen + tokens, dtype=torch.int32, device=device)[None, None]
        columns = columns if offset is None else columns + offset
        if self.valid is None:
            return columns, offset
        pads = (~self.valid).cumsum(-1, dtype=torch.int32)[:, None]
        columns = (columns - pads).masked_fill(~self.valid[:, None], -1)
        total = -pads[..., -1:]
        return columns, total if offset is None else offset + total


ONE_REAL = NewTokens()  # of a step of decoding, in which nothing is worked out: a constant to what compiles that
