"""The step through `torch.compile`: compiled once a model and batch size, for all sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyramidkv.decode.step import Step, StepCache, step_of

_ATTRIBUTE = "_pyramidkv_step"


# Products with weights are not Inductor's (`products.py`); its own kernels, norms and the like, try out their tiles.
INDUCTOR: dict[str, Any] = {"coordinate_descent_tuning": True}


class CompiledStep:
    """A compiled step and the cache that it is given."""

    def __init__(self, forward: Callable[..., Any], layers: int) -> None:
        self.cache = StepCache(layers)
        self.step: Step = torch.compile(
            step_of(forward, self.cache), fullgraph=True, dynamic=False, options=dict(INDUCTOR)
        )


def compiled_step(model: Any, forward: Callable[..., Any], layers: int) -> CompiledStep:
    """The compiled step of a model, which keeps it as an attribute."""
    kept: CompiledStep | None = getattr(model, _ATTRIBUTE, None)
    if kept is None:
        kept = CompiledStep(forward, layers)
        setattr(model, _ATTRIBUTE, kept)
    return kept
