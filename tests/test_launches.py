"""Where launches are many, a prefill is as slow as its host: what each layer adds is bounded here.

Run by `test_kernels.test_triton_in_its_interpreter`.
"""

import pytest

import pyramidkv
from families import model, padded_batch
from launches import of_a_prefill
from test_kernels import interpreted


@interpreted
@pytest.mark.parametrize(
    ("method", "lengths", "bound"),
    [("pyramidkv", (300,), 9), ("echo", (300,), 7), ("auto", (300,), 13), ("auto", (300, 170), 23)],
)
def test_a_layer_launches_little(method, lengths, bound, monkeypatch):
    plain = model("gpt_neox-2-2-80")
    cache = pyramidkv.PyramidKVCache(plain.config, method=method, keep=0.5)
    ids, mask, positions = padded_batch(lengths)
    padding = {} if len(lengths) == 1 else {"attention_mask": mask, "position_ids": positions}
    first, *others = of_a_prefill(plain, cache, ids, monkeypatch, **padding)
    assert others
    for found in others:
        assert found.total() <= bound, dict(found)
    assert first.total() <= bound + 8  # what all layers share
