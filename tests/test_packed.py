"""Storage in 8, 4 and 2 bits: codes against a quantiser of loops, bytes against the plan, rows against each other."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.ops import bitmap, quantize
from pyramidkv.ops.pages import Pages
from pyramidkv.packed import PackedStorage, packed_bytes
from pyramidkv.plan import Plan
from pyramidkv.shape import cache_shape


def rounded(numbers, bits):
    """Numbers as their group's codes give them back, by the definition: float16 zero point and step, nearest code."""
    zero = torch.tensor(min(numbers)).half().item()
    step = max(torch.tensor((max(numbers) - zero) / (2**bits - 1)).half().item(), torch.finfo(torch.float16).tiny)
    return [zero + step * min(max(round((x - zero) / step), 0), 2**bits - 1) for x in numbers]


@pytest.mark.parametrize(("bits", "width"), list(itertools.product((8, 4, 2), (32, 80, 128))))
def test_codes_by_hand(bits, width):
    make = torch.Generator().manual_seed(width)
    key = torch.randn(2, 3, 64, width, generator=make) * 5 + 3
    value = torch.randn(2, 3, 64, width, generator=make)
    keys = quantize.dequantize_keys(quantize.quantize_keys(key, bits), torch.float32)
    values = quantize.dequantize_values(quantize.quantize_values(value, bits), torch.float32)
    assert keys.shape == key.shape
    for b, page, channel in ((0, 0, 0), (1, 2, width - 1), (0, 1, width // 2)):
        by_hand = torch.tensor(rounded(key[b, page, :, channel].tolist(), bits))
        # A number half way between two codes may go either way in float32.
        assert ((keys[b, page, :, channel] - by_hand).abs() < 1e-3).float().mean() > 0.96
    size = 64 if width == 128 else width
    for b, page, token in ((0, 0, 0), (1, 2, 63)):
        by_hand = torch.tensor(rounded(value[b, page, token, -size:].tolist(), bits))
        assert ((values[b, page, token, -size:] - by_hand).abs() < 1e-3).float().mean() > 0.96


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_lie_in_planes(bits):
    planes, rows = 8 // bits, 64 * bits // 8
    codes = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    codes[0], codes[1] = 0, 2**bits - 1  # so that zero points are 0 and scales 1
    packed = quantize.quantize_keys(codes.float()[None], bits).codes[0]
    assert packed.shape == (rows, 5)
    for row, channel in itertools.product(range(rows), range(5)):
        by_hand = sum(int(codes[row + plane * rows, channel]) << (bits * plane) for plane in range(planes))
        assert packed[row, channel] == by_hand


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_errors_stay_within_half_a_step(bits):
    key = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    packed = quantize.quantize_keys(key, bits)
    error = (quantize.dequantize_keys(packed, torch.float32) - key).abs()
    assert (error <= packed.scale.float().unsqueeze(-2) * 0.5 + 2e-3).all()
    assert packed.codes.shape == (1, 2, 8 * bits, 64)


def test_empty_slots_widen_no_range():
    key = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(2))
    valid = torch.arange(64).expand(1, 1, 64) >= 20
    poisoned = key.masked_fill(~valid[..., None], 1e4)
    alone = quantize.dequantize_keys(quantize.quantize_keys(key, 4, valid), torch.float32)
    beside = quantize.dequantize_keys(quantize.quantize_keys(poisoned, 4, valid), torch.float32)
    assert torch.equal(alone[:, :, 20:], beside[:, :, 20:])
    nothing = quantize.quantize_keys(poisoned, 4, torch.zeros_like(valid))
    assert quantize.dequantize_keys(nothing, torch.float32).isfinite().all()


@given(st.integers(1, 70), st.data())
def test_positions_survive_the_bitmap(tokens, data):
    sets = [sorted(data.draw(st.sets(st.integers(0, tokens - 1)))) for _ in range(4)]
    slots = max(map(len, sets)) + data.draw(st.integers(0, 3))
    padded = torch.tensor([[-1] * (slots - len(s)) + s for s in sets], dtype=torch.int32).reshape(2, 2, slots)
    index = torch.arange(slots).expand(padded.shape).masked_fill(padded < 0, -1)
    packed = torch.full((2, 2, math.ceil(tokens / 8) + data.draw(st.integers(0, 2))), 255, dtype=torch.uint8)
    bitmap.pack_positions(padded, index, packed)
    assert torch.equal(bitmap.unpack_positions(packed, slots), padded)


def slots_of(rows, heads, slots, width, seed=3):
    """Keys, values and positions (every other token) of a layer."""
    make = torch.Generator().manual_seed(seed)
    key = torch.randn(rows, heads, slots, width, generator=make)
    value = torch.randn(rows, heads, slots, width, generator=make)
    return key, value, torch.arange(0, 2 * slots, 2, dtype=torch.int32).expand(rows, heads, slots)


def everything(positions):
    return torch.arange(positions.shape[2]).expand(positions.shape)


def test_the_newest_slots_are_kept_as_they_are():
    key, value, positions = slots_of(2, 2, 150, 32)
    packed = PackedStorage.gather(
        key, value, positions, everything(positions), [150, 150], 4, recent=20, tokens=300, room=3, padded=False
    )
    keys, values = packed.view()
    empty = packed.length - 150
    assert empty == -130 % 64
    assert torch.equal(keys[:, :, -20:], key[:, :, -20:])
    assert torch.equal(values[:, :, -20:], value[:, :, -20:])
    assert 0 < (keys[:, :, empty:-20] - key[:, :, :-20]).norm() / key.norm() < 0.12
    assert torch.equal(packed.positions[:, :, empty:], positions)
    assert packed.valid().sum(1).tolist() == [150, 150]
    packed.append(key[:, :, :2], value[:, :, :2], torch.full((1, 1, 2), 300, dtype=torch.int32), 3)
    assert torch.equal(packed.view()[0][:, :, -2:], key[:, :, :2])
    swapped = packed.rows(torch.tensor([1, 0]))
    assert torch.equal(swapped.view()[0], packed.view()[0].flip(0))


@pytest.mark.parametrize("bits", [16, 4])
def test_heads_may_keep_unequal_numbers(bits):
    key, value, positions = slots_of(2, 3, 190, 32)
    limits = torch.tensor([[10, 74, 140], [110, 11, 73]])  # the 10 newest among them
    rank = torch.rand(2, 3, 180, generator=torch.Generator().manual_seed(5)).argsort(-1).argsort(-1)
    old = torch.arange(180).expand(2, 3, 180).masked_fill(rank >= limits[..., None] - 10, -1).sort(-1).values
    index = torch.cat([old, torch.arange(180, 190).expand(2, 3, 10)], dim=-1)
    pages = int(((old >= 0).sum(-1) + 63).div(64, rounding_mode="floor").sum(1).max())
    packed = PackedStorage.gather(
        key, value, positions, index, limits.int(), bits, pages, recent=10, tokens=380, room=2, padded=False
    )
    assert packed.pages.row_pages == pages
    keys, values = packed.view()
    valid = packed.valid()
    assert keys.shape == (2, 3, packed.pages.slots + 10, 32) and valid.shape == keys.shape[:3]
    assert torch.equal(valid, packed.positions >= 0)
    swapped = packed.rows(torch.tensor([1, 0, 1]))
    for b, h in itertools.product(range(2), range(3)):
        kept = index[b, h][index[b, h] >= 0]
        mine = valid[b, h]
        assert torch.equal(packed.positions[b, h, mine], 2 * kept.int())
        for got, old in ((keys, key), (values, value)):
            error = (got[b, h, mine] - old[b, h, kept]).abs()
            assert not error[-10:].any()
            assert not error.any() if bits == 16 else len(kept) < 12 or 0.01 < error.max() < 0.5
        assert torch.equal(swapped.view()[0][1 - b, h, mine], keys[b, h, mine])
    assert packed.nbytes == packed_bytes(packed.spec, 190, bits, pages, recent=10, tokens=380, room=2)


def test_unequal_heads_show_few_numbers_of_slots():
    """Where heads differ, their slots are those of the head that has most, and an eighth more at the most."""
    seen = set()
    for most in range(1000):
        layout = torch.tensor([[0, most], [most, most // 2], [0, 0]], dtype=torch.int32)[:, None]
        pages = Pages(None, None, layout, even=False)
        assert 64 * most <= pages.slots <= max(64 * most, 64 * most * 9 // 8)
        seen.add(pages.slots)
        valid = pages.valid(3)
        assert valid.shape == (1, 2, pages.slots + 3) and valid[..., -3:].all()
        assert valid.sum(-1).tolist() == [[64 * most + 3, 64 * (most // 2) + 3]]
    assert len(seen) == 16 + 6 * 8 + 1  # up to 15 each, then 8 a doubling


def test_spare_slots_come_once_and_again_when_they_are_used_up():
    def pages(most, least=0):
        layout = torch.tensor([[0, most], [most, 2], [5, 0]], dtype=torch.int32)[:, None]
        return Pages(None, None, layout, even=False, least=least)

    few = pages(17)  # from 16 to 32 numbers of pages are even ones
    spare = few.with_spare()
    assert (few.slots, spare.slots) == (18 * 64, 22 * 64)
    assert spare.with_spare() is spare and spare.written_over().slots == spare.slots
    assert spare.valid(3).sum(-1).tolist() == few.valid(3).sum(-1).tolist() == [[17 * 64 - 5 + 3, 2 * 64 + 3]]
    for most, slots in ((19, 22), (22, 22), (23, 28), (33, 44)):
        assert pages(most, spare.slots).with_spare().slots == slots * 64
    even = Pages(None, None, torch.zeros(3, 1, 2, dtype=torch.int32), even=True)
    assert even.with_spare() is even


def test_more_slots_than_pages_is_an_error():
    key, value, positions = slots_of(1, 1, 150, 32)
    with pytest.raises(ValueError, match="pages=2: the heads of a row need 3"):
        PackedStorage.gather(
            key, value, positions, everything(positions), [150], 4, 2, recent=10, tokens=300, room=0, padded=False
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-4-2-32", "gpt_neox-2-2-80"])
@pytest.mark.parametrize("lengths", [(150,), (150, 70, 20)], ids=str)
def test_pages_of_16_bits_change_nothing(name, lengths, monkeypatch):
    """A prompt, another chunk with its eviction, and decoding, as without pages."""
    plain = model(name)
    plain.set_attn_implementation("pyramidkv")
    ids, mask, positions = padded_batch(lengths)
    more = torch.randint(3, 101, (len(lengths), 60), generator=torch.Generator().manual_seed(8))
    heads = cache_shape(plain.config).layers[0].kv_heads
    monkeypatch.setattr("pyramidkv.eviction.shared_pages", lambda *_: 4 * heads)
    found = []
    for packs in (False, True):
        monkeypatch.setattr(pyramidkv.CompressionConfig, "packs", lambda *_, packs=packs: packs)
        cache = pyramidkv.PyramidKVCache(plain.config, method="snapkv", keep=0.6, window=8, room=3)
        out = [plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]]
        out.append(plain(more[:, :50], past_key_values=cache).logits)
        out += [plain(more[:, i : i + 1], past_key_values=cache).logits for i in range(50, 60)]
        found.append(torch.cat(out, dim=1))
    assert isinstance(cache.layers[0].storage, PackedStorage)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_family_in_fewer_bits(name):
    plain = model(name)
    plain.set_attn_implementation("pyramidkv")
    ids = torch.randint(3, 101, (2, 200), generator=torch.Generator().manual_seed(4))
    exact = {}
    for bits in (16, 8, 4, 2):
        cache = pyramidkv.PyramidKVCache(plain.config, method="rms", keep=0.9, recent=16, bits=bits, room=5)
        plain(ids[:, :150], past_key_values=cache)
        report = [layer for layer in cache.report().layers if layer.compressed]
        sliding = sum(layer.kv_bytes for layer in cache.report().layers if not layer.compressed)
        planned = Plan(cache.config, cache_shape(plain.config)).kv_bytes(150, batch=2, itemsize=4)
        assert sum(layer.kv_bytes for layer in report) + sliding == planned
        chunk = plain(ids[:, 150:190], past_key_values=cache).logits
        steps = [plain(ids[:, i : i + 1], past_key_values=cache).logits for i in range(190, 200)]
        exact[bits] = torch.cat([chunk, *steps], dim=1)
    for bits, most in ((8, 0.02), (4, 0.25), (2, 0.9)):
        error = (exact[bits] - exact[16]).norm() / exact[16].norm()
        assert 0 < error < most


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 2])
def test_a_row_is_packed_alone_as_in_a_padded_batch(bits):
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    lengths = (190, 101, 20)
    ids, mask, positions = padded_batch(lengths)
    options = {"method": "rms", "keep": 0.7, "recent": 16, "bits": bits}
    together = pyramidkv.PyramidKVCache(plain.config, **options)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=together)
    for row, length in enumerate(lengths):
        alone = pyramidkv.PyramidKVCache(plain.config, **options)
        plain(ids[row : row + 1, 190 - length :], past_key_values=alone)
        for one, many in zip(alone.layers, together.layers, strict=True):
            kept = one.held[0]
            assert kept == many.held[row]
            assert torch.equal(one.storage.positions[0, :, -kept:], many.storage.positions[row, :, -kept:])
            for mine, theirs in zip(one.storage.view(), many.storage.view(), strict=True):
                close = (mine[0, :, -kept:] - theirs[row, :, -kept:]).abs() < 1e-4
                assert close.float().mean() > 0.99  # an ulp of the model may move a number to the next code


@torch.no_grad()
@pytest.mark.parametrize("method", ["auto", "pyramidkv"])
@pytest.mark.parametrize("share", [0.3, 0.2])
def test_a_share_of_the_bytes_is_never_passed_and_nearly_used(method, share):
    plain = model("qwen2-4-2-64")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method=method, share=share, kv_dtype="float16", room=4)
    plain(torch.randint(3, 101, (2, 900)), past_key_values=cache)
    held = cache.report()
    assert held.full_kv_bytes == 2 * 900 * 3 * 2 * 2 * 64 * 2
    assert 0.9 * share < held.kv_bytes / held.full_kv_bytes <= share
    assert held.evicted


@pytest.mark.parametrize("method", ["auto", "rms"])
def test_a_share_buys_as_many_tokens_as_it_pays_for(method):
    shape = cache_shape(model("qwen2-4-2-64").config)
    plan = Plan(pyramidkv.CompressionConfig(method=method, share=0.25, room=4), shape)
    budgets = plan.budgets(900)
    one_more = pyramidkv.CompressionConfig(method=method, budget=sum(budgets) // 3 + 1, room=4)
    assert plan.kv_bytes(900) <= 0.25 * plan.full_bytes(900) < Plan(one_more, shape).kv_bytes(900)


@torch.no_grad()
def test_kv_dtype_stores_half_and_computes_as_before():
    plain = model("gpt_neox-2-2-80")
    plain.set_attn_implementation("pyramidkv")
    ids = torch.randint(3, 101, (1, 90))
    logits = []
    for kv_dtype in ("auto", "float16"):
        cache = pyramidkv.PyramidKVCache(plain.config, keep=0.5, window=8, kv_dtype=kv_dtype)
        plain(ids[:, :70], past_key_values=cache)
        assert cache.layers[0].storage.dtype == (torch.float32 if kv_dtype == "auto" else torch.float16)
        logits.append(plain(ids[:, 70:], past_key_values=cache).logits)
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.05


@torch.no_grad()
def test_packed_caches_generate_in_beams_and_batches():
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((150, 120))
    with pyramidkv.compress(plain, method="auto", keep=0.8, recent=16, room=8) as session:
        out = plain.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, pad_token_id=0)
    assert out.shape == (2, 156)
    assert session.report().kv_bytes < 0.4 * session.report().full_kv_bytes


def test_packing_alone_counts_as_compression(recwarn):
    plain = model("llama-4-2-32")
    with pyramidkv.compress(plain, method="auto", keep=1.0) as session:
        plain.generate(padded_batch((150,))[0], max_new_tokens=2, pad_token_id=0)
    assert not session.report().evicted
    assert session.report().shrunk
    assert not [w for w in recwarn if issubclass(w.category, pyramidkv.CompressionWarning)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3: must be one of 16, 8, 4, 2"),
        ({"bits": True}, "bits=True"),
        ({"kv_dtype": "float8"}, "kv_dtype='float8': unknown"),
        ({"share": 0.0, "keep": None}, "share=0.0: must be a share of the full cache's bytes"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(pyramidkv.ConfigError) as caught:
        pyramidkv.CompressionConfig(**{"keep": 0.5, **options})
    assert message in str(caught.value)
    with pytest.raises(pyramidkv.ConfigError, match="stores what the model computes"):
        pyramidkv.CompressionConfig(method="full", bits=4)
