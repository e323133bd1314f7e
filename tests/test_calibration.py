"""Layer budgets by weight, bits by layer, and both measured on a model."""

import itertools
import json

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.budget import layer_budgets
from pyramidkv.calibration import AMOUNTS, Tried, _try, _ways, between, spend
from pyramidkv.errors import ConfigError, UnsupportedError


def test_weights_divide_the_budget():
    def budgets(weights, total, prompt=1000, least=10):
        return layer_budgets(
            "pyramid", layers=3, total=total, prompt=prompt, window=4, least=least, beta=20, weights=weights
        )

    assert budgets((3.0, 2.0, 1.0), 600) == (300, 200, 100)
    assert budgets((0.3, 0.2, 0.1), 601) == (301, 200, 100)
    assert budgets((98.0, 1.0, 1.0), 1600) == (1000, 300, 300)  # what a layer can't use goes to the others alike
    assert budgets((1.0, 1.0, 1e-9), 600, least=50) == (275, 275, 50)


WRONG = ["", "1,,2", "1, two", (1.0, 0.0), (1.0, -1.0), (1.0, float("inf")), 3, ()]
WRONG += ["1:3", "1:", "1:8:4", "1:8.0", ((1.0, 5),), ((1.0, 8, 4),), ((0.0, 8),), ((1.0, True),)]


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_must_be_positive_numbers(wrong):
    with pytest.raises(ConfigError, match="layers="):
        pyramidkv.CompressionConfig(method="auto", share=0.5, layers=wrong)


def test_a_layer_may_have_bits_of_its_own():
    config = pyramidkv.CompressionConfig(method="auto", share=0.5, layers=" 1.5, 1: 8,0.5 ")
    assert config.layers == (1.5, (1.0, 8), 0.5) and config.weights == (1.5, 1.0, 0.5)
    assert [config.bits_of(rank) for rank in range(3)] == [4, 8, 4]
    again = pyramidkv.CompressionConfig(method="auto", share=0.5, layers=json.loads(json.dumps(config.layers)))
    assert again == config
    plain = pyramidkv.CompressionConfig(method="snapkv", keep=0.5, layers="1:8,1")
    assert plain.packs(0) and not plain.packs(1)


def goes_on_the_same_from_a_file(cache, plain, batch, path):
    """Saved and loaded, a cache has the same settings and gives the same logits for one more token."""
    ids, mask, positions = batch
    cache.save(path)
    again = pyramidkv.PyramidKVCache.load(path, plain.config)
    assert again.config == cache.config
    step = {"attention_mask": torch.cat([mask, mask[:, -1:]], 1), "position_ids": positions[:, -1:] + 1}
    one, two = (plain(ids[:, -1:], past_key_values=c, **step).logits for c in (cache, again))
    assert torch.equal(one, two)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "auto"}, {"method": "snapkv", "bits": 16}], ids=str)
def test_layers_in_bits_of_their_own_hold_what_all_layers_in_those_bits_would(options, tmp_path):
    """Layer by layer the codes of a cache with one precision; the bytes of the plan; decoding, and a file."""
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    bits = [(8, 2, 16, 4)[rank % 4] for rank in range(plain.config.num_hidden_layers)]
    ids, mask, positions = padded_batch((700, 450))

    def filled(**more):
        cache = pyramidkv.PyramidKVCache(plain.config, room=1, **{**options, "keep": 0.5, **more})
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return cache

    mixed = filled(layers=[(1.0, n) for n in bits])
    for rank, n in enumerate(bits):
        one, other = (cache.layers[rank].storage for cache in (mixed, filled(bits=n)))
        assert type(one) is type(other) and one.nbytes == other.nbytes
        for a, b in zip(one.view(), other.view(), strict=True):
            assert torch.equal(a, b)
    assert mixed.report().kv_bytes == mixed.plan.kv_bytes(700, batch=2, itemsize=4)
    shared = filled(keep=None, share=0.2, layers=[(1.0, n) for n in bits])
    assert 0.18 < shared.report().kv_bytes / shared.report().full_kv_bytes <= 0.2
    goes_on_the_same_from_a_file(mixed, plain, (ids, mask, positions), tmp_path / "a.cache")


