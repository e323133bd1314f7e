"""Where launches are many, a prefill is as slow as its host: what each layer adds is bounded here.

Run by `test_kernels.test_triton_in_its_interpreter`.
"""

import pytest
import torch

import pyramidkv
from families import model, padded_batch
from kernel_testing import interpreted
from launches import of_a_prefill, of_an_eviction


@interpreted
@pytest.mark.parametrize(
    ("method", "lengths", "bound"),
    [("pyramidkv", (300,), 7), ("echo", (300,), 6), ("auto", (300,), 12), ("auto", (300, 170), 16)],
)
def test_interpreted_layer_launches_little(method, lengths, bound, monkeypatch):
    plain = model("gpt_neox-2-2-80")
    cache = pyramidkv.PyramidKVCache(plain.config, method=method, keep=0.5)
    ids, mask, positions = padded_batch(lengths)
    padding = {} if len(lengths) == 1 else {"attention_mask": mask, "position_ids": positions}
    first, *others = of_a_prefill(plain, cache, ids, monkeypatch, **padding)
    assert others
    for found in others:
        assert found.total() <= bound, dict(found)
    assert first.total() <= bound + 13  # what all layers share


@interpreted
@pytest.mark.parametrize(("method", "bound"), [("pyramidkv", 9), ("auto", 27)])
def test_interpreted_layer_launches_little_for_a_further_chunk(method, bound, monkeypatch):
    plain = model("gpt_neox-2-2-80")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method=method, keep=0.5)
    ids, _, _ = padded_batch((600,))
    cache.expect_prompt([600])
    with torch.no_grad():
        plain(ids[:, :300], past_key_values=cache)
    _, *others = of_a_prefill(plain, cache, ids[:, 300:], monkeypatch)
    assert others
    for found in others:
        assert 5 < found.total() <= bound, dict(found)


@interpreted
@pytest.mark.parametrize(("method", "bound"), [("pyramidkv", 11), ("rms", 11), ("knorm", 7), ("auto", 31)])
@torch.no_grad()
def test_interpreted_eviction_while_decoding_launches_little(method, bound, monkeypatch):
    plain = model("gpt_neox-2-2-80")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method=method, budget=100, slack=8)
    ids, _, _ = padded_batch((200,))
    plain(ids, past_key_values=cache)
    for token in range(5):
        plain(ids[:, token : token + 1], past_key_values=cache)
    found = of_an_eviction(cache.layers[1], [100], monkeypatch)
    assert 5 < found.total() <= bound, dict(found)
