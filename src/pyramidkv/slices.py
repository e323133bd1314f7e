"""A prompt goes through each MLP a slice of its tokens at a time.

Between its two products an MLP holds several times what goes in, for every token of the prompt: no step of a prefill
needs more memory. Tokens do not see each other there, so that slices give what the whole gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SLICE = 4096  # tokens: enough to keep a GPU busy


def slice_mlps(model: torch.nn.Module, tokens: int = SLICE) -> Callable[[], None]:
    """Have every MLP of a model take at most `tokens` tokens at a time while no gradient is asked for.

    Returns what puts the model back as it was. An MLP is a module that its layer calls `mlp`, as all of the supported
    families do.
    """
    mlps = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    return replace_each(mlps, "forward", functools.partial(_in_slices, tokens=tokens))


def replace_each(modules: Iterable[Any], name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """`replace` in several modules; returns what puts the old ones back."""
    undo = [replace(module, name, make) for module in modules]

    def restore() -> None:
        for put_back in undo:
            put_back()

    return restore


def replace(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Put `make(method)` in the place of a module's method `name`; returns what puts the old one back.

    That may have been an attribute of the module's own (accelerate's hooks are), and is then one again.
    """
    before = vars(module).get(name)
    setattr(module, name, make(getattr(module, name)))

    def restore() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return restore


def _in_slices(forward: Any, tokens: int) -> Any:
    @functools.wraps(forward)
    def sliced(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or hidden.shape[:-1].numel() <= tokens or torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        flat = hidden.flatten(0, -2)[None]  # (1, tokens, channels): what a layer gives for one row
        number = -(-flat.shape[1] // tokens)
        out: Tensor | None = None
        at = 0
        for part in flat.tensor_split(number, dim=1):
            done = forward(part)
            out = done.new_empty(1, flat.shape[1], done.shape[-1]) if out is None else out
            out[:, at : at + part.shape[1]] = done
            at += part.shape[1]
        assert out is not None
        return out.view(*hidden.shape[:-1], out.shape[-1])

    return sliced
