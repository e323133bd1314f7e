"""Rotary position embeddings, as far as moving a query that has one already: turning it further.

A rotated query at position p, turned by the angles of distance t, is the query at position p + t: rotations add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pyramidkv.errors import UnsupportedError
from pyramidkv.ops.turn import turn

# Types whose frequencies depend on the config alone. "dynamic" and "longrope" choose theirs by the length of a forward.
TYPES = ("default", "linear", "llama3", "yarn")


class Rotary:
    """The frequencies of a model's full-attention layers: (R / 2,) float32, R channels of a head being rotated."""

    def __init__(self, frequencies: Tensor) -> None:
        self.frequencies = frequencies
        self._copies: dict[torch.device, Tensor] = {}

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

    def turn(self, query: Tensor, distance: Tensor) -> Tensor:
        """(B, H, Q, D) rotated queries moved on by `distance` (B,) tokens; the first R channels, in halves."""
        angle = distance[:, None] * self._on(distance.device)
        return turn(query, angle.cos(), angle.sin())

    def _on(self, device: torch.device) -> Tensor:
        """The frequencies in float64 on a device, copied there once: the host would wait for each copy."""
        if device not in self._copies:
            self._copies[device] = self.frequencies.to(device, torch.float64, non_blocking=True)
        return self._copies[device]