def test_weights_must_fit_the_model():
    plain = model("llama-4-2-32")
    with pytest.raises(ConfigError, match="has 2 numbers"):
        pyramidkv.PyramidKVCache(plain.config, method="auto", share=0.5, layers="1,2")
    with pytest.raises(ConfigError, match="layers="):
        pyramidkv.CompressionConfig(method="full", layers="1,2")


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": "auto", "share": 0.12}, {"method": "snapkv", "keep": 0.4}], ids=str)
def test_layers_hold_what_their_weights_say(options, tmp_path):
    """Unequal layers, padded rows, decoding, the bytes of the plan, and a file that remembers the weights."""
    plain = model("llama-4-2-32")
    count = plain.config.num_hidden_layers
    weights = tuple(float(2 + i) for i in range(count))
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, layers=weights, room=1, **options)
    ids, mask, positions = padded_batch((700, 450))
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    kept = [layer.held for layer in cache.layers]
    assert all(low[row] < high[row] for low, high in itertools.pairwise(kept) for row in (0, 1))
    assert [row[0] for row in kept] == list(cache.plan.budgets(700, batch=2, itemsize=4))
    even = pyramidkv.PyramidKVCache(plain.config, room=1, **options)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=even)
    assert cache.report().kv_bytes == pytest.approx(even.report().kv_bytes, rel=0.03)
    goes_on_the_same_from_a_file(cache, plain, (ids, mask, positions), tmp_path / "a.cache")


def only_one_matters(plain):
    """The model, in which what attention gives is lost in all layers that are compressed but the last; its index."""
    compressed = pyramidkv.shape.cache_shape(plain.config).compressed
    for index in compressed[:-1]:
        ways_out = [
            m
            for name, m in plain.named_modules()
            if name.endswith((f".{index}.self_attn.o_proj", f".{index}.attention.dense"))
        ]
        assert len(ways_out) == 1
        for parameter in ways_out[0].parameters():
            parameter.data.zero_()
    return compressed[-1]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_calibration_gives_to_the_layer_that_matters(name):
    """All the others get the least amount and the last one the rest; its losses are the whole cache's."""
    plain = model(name)
    last = only_one_matters(plain)
    ids, _, _ = padded_batch((660,))
    context, asked = ids[:, :600], [(ids[:, 600:620], ids[:, 620:])]
    config = pyramidkv.CompressionConfig(method="snapkv", keep=0.2, window=8, recent=8, room=1)
    truth = plain(ids).logits[0, 619:-1].log_softmax(-1)
    before = plain.config._attn_implementation
    weights = pyramidkv.calibrate(plain, [(context, asked)], config)
    assert plain.config._attn_implementation == before
    count = len(weights)
    left = min(2.25, count - 0.2 * (count - 1))
    assert weights[:-1] == pytest.approx([weights[0]] * (count - 1))
    assert 1 < 0.2 * weights[-1] / weights[0] < left + 0.03
    assert sum(weights) == pytest.approx(count, abs=0.01)
    plain.set_attn_implementation("pyramidkv")
    tried = _try(plain, context, asked, _ways(plain, config, 600))[-1]
    assert [way.amount for way in tried] == list(AMOUNTS) and len({way.loss for way in tried}) == len(tried)
    for way in tried:  # the other layers' tokens count for nothing, so the cache may lose them too
        cache = pyramidkv.PyramidKVCache(
            plain.config, method="snapkv", budget=round(way.amount * 120), window=8, recent=8, room=1
        )
        plain(context, past_key_values=cache)
        nbytes = cache.layers[last].usage().kv_bytes
        said = plain(ids[:, 600:-1], past_key_values=cache).logits[0, 19:].log_softmax(-1)
        assert way.divergence == pytest.approx(float((truth.exp() * (truth - said)).sum(-1).mean()), rel=2e-3)
        answer = ids[0, 620:, None]
        assert way.lost == pytest.approx(float((truth - said).gather(1, answer).mean()), rel=2e-3, abs=1e-6)
        assert way.nbytes == nbytes


def tried(*ways):
    """Ways of a layer from (amount, bits, bytes, loss)."""
    return [Tried(*way) for way in ways]


def test_bytes_go_where_they_save_most():
    """Worked by hand: slopes of layer one -8, -3 a byte, of layer two -5, then a way in 8 bits at -2."""
    one = tried((1, 4, 10, 15.0), (2, 4, 11, 7.0), (3, 4, 13, 1.0), (4, 4, 99, 1.0))
    two = tried((1, 4, 10, 9.0), (2, 4, 11, 4.0), (1.5, 8, 13, 0.0), (2.5, 4, 12, 3.9))

    def spent(nbytes):
        return [(way.amount, way.bits) for way in spend([one, two], nbytes)]

    assert spent(20) == [(1, 4), (1, 4)]
    assert spent(20.5) == [(1.5, 4), (1, 4)]  # a part of the first step
    assert spent(22) == [(2, 4), (2, 4)]
    assert spent(23) == [(2.5, 4), (2, 4)]
    assert spent(24.5) == [(3, 4), (2, 4)]  # a way in other bits is taken whole or not at all
    assert spent(26) == [(3, 4), (1.5, 8)]
    assert spent(1000) == [(3, 4), (1.5, 8)]  # and nothing is spent for nothing


