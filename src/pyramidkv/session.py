"""`compress(model, ...)`: every cache that the model makes for itself is a compressed one while the session is open."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.chunks import asked_chunk, check_chunk, check_prompt, feed
from pyramidkv.config import CompressionConfig
from pyramidkv.decode.graph import DecodeGraph, can_capture
from pyramidkv.errors import CompressionWarning, ConfigError, PyramidKVError, UnsupportedError
from pyramidkv.onednn import multiply_by_onednn
from pyramidkv.parallel import check_heads
from pyramidkv.plan import plan_of
from pyramidkv.rotations import rotate_at_once
from pyramidkv.rows import can_group, prefill_rows, row_groups
from pyramidkv.shape import cache_shape
from pyramidkv.slices import replace, slice_mlps
from pyramidkv.usage import CacheUsage


class Session:
    """A model under compression; a context manager, made by `compress`. Closing it puts the model back as it was."""

    def __init__(self, model: torch.nn.Module, config: CompressionConfig) -> None:
        self.model: Any = model
        self.config = config
        if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
            raise ConfigError(f"model is a {type(model).__name__}: it must be a transformers model")
        # An unsupported model, or settings that do not go with it, are errors here, not in the middle of a forward.
        plan_of(config, cache_shape(self.model.config))
        check_heads(self.model)
        self._cache: PyramidKVCache | None = None
        self._usage: CacheUsage | None = None
        self._evicted = False
        self._generates = False  # whether the newest cache stands in for one that generate() made
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._attention: str | dict[str, str] | None = None
        self._graph: DecodeGraph | None = None
        self._restore: list[Callable[[], None]] = []  # what puts the model back

    @property
    def is_open(self) -> bool:
        return self._hook is not None

    def open(self) -> Session:
        """Start compressing. Raises `ConfigError` if this or another session is open on the model."""
        if self.is_open or self.model.config._attn_implementation == ATTENTION_NAME:
            raise ConfigError(
                "model: is already under compression; close that session first, or call "
                "model.set_attn_implementation('sdpa') if it was you who set this attention"
            )
        if _is_compiled(self.model):
            raise UnsupportedError(
                "model: was given to torch.compile, which can't see through a cache that evicts; open the session on a "
                "model that was not (decode='compiled' compiles the step of decoding on a GPU)"
            )
        self._usage, self._evicted = None, False
        self._graph = self._make_graph()
        self._attention = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION_NAME)
        # The compiler of a torch.compile(model) made inside the session leaves what is ours alone.
        give_cache: Any = torch.compiler.disable(self._give_cache)  # type: ignore[no-untyped-call]
        self._hook = self.model.register_forward_pre_hook(give_cache, with_kwargs=True)
        self._restore = [
            slice_mlps(self.model),
            rotate_at_once(self.model),
            multiply_by_onednn(self.model),
            replace(self.model, "forward", self._forward),
            replace(self.model, "__reduce_ex__", _not_copied),  # what copy.deepcopy and pickle ask for
        ]
        if hasattr(self.model, "generate"):
            self._restore.append(replace(self.model, "generate", self._generate))
        return self

    def close(self) -> None:
        """Stop compressing; closing twice is harmless. Warns (`CompressionWarning`) if nothing was ever evicted."""
        self._close()

    def _close(self) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        for restore in self._restore:
            restore()
        if self._graph is not None:
            self._graph.close()
        self.model.set_attn_implementation(self._attention)
        self._settle()
        if self.config.method != "full" and not self._evicted:
            why = "no forward filled a cache" if self._usage is None else "every prompt fitted its budget"
            warnings.warn(f"{self.config.describe()}: nothing was compressed: {why}", CompressionWarning, stacklevel=3)

    def __enter__(self) -> Session:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._evicted = True  # the error is what the caller must see, not the warning
        self._close()

    @property
    def cache(self) -> PyramidKVCache:
        """The newest cache, to save, fork or crop; only while the session is open. Raises if there is none."""
        if self._cache is None:
            raise PyramidKVError("no cache: the model has not run with one since this session was opened")
        return self._cache

    def prefill(self, input_ids: Tensor, *, chunk: int, attention_mask: Tensor | None = None) -> PyramidKVCache:
        """Feed all but the last token of a prompt in chunks; give the cache, and the whole prompt, to `generate()`.

            cache = session.prefill(**inputs, chunk=2048)
            model.generate(**inputs, past_key_values=cache)

        Memory depends on the chunk and the budget, not on the prompt. Arguments and errors are those of `prefill`.
        """
        if not self.is_open:
            raise ConfigError("session: is closed; prefill() works inside `with pyramidkv.compress(model, ...)`")
        check_prompt(input_ids, attention_mask, chunk, self.config)
        self._settle()
        cache = self._make_cache()
        if input_ids.shape[-1] > 1:
            shown = None if attention_mask is None else attention_mask[:, :-1]
            feed(self.model, input_ids[:, :-1], cache, chunk=chunk, attention_mask=shown, read=False)
        return cache

    def report(self) -> CacheUsage:
        """What the newest cache holds (or held, once the session is closed). Raises if there was none."""
        if self._cache is not None:
            return self._cache.report()
        if self._attention is None:
            raise PyramidKVError(
                "nothing to report: the session was never opened; write `with pyramidkv.compress(...) as session:`"
            )
        if self._usage is None:
            raise PyramidKVError("nothing to report: the model has not run with a cache in this session")
        return self._usage

    def _give_cache(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:  # past_key_values may be among them
            kwargs = {**inspect.signature(self.model.forward).bind_partial(*args).arguments, **kwargs}
            args = ()
        if kwargs.get("output_attentions"):
            raise UnsupportedError("output_attentions=True: attention weights are never materialised; leave it out")
        past: Cache | None = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.model.config.get_text_config(decoder=True), "use_cache", True)
        if isinstance(past, PyramidKVCache):
            if past is not self._cache:
                self._settle()
                self._cache = past
                self._generates = False
            past.expect_drafts(_drafts(past, kwargs) if self._generates or past.records_past else 0)
            return args, kwargs
        if past is None and not use_cache:
            return args, kwargs
        # generate() makes an empty DynamicCache before its first forward; ours takes its place.
        if past is not None and (type(past) is not DynamicCache or past.get_seq_length() > 0):
            raise UnsupportedError(
                f"past_key_values is a {type(past).__name__} with {past.get_seq_length()} tokens: a session can only "
                "continue a PyramidKVCache; pass one, or leave out past_key_values and cache_implementation"
            )
        if past is not None and getattr(past, "offloading", False):
            raise UnsupportedError(
                "cache offloading does not work with compression; leave out cache_implementation='offloaded'"
            )
        self._settle()
        self._cache = self._make_cache()
        self._generates = past is not None
        if past is not None and any(getattr(layer, "record_past", False) for layer in past.layers):
            self._cache.activate_past_recording()  # assisted decoding, and sliding windows to be cropped
        self._cache.expect_drafts(_drafts(self._cache, kwargs) if self._generates else 0)
        return args, {**kwargs, "past_key_values": self._cache}

    def _generate(self, generate: Any) -> Any:
        """The model's `generate()`, but that chunks too small for the cache are refused before the model runs."""

        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            chunk, cache = asked_chunk(self.model, args, kwargs), kwargs.get("past_key_values")
            if chunk is not None:
                config = cache.config if isinstance(cache, PyramidKVCache) else self.config
                check_chunk(chunk, config, "prefill_chunk_size")
            return generate(*args, **kwargs)

        return run

    def _make_cache(self) -> PyramidKVCache:
        cache = PyramidKVCache(self.model.config, self.config)
        if self._graph is not None:
            for layer, pool in zip(cache.layers, self._graph.pools, strict=True):
                layer.pool = pool
        return cache

    def _make_graph(self) -> DecodeGraph | None:
        """What decodes, as `config.decode` asks; None: the model's own forward."""
        if not can_capture(self.model, self.config):
            return None
        layers = len(cache_shape(self.model.config).layers)
        return DecodeGraph(self.model, self.model.forward, layers, compiled=self.config.decode == "compiled")

    def _forward(self, forward: Any) -> Any:
        """The model's forward, but that a single new token a row goes through the captured step, and a large batch of
        prompts a few rows at a time."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            logits = None
            if not args and isinstance(cache, PyramidKVCache) and not self.model.training and _plain(kwargs):
                logits = self._logits(forward, cache, kwargs)
            if logits is not None:
                out = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
                return out.to_tuple() if kwargs.get("return_dict") is False else out
            if self._graph is not None:
                self._graph.settle()
            return forward(*args, **kwargs)

        return run

    def _logits(self, forward: Any, cache: PyramidKVCache, inputs: dict[str, Any]) -> Tensor | None:
        """The logits of a forward that asks for nothing else, if there is a better way to them than the model's."""
        ids = inputs["input_ids"]
        if cache.get_seq_length() > 0:
            if self._graph is None or ids.shape[1] > 1:
                return None
            cache.recover()
            return self._graph.step(cache, ids, inputs.get("position_ids"))
        groups = row_groups(*ids.shape)
        if len(groups) == 1 or not can_group(cache, inputs):
            return None
        if self._graph is not None:
            self._graph.settle()
        return prefill_rows(forward, cache, inputs, groups)

    def _settle(self) -> None:
        """Let the newest cache go, so that its memory is free before the next is filled; remember what it held."""
        if self._cache is not None and self._cache.get_seq_length() > 0:
            self._usage = self._cache.report()
            self._evicted |= self._usage.shrunk
        self._cache = None


