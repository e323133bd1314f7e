"""MLPs that take a prompt in slices: the same results, and the model as it was afterwards."""

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv import slices


@pytest.mark.parametrize("name", NAMES)
def test_slices_give_what_the_whole_gives(name):
    plain = model(name)
    ids, mask, _ = padded_batch((61, 40, 23))
    inputs = []
    hooks = [m.register_forward_hook(lambda _, args, out: inputs.append((args[0].shape, out.shape)))
             for n, m in plain.named_modules() if n.endswith(("mlp.down_proj", "mlp.dense_4h_to_h"))]  # fmt: skip
    layers = len(hooks)
    assert layers == plain.config.num_hidden_layers
    with torch.no_grad():
        whole = plain(ids, attention_mask=mask).logits
        before = list(inputs)
        inputs.clear()
        restore = slices.slice_mlps(plain, 50)
        parts = plain(ids, attention_mask=mask).logits
    assert (parts - whole).abs().max() < 1e-4 * whole.abs().max()
    assert len(before) == layers and len(inputs) == layers * 4  # 183 tokens
    assert all(shape[:-1].numel() <= 50 for pair in inputs for shape in pair)
    inputs.clear()
    plain(ids, attention_mask=mask)  # gradients: in one piece
    assert len(inputs) == layers
    restore()
    assert not any("forward" in vars(m) for m in plain.modules())


def test_a_session_slices_long_prompts_and_puts_the_model_back(monkeypatch):
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((61, 40, 23))
    options = {"keep": 0.4, "window": 6, "decode": "eager"}
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generate():
        with pyramidkv.compress(plain, **options):
            return plain.generate(ids, **arguments)

    whole = generate()
    monkeypatch.setattr(slices.slice_mlps, "__defaults__", (50,))
    sizes = []
    hook = plain.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[1]))
    assert torch.equal(generate(), whole)
    hook.remove()
    assert sizes[:4] == [46, 46, 46, 45] and sizes[4:] == [1] * 7
    assert not any("forward" in vars(m) for m in plain.modules())
