"""`PyramidKVCache`: a `transformers` cache that keeps, for each layer, row and KV head, only what is worth keeping.

Open this file first. The way of a token: a model's attention module calls `update` with its new keys and values and
gets back what to attend to; the key tensor it gets carries its layer, so that the attention function (`attention.py`),
which is called next with the same tensor, finds the way back and calls `PyramidKVLayer.attend`. That computes the
attention and, after a forward with more than one query, evicts: no layer then holds more than its budget.

Lengths that the model asks for (`get_seq_length`, `get_mask_sizes`) are logical, so positions are those of the whole
sequence; what is stored is physical and shorter. Scores, budgets and buffers live in files of their own.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pyramidkv import saved
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, PyramidKVError, UnsupportedError
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.methods import METHODS
from pyramidkv.plan import plan_of
from pyramidkv.recovery import reached, undo, undoable
from pyramidkv.rotary import Rotary
from pyramidkv.shape import cache_shape
from pyramidkv.sliding import SlidingLayer
from pyramidkv.usage import CacheUsage, LayerUsage

ATTENTION_NAME = "pyramidkv"


class PyramidKVCache(Cache):  # type: ignore[misc]
    """A compressed KV cache for one model; give it to `generate()` or to the model as `past_key_values`.

    The model must run with `model.set_attn_implementation("pyramidkv")`; `pyramidkv.compress(model, ...)` does both.

    Args:
        model_config: `model.config`.
        config: the settings; or give them as keyword options, see `CompressionConfig`.

    Raises:
        ConfigError: an option is unknown or outside what is allowed.
        UnsupportedError: the model's architecture is not one that can be compressed.
    """

    def __init__(self, model_config: Any, config: CompressionConfig | None = None, **options: Any) -> None:
        self.config = CompressionConfig.given(config, options)
        self.plan = plan_of(self.config, cache_shape(model_config))
        self._model_config = model_config.get_text_config(decoder=True)
        make_scorer = METHODS[self.config.method].scorer
        compressed = self.plan.shape.compressed
        rotary = Rotary.of(self._model_config) if getattr(make_scorer, "moves", False) else None
        layers: list[CacheLayerMixin] = []
        for index, shape in enumerate(self.plan.shape.layers):
            if shape.sliding_window is None:
                scorer = None if make_scorer is None else make_scorer(self.config)
                layer = PyramidKVLayer(index, compressed.index(index), self.plan, scorer)
                layer.rotary = rotary
                layers.append(layer)
            else:
                layers.append(SlidingLayer(sliding_window=shape.sliding_window))
        super().__init__(layers=layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by all layers: a forward that did not finish has added none."""
        return min(int(layer.get_seq_length()) for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """What `layer_idx` attends to, (columns, first column), once a forward that did not finish is undone."""
        seen = self.get_seq_length()
        if seen == 0 or isinstance(self.layers[layer_idx], PyramidKVLayer):
            return seen + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def recover(self) -> None:
        """Undo a forward that an error has ended in the middle; every forward begins with this.

        Raises `PyramidKVError` if layers have evicted since, so that what they held is gone: `reset()` the cache, or go
        on with a `fork()` from before.
        """
        seen, first = self.get_seq_length(), self.layers[0]
        if first.get_seq_length() == seen and (isinstance(first, SlidingLayer) or not reached([first], seen)):
            return  # every forward comes to the first layer first
        ours = [layer for layer in self.layers if isinstance(layer, PyramidKVLayer)]
        sliding = [layer for layer in self.layers if isinstance(layer, SlidingLayer) and layer.get_seq_length() != seen]
        begun = reached(ours, seen)
        if (sliding and seen) or not all(undoable(layer, seen) for layer in begun):
            raise PyramidKVError(
                "past_key_values: a forward did not finish, and layers have let go of what they held before it; "
                "reset() the cache, or go on with a fork() made before that forward"
            )
        for layer in reversed(begun):  # the first layer last: until then, this is not done
            undo(layer)
        for layer in sliding:
            layer.reset()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store the new keys and values of a layer and return those to attend to; see `PyramidKVLayer.update`."""
        if layer_idx == 0:
            self._check_attention()
            self.recover()
        elif self._skipped(layer_idx - 1, layer_idx):
            raise UnsupportedError(
                f"past_key_values: this model attends without {ATTENTION_NAME!r}, and would compress nothing; call "
                f"model.set_attn_implementation({ATTENTION_NAME!r}) on it and give the cache its own model.config, or "
                "use pyramidkv.compress(model, ...)"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_attention(self) -> None:
        chosen = getattr(self._model_config, "_attn_implementation", None)
        if chosen != ATTENTION_NAME:
            raise UnsupportedError(
                f"attn_implementation={chosen!r}: a PyramidKVCache is read by {ATTENTION_NAME!r} alone; call "
                f"model.set_attn_implementation({ATTENTION_NAME!r}) first and give the cache model.config itself, or "
                "use pyramidkv.compress(model, ...)"
            )

    def _skipped(self, before: int, layer_idx: int) -> bool:
        """Whether layer `before` got this forward's keys and no one attended to them; `layer_idx` is yet to get them.

        The config that the cache knows says which attention its own model runs, not which that of another would.
        """
        layer = self.layers[before]
        return isinstance(layer, PyramidKVLayer) and layer.seen == self.layers[layer_idx].get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, exactly, as far back as the last forward that evicted or packed anything.

        Args:
            tokens_to_remove: minus the number of tokens to take back, as in transformers; 0 takes back nothing. A
                positive number is the length to go back to, as in transformers before 5.20.

        Raises:
            ConfigError: not a whole number, or more tokens than were seen.
            UnsupportedError: something was evicted since then, or a sliding window has let its oldest tokens go.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)
        except TypeError:
            raise ConfigError(f"tokens_to_remove={tokens_to_remove!r}: must be a whole number") from None
        self.recover()
        seen = self.get_seq_length()
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(seen - tokens_to_remove, 0)
        if remove > seen:
            raise ConfigError(f"tokens_to_remove={tokens_to_remove}: the cache has seen {seen} tokens")
        for index, layer in enumerate(self.layers if remove else []):
            if isinstance(layer, PyramidKVLayer):
                if seen - remove < layer.settled:
                    raise UnsupportedError(
                        f"crop({tokens_to_remove}) would go back to {seen - remove} tokens, but layer {index} evicted "
                        f"or packed when it had seen {layer.settled}, and what it dropped is gone: only the "
                        f"{seen - layer.settled} tokens since then can be taken back; fork() the cache before a turn "
                        "to come back to that point"
                    )
            elif layer.get_seq_length() >= layer.sliding_window and not getattr(layer, "record_past", False):
                raise UnsupportedError(
                    f"crop({tokens_to_remove}): layer {index} has a sliding window of {layer.sliding_window} tokens "
                    "and has let older ones go; fork() the cache before what is to be taken back"
                )
        for layer in self.layers:
            layer.crop(-remove)

    def expect_prompt(self, tokens: Sequence[int]) -> None:
        """Say how many real tokens the prompt of each row will have, before its first chunk is fed.

        A share (`keep`, `share`) is then that of the whole prompt from the first chunk on; without, of what has been
        seen so far, and what an early chunk loses by that does not come back. `budget` and `bytes` do not need it.
        """
        self.recover()
        for layer in self.layers:
            if isinstance(layer, PyramidKVLayer):
                layer.expected = list(tokens)

    @property
    def records_past(self) -> bool:
        """Whether assisted decoding has announced itself (transformers 5.20 or newer)."""
        return any(getattr(layer, "record_past", False) for layer in self.layers)

    def expect_drafts(self, drafts: int) -> None:
        """Say that the newest `drafts` tokens of the next forward may be taken back: they are added, never evicted for.

        A session says so for assisted decoding; of a first forward, the tokens before them are the prompt.
        """
        for layer in self.layers:
            if isinstance(layer, PyramidKVLayer):
                layer.drafts = drafts

    def report(self) -> CacheUsage:
        """Tokens seen and kept and bytes held, of every layer."""
        usage = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PyramidKVLayer):
                usage.append(layer.usage())
                continue
            tensors = [t for t in (layer.keys, layer.values) if t is not None]
            size = sum(t.untyped_storage().nbytes() for t in tensors)
            kept = tensors[0].shape[2] if tensors else 0
            usage.append(
                LayerUsage(index, False, layer.get_seq_length(), kept, False, size, sum(t.nbytes for t in tensors))
            )
        return CacheUsage(self.config.method, tuple(usage))

    def empty(self) -> PyramidKVCache:
        """Another cache for the same model with the same settings, which has seen nothing."""
        return PyramidKVCache(self._model_config, self.config)

    def fork(self) -> PyramidKVCache:
        """An independent copy: continue one compressed context in several ways. It costs as many bytes as are held."""
        return copy.deepcopy(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the cache to a safetensors file, whole or not at all. It holds what was in the prompt: guard it so.

        Args:
            path: the file to make.
            overwrite: take the place of a file that is there already.

        Raises:
            ConfigError: the cache is empty.
            DataError: the file is there already, or can't be written; nothing is left behind.
        """
        self.recover()
        if self.get_seq_length() == 0:
            raise ConfigError("save: the cache has seen no tokens; run the model with it first")
        saved.write(path, self.layers, self.config, self._model_config, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, model_config: Any, *, device: Any = "cpu") -> PyramidKVCache:
        """A saved cache, which goes on exactly as the one that was saved.

        Args:
            path: a file that `save` made.
            model_config: `model.config` of the same model. One of the same shape with other weights can't be told
                from it.
            device: where the model is: `model.device`.

        Raises:
            DataError: no such file, or not ours, truncated, damaged, of another format or of another model; it says
                which.
        """
        config, fill = saved.read(path, model_config, device)
        cache = cls(model_config, config)
        fill(cache.layers)
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> PyramidKVCache:
        self.recover()
        memo |= {id(x): x for x in (self._model_config, self.plan, self.config)}  # of the model, not of the cache
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a PyramidKVCache can't be pickled; use cache.save(path) and PyramidKVCache.load(path, ...)"
        )

    def __repr__(self) -> str:
        return f"PyramidKVCache(method={self.config.method!r}, {self.config.describe()}, seen={self.get_seq_length()})"
