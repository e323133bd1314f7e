"""Moving rotated queries, against the models' own rotary embedding at the other position."""

import importlib

import pytest
import torch

import pyramidkv
from families import NAMES, model
from pyramidkv.ops.turn import turn
from pyramidkv.rotary import Rotary


def by_the_model(plain, query, positions):
    """(B, H, Q, D) queries rotated by the model's own code at (B, Q) positions."""
    module = importlib.import_module(type(plain).__module__)
    base = getattr(plain, plain.base_model_prefix)
    arguments = {} if plain.config.model_type != "gemma3_text" else {"layer_type": "full_attention"}
    cos, sin = base.rotary_emb(query, positions, **arguments)
    return module.apply_rotary_pos_emb(query, query, cos, sin)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_query_moved_on_is_the_query_at_that_position(name):
    plain = model(name)
    size = getattr(plain.config, "head_dim", None) or plain.config.hidden_size // plain.config.num_attention_heads
    query = torch.randn(3, 4, 5, size, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 50, 90]]).expand(3, 5)
    distance = torch.tensor([0, 7, 61])
    angles = Rotary.of(plain.config).angles(distance.tolist(), query.device)
    moved = turn(by_the_model(plain, query, positions), *angles)
    expected = by_the_model(plain, query, positions + distance[:, None])
    assert (moved - expected).abs().max() < 2e-5
    assert distance[2] == 0 or (moved[2] - by_the_model(plain, query, positions)[2]).abs().max() > 0.1


@pytest.mark.parametrize("scaled", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
])  # fmt: skip
def test_scaled_frequencies_are_those_of_the_model(scaled):
    plain = model("llama-4-2-32")
    config = type(plain.config)(**plain.config.to_dict() | {"rope_parameters": scaled | {"rope_theta": 10000.0}})
    scaled_model = type(plain)(config)
    assert torch.allclose(Rotary.of(config).frequencies, scaled_model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_a_type_whose_angles_depend_on_the_length_is_refused():
    config = model("llama-4-2-32").config
    changed = type(config)(
        **config.to_dict() | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    )
    with pytest.raises(pyramidkv.UnsupportedError, match="rope_type='dynamic'"):
        Rotary.of(changed)
