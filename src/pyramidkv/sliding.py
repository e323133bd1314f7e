"""The layers that are not compressed: those whose attention has a sliding window."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that lets the prompt go: the plain one keeps its window as a view of all the keys."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values; return the window before them, and them."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[2] > 1 and self.keys.shape[2] < keys.shape[2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        # As in the other layers, no gradient flows through what is stored.
        self.keys, self.values = self.keys.detach(), self.values.detach()
        return keys, values

    def reset(self) -> None:
        """Forget everything; before transformers 5.20 the plain layer keeps its (zeroed) window and its batch size."""
        super().reset()
        self.keys, self.values, self.is_initialized = None, None, False  # type: ignore[assignment]
        self.cumulative_length = 0
