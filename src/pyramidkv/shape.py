"""What a model's config says about its cache: which layers, how many KV heads, how wide. No weights are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyramidkv.errors import ConfigError, UnsupportedError

# Families whose every path is tested (tests/test_families.py). They share the attention interface that this package
# plugs into, so another family is a line here once its tests pass.
FAMILIES = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")


@dataclass(frozen=True)
class LayerShape:
    """The cache of one layer."""

    kv_heads: int
    head_dim: int
    sliding_window: int | None  # None: full attention, which is what can be compressed
    heads: int  # query heads


@dataclass(frozen=True)
class CacheShape:
    """The cache of a model."""

    model_type: str
    layers: tuple[LayerShape, ...]

    @property
    def compressed(self) -> tuple[int, ...]:
        """Indices of the layers that are compressed: those with full attention."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.sliding_window is None)


def cache_shape(config: Any) -> CacheShape:
    """The cache shape of a `transformers` config. Raises `UnsupportedError` for models that can't be compressed."""
    if not hasattr(config, "get_text_config"):
        raise ConfigError(f"model_config is a {type(config).__name__}: it must be a transformers config: model.config")
    text = config.get_text_config(decoder=True)
    if text.model_type not in FAMILIES:
        raise UnsupportedError(f"model_type={text.model_type!r}: not supported; supported are {', '.join(FAMILIES)}")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * text.num_hidden_layers
    strange = set(kinds) - {"full_attention", "sliding_attention"}
    if strange:
        raise UnsupportedError(
            f"layer_types has {', '.join(sorted(strange))}: only full and sliding attention are known"
        )
    shape = CacheShape(
        text.model_type,
        tuple(LayerShape(kv_heads, head_dim, window if kind == "sliding_attention" else None, heads) for kind in kinds),
    )
    if not shape.compressed:
        raise UnsupportedError(
            f"every layer of this {text.model_type} has a sliding window of {window} tokens already: "
            "there is no full-attention layer to compress"
        )
    return shape