def test_what_answers_lose_counts_a_tenth_and_gains_nothing():
    assert Tried(1, 4, 10, 0.25, 0.5).loss == pytest.approx(0.3)
    assert Tried(1, 4, 10, 0.25, -0.5).loss == 0.25


def test_between_two_amounts_losses_change_evenly_in_their_logarithm():
    ways = between(tried((1, 4, 10, 16.0), (4, 4, 22, 1.0), (1, 8, 20, 2.0)))
    assert {way.bits for way in ways} == {4, 8} and len(ways) == 3 + 11
    middle = next(way for way in ways if way.amount == 2.5)
    assert (middle.bits, middle.nbytes, middle.loss) == (4, 16, pytest.approx(4.0))


def test_spending_is_as_good_as_any_choice():
    """Convex losses and steps of one price: no other choice of ways loses less for the bytes."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(4):
        gains = torch.rand(4, generator=generator).sort(descending=True).values.cumsum(0)
        layers.append(tried((0, 4, 0, 5.0), *((k + 1, 4, k + 1, 5 - float(gains[k])) for k in range(4))))
    for nbytes in range(17):
        best = min(
            sum(w.loss for w in ways) for ways in itertools.product(*layers) if sum(w.nbytes for w in ways) <= nbytes
        )
        assert sum(way.loss for way in spend(layers, nbytes)) == pytest.approx(best)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"share": 0.2}, {"share": 0.3, "bits": 8}, {"keep": 0.4, "bits": 16}], ids=str)
def test_what_calibration_says_fits_the_bytes(options):
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((700,))
    asked = [(ids[:, 650:660], ids[:, 660:]), (ids[:, 640:641], ids[:, 641:680])]
    prompts = [(ids[:, :650], asked), (ids[:, 20:640], asked[1:])]
    found = pyramidkv.calibrate(plain, prompts, **options)
    config = pyramidkv.CompressionConfig(method="auto", layers=found, room=1, **options)
    assert sum(config.weights) / len(found) == pytest.approx(1, abs=1e-3)
    assert {config.bits_of(rank) for rank in range(len(found))} <= {
        config.bits,
        2 * config.bits if config.bits < 8 else config.bits,
    }
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, config)
    plain(ids, past_key_values=cache)
    if config.share is not None:
        assert cache.report().kv_bytes / cache.report().full_kv_bytes <= config.share


@torch.no_grad()
def test_a_way_that_keeps_all_tokens_as_they_are_loses_nothing():
    """In bytes of the dtype that is stored, whatever the model computes in."""
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((640,))
    config = pyramidkv.CompressionConfig(method="snapkv", keep=0.6, kv_dtype="float16", room=1)
    ways = _ways(plain, config, 600)
    plain.set_attn_implementation("pyramidkv")
    for tried in _try(plain, ids[:, :600], [(ids[:, 600:610], ids[:, 610:])], ways):
        assert abs(tried[-1].loss) < 1e-5 < tried[0].loss
        assert tried[-1].nbytes == pytest.approx(tried[3].nbytes / 0.6, rel=0.02)


def test_calibration_says_what_it_needs():
    plain = model("llama-4-2-32")
    ids, _, _ = padded_batch((640,))
    with pytest.raises(ConfigError, match="prompts is empty"):
        pyramidkv.calibrate(plain, [], share=0.5)
    with pytest.raises(ConfigError, match="has no question"):
        pyramidkv.calibrate(plain, [(ids, [])], share=0.5)
    two, none = ids.repeat(2, 1), ids[:, :0]
    for wrong in ((two, [(ids, ids)]), (ids, [(ids[0], ids)]), (ids, [(ids, ids), (ids, none)]), (none, [(ids, ids)])):
        with pytest.raises(ConfigError, match="prompts: one has shape"):
            pyramidkv.calibrate(plain, [wrong], share=0.5)
    with pytest.raises(ConfigError, match="prompts=: one has 640 tokens, and all are kept"):
        pyramidkv.calibrate(plain, [(ids, [(ids, ids)])], budget=4096)
    with pytest.raises(UnsupportedError, match="keeps all tokens"):
        pyramidkv.calibrate(plain, [(ids, [(ids, ids)])], method="full")
    assert plain.config._attn_implementation != "pyramidkv"
