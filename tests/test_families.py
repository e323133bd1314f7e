"""Every supported family against the plain model (unlimited budget) and an independent reference (finite budgets)."""

import pytest
import torch
from transformers import DynamicCache

import pyramidkv
from families import NAMES, config, model, padded_batch
from pyramidkv.plan import Plan
from pyramidkv.shape import cache_shape
from reference import NAME as REFERENCE
from reference import Reference

LENGTHS = (61, 40, 23)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"method": "full"}, {"keep": 1.0}, {"budget": 400}], ids=str)
def test_unlimited_budget_is_the_plain_model(name, options):
    plain = model(name)
    ids, mask, _ = padded_batch(LENGTHS)
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(**arguments)
    cache = pyramidkv.PyramidKVCache(plain.config, **options)
    plain.set_attn_implementation("pyramidkv")
    assert torch.equal(plain.generate(**arguments, past_key_values=cache), expected)
    assert not cache.report().evicted


def reference_logits(plain, rows, **settings):
    """Logits of each row alone, for each of its forwards, by the masked reference."""
    layers = list(cache_shape(plain.config).compressed)
    out = []
    for forwards in rows:
        Reference(layers, **settings)
        plain.set_attn_implementation(REFERENCE)
        cache = DynamicCache()  # plain layers everywhere: the reference masks what a window does not show
        out.append([plain(ids[None], past_key_values=cache).logits[0] for ids in forwards])
    return out


def compressed_logits(plain, ids, mask, splits, **options):
    """Logits of the padded batch, for each forward of `splits` tokens, and the cache."""
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, **options)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out, start = [], 0
    for size in splits:
        now = slice(start, start + size)
        inputs = {"attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
        out.append(plain(ids[:, now], past_key_values=cache, **inputs).logits)
        start += size
    return out, cache


# Budgets for which the paper's formula gives whole numbers: with 3 layers, recent=8 and beta=3, an average of
# 8 + 3 n tokens means 8 + 5 n, 8 + 3 n and 8 + n.
CASES = [
    {"budget": 14, "window": 8, "beta": 3.0},
    {"budget": 14, "window": 5, "recent": 8, "beta": 3.0, "kernel": 1},
    {"budget": 11, "window": 12, "recent": 2, "beta": 3.0, "kernel": 3},
]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_finite_budgets_equal_the_masked_reference(name, settings):
    plain = model(name)
    splits = (61, 9, 1, 1, 4, 1)  # prompt, a chunk, two tokens, a chunk, a token
    prompt, prompt_mask, _ = padded_batch(LENGTHS)
    ids = torch.cat([prompt, padded_batch((16, 16, 16), seed=2)[0]], dim=1)
    mask = torch.cat([prompt_mask, torch.ones(3, 16, dtype=torch.long)], dim=1)
    rows = []
    for row, length in enumerate(LENGTHS):
        parts = ids[row].split(splits)
        rows.append([parts[0][61 - length :], *parts[1:]])
    expected = reference_logits(plain, rows, **settings)
    got, cache = compressed_logits(plain, ids, mask, splits, **settings)
    assert cache.report().evicted
    assert cache.get_seq_length() == sum(splits)
    for row, length in enumerate(LENGTHS):
        for step, logits in enumerate(got):
            shown = logits[row, 61 - length :] if step == 0 else logits[row]
            torch.testing.assert_close(shown, expected[row][step], rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"keep": 0.5, "window": 4}, {"budget": 13, "window": 3, "recent": 5}], ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_storage_is_the_plan_byte_for_byte(name, options, batch):
    plain = model(name)
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, room=19, **options)
    plain(torch.randint(3, 101, (batch, 53)), past_key_values=cache)
    plan = Plan(cache.config, cache_shape(config(name)))
    budgets = plan.budgets(53, batch=batch, itemsize=4)
    report = [layer for layer in cache.report().layers if layer.compressed]
    assert [layer.kept_tokens for layer in report] == list(budgets)
    for layer, kept in zip(report, budgets, strict=True):
        shape = plan.shape.layers[layer.layer]
        slots = batch * shape.kv_heads * (kept + 19)
        assert layer.kv_bytes == slots * (2 * shape.head_dim * 4 + 4)
        assert layer.full_kv_bytes == batch * shape.kv_heads * 53 * 2 * shape.head_dim * 4
    sliding = sum(layer.full_kv_bytes for layer in cache.report().layers if not layer.compressed)
    assert plan.kv_bytes(53, batch=batch, itemsize=4) == sum(layer.kv_bytes for layer in report) + sliding


def test_a_row_is_the_same_alone_and_in_any_padded_batch():
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    ids, mask, positions = padded_batch((50, 31, 44))
    for method in pyramidkv.methods():
        if method == "full":
            continue
        options = {"method": method, "keep": 0.4, "window": 6}
        together = pyramidkv.PyramidKVCache(plain.config, **options)
        with torch.no_grad():
            plain(ids, attention_mask=mask, position_ids=positions, past_key_values=together)
        for row, length in enumerate((50, 31, 44)):
            alone = pyramidkv.PyramidKVCache(plain.config, **options)
            with torch.no_grad():
                plain(ids[row : row + 1, 50 - length :], past_key_values=alone)
            for one, many in zip(alone.layers, together.layers, strict=True):
                kept = one.held[0]
                assert kept == many.held[row], method
                mine = one.storage.positions[0, :, : one.storage.length][:, -kept:]
                theirs = many.storage.positions[row, :, : many.storage.length][:, -kept:]
                assert torch.equal(mine, theirs), method
                close = (one.storage.view()[0][0, :, -kept:] - many.storage.view()[0][row, :, -kept:]).abs() < 1e-4
                # Packed, a difference in the last bit may move a number to the next code.
                assert close.float().mean() > (0.99 if method == "auto" else 0.9999), method
