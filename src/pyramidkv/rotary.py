"""Rotary position embeddings, as far as moving a query that has one already: turning it further.

A rotated query at position p, turned by the angles of distance t, is the query at position p + t: rotations add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pyramidkv.errors import UnsupportedError

# Types whose frequencies depend on the config alone. "dynamic" and "longrope" choose theirs by the length of a forward.
TYPES = ("default", "linear", "llama3", "yarn")


Turn = tuple[Tensor, Tensor]  # cosines and sines, (B, R / 2) float32 each


class Rotary:
    """The frequencies of a model's full-attention layers: (R / 2,) float32, R channels of a head being rotated."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        # The last angles, of a device and distances: all layers of a forward ask for the same.
        self._last: tuple[object, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model_config: Any) -> Rotary:
        """Those of a `transformers` text config. Raises `UnsupportedError` for a type whose angles are not fixed."""
        parameters = model_config.rope_parameters
        kind: dict[str, Any] = {}
        if "full_attention" in parameters:  # one set for each type of layer
            parameters, kind = parameters["full_attention"], {"layer_type": "full_attention"}
        name = parameters.get("rope_type", "default")
        if name not in TYPES:
            raise UnsupportedError(f"rope_type={name!r}: queries can be moved for {', '.join(TYPES)}")
        if name != "default":
            return cls(ROPE_INIT_FUNCTIONS[name](model_config, torch.device("cpu"), **kind)[0].float())
        size = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
        rotated = int(size * parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        return cls(1.0 / parameters["rope_theta"] ** exponent)

    def angles(self, distance: Sequence[int], device: torch.device) -> Turn:
        """Cosines and sines, (B, R / 2) float32 each, that move (B, H, *, D) rotated vectors on by `distance` tokens.

        `distance` has a number for each row; `ops.turn.turn` moves the vectors.
        """
        of, last = (device, tuple(distance)), self._last
        if last is None or last[0] != of:
            angle = torch.tensor(distance, dtype=torch.float64)[:, None] * self.frequencies.double()
            # Not pinned: so small a copy is taken along at once, and new pinned memory would have to wait.
            cos, sin = torch.stack([angle.cos(), angle.sin()]).float().to(device, non_blocking=True)
            last = self._last = of, cos, sin
        return last[1:]