def _is_compiled(model: Any) -> bool:
    """Whether `torch.compile` made the model, its forward, or a module in it."""
    modules = [model, *model.modules()]
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in modules
    )


def _not_copied(_: Any) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise UnsupportedError(
            "model: is under compression, and a copy would run this model's forward in place of its own; copy or "
            "pickle it outside the session (save_pretrained and state_dict work inside)"
        )

    return refuse


def _plain(kwargs: dict[str, Any]) -> bool:
    """Whether a forward of tokens asks for nothing but logits, and keeps no graph of gradients."""
    ids = kwargs.get("input_ids")
    known = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict",
             "logits_to_keep", "cache_position", "token_type_ids"}  # fmt: skip
    others = any(value is not None and value is not False for name, value in kwargs.items() if name not in known)
    cached = ids is not None and ids.ndim == 2 and kwargs.get("use_cache") is not False
    return cached and not others and not torch.is_grad_enabled()


def _drafts(cache: PyramidKVCache, kwargs: dict[str, Any]) -> int:
    """How many of a forward's newest tokens assisted decoding may take back: as many as it wants logits of.

    Of a first forward it wants those of the prompt's last token too. Plain `generate()` wants one token's logits.
    """
    asked, inputs = kwargs.get("logits_to_keep"), kwargs.get("input_ids")
    if not isinstance(asked, int) or asked < 2 or inputs is None:
        return 0
    queries: int = inputs.shape[1]
    if cache.get_seq_length() == 0:
        return asked - 1
    if asked != queries:
        raise UnsupportedError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) on a cache that has seen a prompt already: "
            "transformers would feed the whole prompt again; begin with an empty cache, or decode without an assistant"
        )
    return queries


def compress(model: torch.nn.Module, config: CompressionConfig | None = None, **options: Any) -> Session:
    """Compress every KV cache that `model` fills inside a `with` block; plain `generate()` and pipelines just work.

        with pyramidkv.compress(model, keep=0.25) as session:
            model.generate(**inputs, max_new_tokens=128)
        print(session.report())

    Args:
        model: a `transformers` causal language model of a supported family.
        config: the settings; or give them as keyword options, see `CompressionConfig`.

    Raises:
        ConfigError: an option is unknown or outside what is allowed; the model is already under compression.
        UnsupportedError: the model's architecture is not one that can be compressed.
    """
    return Session(model, CompressionConfig.given(config, options))
