"""The last layer of a forward whose output nobody reads, as that of all chunks of a prompt but the last.

Its keys and values are kept, and its queries judge them; but what it attends to, and its MLP, would change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyramidkv.cache import PyramidKVCache
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.slices import replace


@contextmanager
def unread(model: Any, cache: PyramidKVCache) -> Iterator[None]:
    """While entered, a model's last layer does no more than fill its cache; its output and the logits are garbage."""
    layer = cache.layers[-1]
    mlps = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    restore = replace(mlps[-1], "forward", lambda _: _same)
    if isinstance(layer, PyramidKVLayer):
        layer.unread = True
    try:
        yield
    finally:
        restore()
        if isinstance(layer, PyramidKVLayer):
            layer.unread = False


def _same(hidden: Any, *_: Any, **__: Any) -> Any:
    return hidden
