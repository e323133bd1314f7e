"""The step through `torch.compile`: compiled once a model and batch size, for all sessions.

Imported only where a step is compiled: the compiler takes a second to load.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from pyramidkv.decode.step import Step, StepCache, step_of

_ATTRIBUTE = "_pyramidkv_step"


class SplitBias(CustomGraphPass):
    """`linear(x, weight, bias)` as `linear(x, weight) + bias`.

    Inductor turns the product of one row with a weight into a reduction, which reads the weight at nearly the memory's
    full speed and takes in what comes next; but only a product without a bias. For more rows it joins the two again.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=torch._C._nn.linear)):
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            if bias is None:
                continue
            with graph.inserting_after(node):
                total = graph.call_function(operator.add, (node, bias))
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            total.args = (node, bias)
            node.args, node.kwargs = tuple(node.args[:2]), {}

    def uuid(self) -> bytes:
        """What the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__,))


# Tuning: at batch 1 products become reductions, and the tiles of reductions are tried out.
INDUCTOR: dict[str, Any] = {"coordinate_descent_tuning": True, "pre_grad_custom_pass": SplitBias()}


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
