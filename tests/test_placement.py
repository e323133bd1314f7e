"""Layers of one model on several devices (`device_map`): each layer's cache is where the layer is."""

import pytest
import torch
import torch.fx.experimental._config
from transformers import AutoModelForCausalLM

import pyramidkv
from families import config, model, padded_batch
from pyramidkv.new_tokens import NewTokens
from pyramidkv.packed import PackedStorage

CASES = (
    {"keep": 0.4, "window": 4},
    {"method": "random", "keep": 0.4},
    {"method": "auto", "share": 0.3, "window": 8, "heads": "uniform"},
)


def generate(made, **options):
    ids, mask, _ = (t.to(made.get_input_embeddings().weight.device) for t in padded_batch((60, 33, 47)))
    with pyramidkv.compress(made, **options):
        return made.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)


def device_map(made, devices):
    """Layer by layer onto `devices`, the first of them for everything else."""
    placed = {}
    for name, child in made.named_children():
        if not hasattr(child, "layers"):
            placed[name] = devices[0]
            continue
        for part, _ in child.named_children():
            if part == "layers":
                placed |= {f"{name}.layers.{i}": devices[i % len(devices)] for i in range(len(child.layers))}
            else:
                placed[f"{name}.{part}"] = devices[0]
    return placed


@pytest.mark.parametrize("name", ["gpt_neox-2-2-32", "llama-4-2-32"])
def test_a_model_moved_in_layer_by_layer_generates_the_same(name, tmp_path):
    """accelerate's hooks, which bring what they are given to a layer's device; half of the weights come from disk."""
    pytest.importorskip("accelerate")
    made = model(name)
    made.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map(made, ("cpu", "disk")), offload_folder=tmp_path / "off"
    ).eval()
    assert "meta" in {p.device.type for p in placed.parameters()}
    for options in CASES:
        assert torch.equal(generate(placed, **options), generate(made, **options)), options


@pytest.mark.parametrize("options", CASES, ids=str)
@torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # what is not 0 there, no one can say
def test_a_layer_stores_on_the_device_of_its_keys(options):
    """Two kinds of device in one cache, the mask on the first: no data, but every tensor must be where its layer is."""
    model_config = config("llama-4-2-32")
    model_config._attn_implementation = "pyramidkv"
    cache = pyramidkv.PyramidKVCache(model_config, **options)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :7] = False
    for layer, device in zip(cache.layers, ("cpu", "meta", "cpu"), strict=True):
        for new in (NewTokens(valid, (40, 33)), NewTokens()):
            queries = 1 if new.valid is None else 40
            key, value = (torch.randn(2, 2, queries, 32, device=device) for _ in range(2))
            keys, values = layer.update(key, value)
            out = layer.attend(torch.randn(2, 4, queries, 32, device=device), keys, values, new, 0.1, 0.0)
            assert out.device.type == device
        stored = layer.storage
        tensors = [t for t in (*stored.view(), stored.positions, stored.valid(), layer.offset) if t is not None]
        assert isinstance(stored, PackedStorage) == (options.get("method") == "auto")
        assert {t.device.type for t in tensors} == {device}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["gpt_neox-2-2-32", "llama-4-2-32", "gemma3-4-2-32"])
def test_layers_on_two_gpus(name, tmp_path):
    made = model(name)
    made.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map(made, (0, 1))).eval()
    assert len({p.device for p in placed.parameters()}) == 2
    made = made.to("cuda:0")
    for options in CASES:
        assert torch.equal(generate(placed, **options), generate(made, **options)), options
