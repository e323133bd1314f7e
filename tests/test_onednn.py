"""Products in float32 on a CPU by oneDNN: against float64, and a model that is as it was afterwards."""

import pytest
import torch
from torch.nn import Parameter

import pyramidkv
from families import NAMES, model, padded_batch
from kernel_testing import distance
from pyramidkv.onednn import multiply_by_onednn
from pyramidkv.ops.linear import onednn

pytestmark = pytest.mark.skipif(onednn._OP is None, reason="this torch has no product by oneDNN")


@pytest.fixture(autouse=True)
def amd(monkeypatch):
    monkeypatch.setattr(onednn, "_processor", lambda: "vendor_id : AuthenticAMD")


# rows, outputs, channels
SHAPES = [
    (1, 37, 80),
    (1, 5, 1100),
    (2, 130, 81),
    (7, 67, 33),
    (70, 64, 96),
    (300, 1, 320),
    (0, 8, 16),
    (512, 9, 40),
    (1100, 7, 24),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(shape, bias):
    rows, outputs, channels = shape
    x = torch.randn(channels + 3, 2, rows).permute(2, 1, 0)[..., 3:]  # neither rows nor channels lie side by side
    weight = Parameter(torch.randn(outputs, channels + 5)[:, :channels])
    more = Parameter(torch.randn(outputs)) if bias else None
    assert not onednn.serves(x, weight, more)  # a gradient may be asked for
    with torch.no_grad():
        assert onednn.serves(x, weight, more)
        got = onednn.linear(x, weight, more)
        exact = x.double() @ weight.double().T + (more.double() if bias else 0)
    assert got.shape == (rows, 2, outputs) and got.dtype == torch.float32
    assert rows == 0 or distance(got, exact) < 1e-5


def test_what_it_leaves_to_torch():
    x, weight = torch.randn(2, 8), Parameter(torch.randn(4, 8))
    with torch.no_grad():
        assert onednn.serves(x, weight, None)
        assert not onednn.serves(x.bfloat16(), weight, None)
        assert not onednn.serves(x, Parameter(weight.bfloat16()), None)
        assert not onednn.serves(x, weight, Parameter(torch.randn(4).half()))
        assert not onednn.serves(x.to("meta"), weight, None)
        assert not onednn.serves(x, weight.detach() * 1, None)  # a parametrisation, or weights of several devices
        with torch.autocast("cpu", torch.bfloat16):
            assert not onednn.serves(x, weight, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gives_the_same_and_is_put_back(name, monkeypatch):
    plain = model(name)
    ids, mask, _ = padded_batch((61, 40, 23))
    calls = []
    linear = onednn.linear
    monkeypatch.setattr("pyramidkv.onednn.linear", lambda *args: calls.append(1) or linear(*args))
    with torch.no_grad():
        before = plain(ids, attention_mask=mask).logits
        restore = multiply_by_onednn(plain)
        after = plain(ids, attention_mask=mask).logits
    assert len(calls) == sum(type(m) is torch.nn.Linear for m in plain.modules())
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    plain(ids).logits.sum().backward()
    assert all(p.grad is not None for p in plain.get_output_embeddings().parameters())
    restore()
    assert not any("forward" in vars(m) for m in plain.modules())


def test_a_session_multiplies_by_it_and_only_there(monkeypatch):
    calls = []
    linear = onednn.linear
    monkeypatch.setattr("pyramidkv.onednn.linear", lambda *args: calls.append(1) or linear(*args))
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((40,))
    with torch.no_grad():
        with pyramidkv.compress(plain, keep=0.5, window=4):
            plain(ids)
        inside = len(calls)
        plain(ids)
    assert inside == len(calls) > 0
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad(), pyramidkv.compress(plain, keep=0.5, window=4):
        plain(ids)
    assert inside == len(calls)


def test_it_says_why_it_multiplies_no_more(monkeypatch):
    assert onednn.why_no_onednn() is None
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert onednn.why_no_onednn() == "torch.backends.mkldnn is turned off"
    monkeypatch.setattr(onednn, "_processor", lambda: "vendor_id : GenuineIntel")
    assert onednn.why_no_onednn() == "MKL was measured to be slow on AMD's CPUs alone"
    monkeypatch.setattr(onednn, "_OP", None)
    assert "no product by oneDNN" in onednn.why_no_onednn()


def test_other_modules_are_left_alone():
    class Quantised(torch.nn.Linear):
        pass

    hooked = torch.nn.Linear(4, 4)
    hooked.forward = hooked.forward
    others = torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4, device="meta")
    several = torch.nn.Sequential(Quantised(4, 4), hooked, *others, torch.nn.Linear(4, 4))
    before = hooked.forward
    multiply_by_onednn(several)
    assert [("forward" in vars(m)) for m in several] == [False, True, False, False, True]
    assert hooked.forward is before
