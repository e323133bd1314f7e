"""How many kernels a layer launches beside attention, counted without a GPU.

Triton's interpreter stands for the device: a launch of a Triton kernel counts one, and so does every op of torch that
does more than look at the same memory in another way or ask for some. On a GPU a few ops launch two kernels. The
kernels are not run: nothing on the host may depend on what they write.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidkv.layer import PyramidKVLayer
from pyramidkv.ops import kernels

# Nothing is launched for them.
FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "is_same_size",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts by name what is launched within it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def of_an_eviction(layer, held, monkeypatch):
    """What a layer launches to keep `held` tokens of each row in the middle of decoding, as a Counter."""
    from triton.runtime.interpreter import GridExecutor

    counting = Launches()

    def launch(self, *args, **kwargs):
        counting.found[self.fn.__name__] += 1

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    with counting:
        layer.evict_decoded(held)
    return counting.found


def of_a_prefill(model, cache, ids, monkeypatch, **inputs):
    """What each layer launches from the new keys to the eviction, attention itself left out, as a list of Counters."""
    from triton.runtime.interpreter import GridExecutor

    counting, layers = Launches(), []

    def launch(self, *args, **kwargs):
        counting.found[self.fn.__name__] += 1

    def counted(method, begins):
        def call(self, *args, **kwargs):
            if begins:
                layers.append(Counter())
            counting.found = layers[-1]
            with counting:
                return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    monkeypatch.setattr(PyramidKVLayer, "update", counted(PyramidKVLayer.update, True))
    monkeypatch.setattr(PyramidKVLayer, "absorb", counted(PyramidKVLayer.absorb, False))
    model.set_attn_implementation("pyramidkv")
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1, **inputs)
    return layers
