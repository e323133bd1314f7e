"""Settings to tokens and bytes; and bytes that real caches never pass."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import config, model, padded_batch
from pyramidkv import CompressionConfig, ConfigError, PyramidKVCache
from pyramidkv.plan import Plan
from pyramidkv.shape import CacheShape, LayerShape, cache_shape
from pyramidkv.storage import Spec

SHAPE = CacheShape("llama", tuple(LayerShape(2, 32, None, 4) for _ in range(4)))
MIXED = CacheShape(
    "gemma3_text",
    (LayerShape(1, 16, 8, 2), LayerShape(1, 16, None, 2), LayerShape(1, 16, 8, 2), LayerShape(1, 16, None, 2)),
)


def plan(shape=SHAPE, **options):
    return Plan(CompressionConfig(**{"window": 4, "room": 10} | options), shape)


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv"])
def test_budget_is_the_average_over_the_layers(method):
    got = plan(method=method, budget=20).budgets(100)
    assert sum(got) == 80
    assert (len(set(got)) == 1) == (method == "snapkv")


def test_keep_is_a_share_of_the_prompt_but_no_layer_falls_below_the_floor():
    assert plan(method="snapkv", keep=0.25).budgets(100) == (25,) * 4
    assert sum(plan(keep=0.255).budgets(99)) == 100  # 0.255 * 4 * 99 = 100.98
    assert plan(keep=0.01).budgets(100) == (5,) * 4
    assert plan(keep=0.01).budgets(3) == (3,) * 4


def test_full_keeps_everything():
    assert plan(method="full").budgets(77) == (77,) * 4


def test_bytes_of_a_slot_are_its_key_its_value_and_its_position():
    assert Spec(1, 2, 32, 32, 2).slot_bytes == 2 * (2 * 32 * 2 + 4)


def test_bytes_are_counted_by_hand():
    # A slot: 264 bytes. 4 layers, 3 rows, room 10: 31,680 bytes fixed; 100 tokens over all layers: 79,200 more.
    bytes_ = 31_680 + 79_200
    got = plan(method="snapkv", bytes=bytes_).budgets(1000, batch=3)
    assert got == (25,) * 4
    assert plan(method="snapkv", bytes=bytes_).kv_bytes(1000, batch=3) == bytes_
    assert sum(plan(method="snapkv", bytes=bytes_ - 1).budgets(1000, batch=3)) == 99


def test_full_bytes_are_those_of_plain_keys_and_values():
    assert plan(budget=20).full_bytes(100, batch=3) == 3 * 4 * 2 * 2 * 32 * 2 * 100
    one = 2 * 16 * 2  # a token of one layer
    assert plan(MIXED, budget=20).full_bytes(100) == 2 * 100 * one + 2 * 7 * one  # windows of 8 keep 7
    assert plan(MIXED, budget=20).full_bytes(5) == 4 * 5 * one


def test_too_few_bytes_name_the_least():
    with pytest.raises(ConfigError, match="bytes=1000: a batch of 2 needs at least") as caught:
        plan(bytes=1000).budgets(50, batch=2)
    least = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    assert least == 2 * 4 * (10 + 5) * 264
    assert plan(bytes=least).budgets(50, batch=2) == (5,) * 4
    with pytest.raises(ConfigError):
        plan(bytes=least - 1).budgets(50, batch=2)


@given(
    st.sampled_from([SHAPE, MIXED]),
    st.sampled_from(["pyramidkv", "snapkv"]),
    st.integers(50_000, 10**6),
    st.integers(1, 3000),
    st.integers(1, 7),
    st.sampled_from([2, 4]),
)
def test_planned_bytes_are_never_passed_and_nearly_used(shape, method, bytes_, tokens, batch, itemsize):
    p = plan(shape, method=method, bytes=bytes_)
    try:
        used = p.kv_bytes(tokens, batch=batch, itemsize=itemsize)
    except ConfigError:
        return
    assert used <= bytes_
    budgets = p.budgets(tokens, batch=batch, itemsize=itemsize)
    if any(b < tokens for b in budgets):
        layer = shape.layers[shape.compressed[0]]
        windows = sum(1 for x in shape.layers if x.sliding_window) * 8 * 2 * 16 * itemsize * batch
        assert (
            bytes_ - used
            < windows + batch * Spec(1, layer.kv_heads, layer.head_dim, layer.head_dim, itemsize).slot_bytes
        )


def real_bytes(cache):
    """Bytes of every storage that the cache holds on to, found from the outside."""
    tensors = []
    for layer in cache.layers:
        held = vars(getattr(layer, "storage", None) or layer)
        tensors += [t for name, t in held.items() if isinstance(t, torch.Tensor) and t.ndim > 2]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3-4-2-32", "llama-4-2-32", "gpt_neox-2-2-80"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(70,), (70, 9, 41), (24, 70, 70, 70, 70, 70, 70)], ids=str)
@pytest.mark.parametrize("method", ["pyramidkv", "snapkv"])
def test_a_real_cache_stays_within_its_bytes(name, dtype, lengths, method):
    plain = model(name).to(dtype)
    plain.set_attn_implementation("pyramidkv")
    ids, mask, positions = padded_batch(lengths)
    options = {"method": method, "window": 4, "room": 6, "beta": 10.0}
    shape = cache_shape(plain.config)
    floor = Plan(CompressionConfig(bytes=10, **options), shape)
    with pytest.raises(ConfigError) as caught:
        floor.budgets(70, batch=len(lengths), itemsize=dtype.itemsize)
    least = int(re.search(r"at least (\d+) bytes", str(caught.value))[1])
    for limit in (least, least * 5 // 4, least * 2):
        cache = PyramidKVCache(plain.config, bytes=limit, **options)
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert real_bytes(cache) == cache.report().kv_bytes <= limit
        if len(set(lengths)) == 1:
            planned = cache.plan.kv_bytes(70, batch=len(lengths), itemsize=dtype.itemsize)
            assert cache.report().kv_bytes == planned
        for _ in range(6):  # until the room is used up
            plain(ids[:, :1], past_key_values=cache)
            assert real_bytes(cache) == cache.report().kv_bytes <= limit
        plain(ids[:, :9], past_key_values=cache)
        assert real_bytes(cache) == cache.report().kv_bytes <= limit


@torch.no_grad()
@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.floats(1.0, 3.0),
    st.integers(1, 8),
    st.sampled_from([1.0, 2.0, 20.0]),
)
def test_any_padded_batch_stays_within_its_bytes(lengths, factor, window, beta):
    plain = model("gemma3-2-2-64")
    plain.set_attn_implementation("pyramidkv")
    ids, mask, positions = padded_batch(lengths)
    least = len(lengths) * (2 * 2 * 64 * 4 * 16 + 3 * (window + 1 + 5) * Spec(1, 2, 64, 64, 4).slot_bytes)
    limit = int(least * factor)
    cache = PyramidKVCache(plain.config, bytes=limit, window=window, room=5, beta=beta)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert real_bytes(cache) <= limit


def test_a_sliding_layer_does_not_hold_on_to_the_prompt():
    plain = model("gemma3-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = PyramidKVCache(plain.config, keep=0.5, window=4)
    plain(torch.arange(100)[None], past_key_values=cache)
    window = config("gemma3-4-2-32").sliding_window
    assert cache.layers[1].keys.untyped_storage().nbytes() == 2 * (window - 1) * 32 * 4
