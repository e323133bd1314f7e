"""Built-in model shapes: the published dimensions of well-known models, without their weights.

A shape is enough to plan memory and, with random weights, to measure speed. Rotary scaling is left out: it changes
neither sizes nor times, and random weights give it nothing to say. Nothing here reads a network or a disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyramidkv.config import unknown
from pyramidkv.errors import ConfigError

DEFAULT_MODEL = "neox-16m"  # not a shape: the trained model that ships with this package
RANDOM = "random:"  # before a shape's name: that shape with random weights

# Positions are computed, not stored, so a random model may as well take any prompt.
_MAX_POSITIONS = 262_144


@dataclass(frozen=True)
class Shape:
    """The dimensions of one published model."""

    name: str
    hub: str  # where its trained weights are
    dtype: str  # that of the published weights
    model_type: str
    sizes: dict[str, Any]  # arguments of the family's config class


def _pythia(size: str, hidden: int, layers: int, heads: int, vocab: int = 50304) -> Shape:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    }
    return Shape(f"pythia-{size}", f"EleutherAI/pythia-{size}", "float16", "gpt_neox", sizes)


def _gqa(
    name: str,
    hub: str,
    model_type: str,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocab: int,
    **more: Any,
) -> Shape:
    """A model with grouped-query attention; `heads` are its query and KV heads."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
    }
    return Shape(name, hub, "bfloat16", model_type, sizes | more)


_ALL = (
    _pythia("70m", 512, 6, 8),
    _pythia("160m", 768, 12, 12),
    _pythia("410m", 1024, 24, 16),
    _pythia("1b", 2048, 16, 8),
    _pythia("1.4b", 2048, 24, 16),
    _pythia("2.8b", 2560, 32, 32),
    _pythia("6.9b", 4096, 32, 32, vocab=50432),
    _pythia("12b", 5120, 36, 40, vocab=50688),
    _gqa(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B",
        "llama",
        hidden=4096,
        inner=14336,
        layers=32,
        heads=(32, 8),
        vocab=128256,
    ),
    _gqa(
        "mistral-7b-v0.3",
        "mistralai/Mistral-7B-v0.3",
        "mistral",
        hidden=4096,
        inner=14336,
        layers=32,
        heads=(32, 8),
        vocab=32768,
        sliding_window=None,
    ),
    _gqa("qwen2.5-7b", "Qwen/Qwen2.5-7B", "qwen2", hidden=3584, inner=18944, layers=28, heads=(28, 4), vocab=152064),
    _gqa(
        "qwen3-8b",
        "Qwen/Qwen3-8B",
        "qwen3",
        hidden=4096,
        inner=12288,
        layers=36,
        heads=(32, 8),
        vocab=151936,
        head_dim=128,
    ),
    # The Phi-3 architecture; Phi-3 models themselves have a sliding window in every layer, this one has none.
    _gqa(
        "phi-4",
        "microsoft/phi-4",
        "phi3",
        hidden=5120,
        inner=17920,
        layers=40,
        heads=(40, 10),
        vocab=100352,
        sliding_window=None,
        pad_token_id=0,  # the class's own default lies outside smaller vocabularies
    ),
    _gqa(
        "gemma-3-1b",
        "google/gemma-3-1b-pt",
        "gemma3_text",
        hidden=1152,
        inner=6912,
        layers=26,
        heads=(4, 1),
        vocab=262144,
        head_dim=256,
        sliding_window=512,
    ),
    # The text half of a model that also sees.
    _gqa(
        "gemma-3-4b",
        "google/gemma-3-4b-pt",
        "gemma3_text",
        hidden=2560,
        inner=10240,
        layers=34,
        heads=(8, 4),
        vocab=262208,
        head_dim=256,
        sliding_window=1024,
    ),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


def find_shape(name: str, given: str | None = None) -> Shape:
    """The built-in shape of that name. Raises `ConfigError` with the near name if there is none."""
    if name not in SHAPES:
        raise ConfigError(f"model={given or name!r}: its shape is {unknown(name, SHAPES)}")
    return SHAPES[name]


def shape_config(name: str, given: str | None = None) -> Any:
    """The `transformers` config of a built-in shape; `given` is the model's name as the user gave it."""
    from transformers import AutoConfig

    shape = find_shape(name, given)
    return AutoConfig.for_model(
        shape.model_type, **shape.sizes, max_position_embeddings=_MAX_POSITIONS, dtype=shape.dtype
    )
