"""Rotary position embeddings in one launch: the models' own numbers to the last bit, and the model put back."""

import copy
import importlib

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from kernel_testing import DTYPES, interpreted
from pyramidkv import rotations
from pyramidkv.ops import rotate as package
from pyramidkv.ops.rotate import naive, rotate

# batch, query heads, KV heads, tokens, head size, rotated channels
SHAPES = [
    (1, 2, 2, 70, 80, 20),
    (7, 4, 1, 5, 128, 128),
    (2, 6, 2, 33, 64, 32),
    (1, 1, 1, 1, 96, 96),
    (3, 2, 1, 40, 32, 8),
    (2, 3, 3, 65, 72, 18),
]


def case(shape, dtype, device="cpu"):
    """Queries and keys as views of one fused projection, and the angles of any positions."""
    batch, heads, kv_heads, tokens, size, rotated = shape
    fused = torch.randn(batch, tokens, heads + kv_heads, size).to(dtype).transpose(1, 2).to(device)
    angle = torch.randn(batch, tokens, rotated // 2) * 3
    cos, sin = (torch.cat([t, t], -1).to(dtype).to(device) for t in (angle.cos(), angle.sin()))
    return fused[:, :heads], fused[:, heads:], cos, sin


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_rotation_of_pairs(shape):
    query, key, cos, sin = case(shape, torch.float32)
    half = shape[-1] // 2
    turns = torch.complex(cos[..., :half], sin[..., :half]).to(torch.complex128)[:, None]
    for got, vectors in zip(rotate(query, key, cos, sin), (query, key), strict=True):
        one, two, rest = vectors.double().split([half, half, vectors.shape[-1] - 2 * half], -1)
        turned = torch.complex(one, two) * turns
        assert got.shape == vectors.shape
        assert (got - torch.cat([turned.real, turned.imag, rest], -1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_it_is_what_the_models_compute(kind, dtype):
    theirs = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}").apply_rotary_pos_emb
    partial = kind in ("gpt_neox", "phi3")
    given = case((2, 4, 2, 17, 80, 20 if partial else 80), dtype)
    for got, expected in zip(naive.rotate(*given), theirs(*given), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_on_a_cpu_is_rotated_to_the_last_bit(shape, one_row):
    batch, heads, kv_heads, _, size, rotated = shape
    for dtype in DTYPES:
        query, key, cos, sin = case((batch, heads, kv_heads, 1, size, rotated), dtype)
        sin = torch.cat([sin[..., : rotated // 2], sin[..., rotated // 2 :] * 0.5], -1)  # halves may differ
        if one_row:
            cos, sin = cos[:1], sin[:1]
        given = [t.clone() for t in (query, key, cos, sin)]
        with torch.no_grad():
            got = rotate(query, key, cos, sin, plain=None)
        for mine, expected in zip(got, naive.rotate(*given), strict=True):
            assert mine.shape == expected.shape and torch.equal(mine, expected)
        assert all(torch.equal(a, b) for a, b in zip(given, (query, key, cos, sin), strict=True))


def checked(shape, dtype, device, one_row):
    from pyramidkv.ops.rotate import triton

    query, key, cos, sin = case(shape, dtype, device)
    if one_row:
        cos, sin = cos[:1], sin[:1]
    got = triton.rotate(query, key, cos, sin)
    for mine, expected in zip(got, naive.rotate(query, key, cos, sin), strict=True):
        assert torch.equal(mine, expected)
    assert got[0].transpose(1, 2).is_contiguous() and got[1].is_contiguous()


@interpreted
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_rotation(shape, one_row):
    checked(shape, torch.float16, "cpu", one_row)
    checked(shape, torch.float32, "cpu", one_row)


@pytest.mark.gpu
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 32, 32, 4097, 80, 20), (2, 32, 8, 1000, 128, 128)])
def test_rotation_on_a_gpu(shape, dtype, one_row):
    checked(shape, dtype, "cuda", one_row)


def by_definition(monkeypatch):
    """Have the definition stand in for the kernel, and note the shapes that it is given."""
    seen = []
    monkeypatch.setattr(rotations, "rotate", lambda *given: seen.append(given[0].shape) or naive.rotate(*given[:4]))
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_every_family_rotates_by_ours_and_is_put_back(name, monkeypatch):
    plain = model(name)
    ids, mask, positions = padded_batch((61, 40, 23))
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask, position_ids=positions).logits
        seen = by_definition(monkeypatch)
        restore = rotations.rotate_at_once(plain)
        got = plain(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(got, expected)
    assert len(seen) == plain.config.num_hidden_layers
    restore()
    assert not any("forward" in vars(m) for m in plain.modules())
    plain(ids)
    assert len(seen) == plain.config.num_hidden_layers


def test_a_session_rotates_by_ours_and_another_model_does_not(monkeypatch):
    plain, other = model("gpt_neox-2-2-80"), model("gpt_neox-2-2-80")
    other = copy.deepcopy(other) if other is plain else other
    ids, mask, _ = padded_batch((61, 40, 23))
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pyramidkv.compress(plain, keep=0.4, window=6, decode="eager"):
        expected = plain.generate(ids, **arguments)
    seen = by_definition(monkeypatch)
    with pyramidkv.compress(plain, keep=0.4, window=6, decode="eager"):
        other(ids)
        assert not seen
        got = plain.generate(ids, **arguments)
    assert torch.equal(got, expected)
    assert len(seen) == 6 * plain.config.num_hidden_layers
    assert not any("forward" in vars(m) for m in plain.modules())


def test_a_forward_that_was_replaced_is_left_alone(monkeypatch):
    plain = copy.deepcopy(model("llama-4-2-32"))
    attention = plain.model.layers[0].self_attn
    attention.forward = attention.forward  # as accelerate's hooks do
    seen = by_definition(monkeypatch)
    rotations.rotate_at_once(plain)
    plain(torch.arange(9)[None])
    assert len(seen) == plain.config.num_hidden_layers - 1


def test_why_naive_names_what_is_in_the_way(monkeypatch):
    query, key, cos, sin = case(SHAPES[0], torch.float32)
    assert "on cpu" in package.why_naive(query, key, cos, sin)
    monkeypatch.setattr(package.kernels, "why_no_triton", lambda _: None)
    assert package.why_naive(query, key, cos, sin) is None
    assert "unequal dtypes" in package.why_naive(query, key, cos.double(), sin)
    assert "float64" in package.why_naive(*(t.double() for t in (query, key, cos, sin)))
    assert "gradient" in package.why_naive(query.requires_grad_(), key, cos, sin)
