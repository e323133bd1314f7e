"""Built-in shapes against what their publishers say."""

import pytest

from pyramidkv.errors import ConfigError
from pyramidkv.models.shapes import SHAPES, find_shape, shape_config
from pyramidkv.models.source import count_parameters
from pyramidkv.shape import FAMILIES, cache_shape

# Pythia: the table of the Pythia paper's repository. The others: the safetensors totals on their hub pages;
# gemma-3-4b is that model's 4,300,079,472 without its vision tower and projector (419,816,304).
PUBLISHED = {
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "phi-4": 14_659_507_200,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
}


def test_every_shape_has_a_published_count_and_every_family_a_shape():
    assert set(SHAPES) == set(PUBLISHED)
    assert {shape.model_type for shape in SHAPES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    config = shape_config(name)
    assert count_parameters(config) == PUBLISHED[name]
    assert config.max_position_embeddings >= 131_072


@pytest.mark.parametrize("name", SHAPES)
def test_layers_that_can_be_compressed(name):
    """Everything, except in Gemma 3, where every sixth layer attends to all tokens."""
    shape = cache_shape(shape_config(name))
    expected = range(5, len(shape.layers), 6) if name.startswith("gemma") else range(len(shape.layers))
    assert shape.compressed == tuple(expected)


def test_unknown_shape_names_its_neighbour():
    with pytest.raises(ConfigError, match=r"did you mean 'pythia-2\.8b'"):
        find_shape("pythia-2.8")
