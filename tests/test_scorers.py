"""What each method chooses, on inputs where the right choice is plain to see; and a method of one's own."""

import pytest
import torch

import pyramidkv
from families import model, padded_batch
from pyramidkv.config import CompressionConfig
from pyramidkv.methods import METHODS
from pyramidkv.rotary import Rotary
from pyramidkv.scorers import Observation

KEYS = 10


def observation(query=None, key=None, valid=None, positions=None, layer=0, frequencies=()):
    key = torch.zeros(1, 1, KEYS, 2) if key is None else key
    query = torch.zeros(1, 1, KEYS, 2) if query is None else query
    if positions is None:
        positions = torch.arange(key.shape[2], dtype=torch.int32).expand(*key.shape[:3])
    tokens = tokens_of(positions)
    return Observation(query, key, key, 1.0, valid, positions, tokens, layer, back=back(frequencies, tokens))


def back(frequencies, tokens):
    return Rotary(torch.tensor(frequencies, dtype=torch.float32)).angles([-n for n in tokens], torch.device("cpu"))


def tokens_of(positions):
    return (positions.amax((1, 2)) + 1).tolist()


def score(method, seen, **options):
    amount = {"window": 2, "recent": 2, "kernel": 1, "budget": 4, "heads": "uniform"} | options
    config = CompressionConfig(method=method, **amount)
    return METHODS[method].scorer(config).score(seen)


def best(scores, count):
    return sorted(scores[0, 0].topk(count).indices.tolist())


def looking_at(*columns, strength=20.0):
    """Queries of which number i looks at key columns[i] alone: one-hot keys, and the same vectors as queries."""
    key = torch.eye(KEYS)[None, None]
    return strength * torch.stack([key[0, 0, c] for c in columns])[None, None], key


@pytest.mark.parametrize("method", ["pyramidkv", "snapkv"])
def test_window_methods_ask_the_last_queries_alone(method):
    query, key = looking_at(0, 0, 0, 0, 0, 0, 0, 0, 3, 5)
    assert best(score(method, observation(query, key)), 2) == [3, 5]


def test_h2o_asks_every_query():
    query, key = looking_at(0, 0, 0, 0, 0, 0, 0, 0, 3, 3)
    assert best(score("h2o", observation(query, key)), 2) == [0, 3]
    assert score("h2o", observation(query, key))[0, 0, 0] > score("h2o", observation(query, key))[0, 0, 3]


def test_echo_finds_what_nothing_has_asked_for_yet():
    query, key = looking_at(0, 1, 2, 3, 6, 5, 6, 7, 8, 0)  # the fifth asks for the key two tokens behind it
    seen = observation(query, key)
    assert score("rms", seen, window=1)[0, 0, 6] < 0.1
    assert 6 in best(score("echo", seen), 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("tokens", "new"), [(23, 23), (60, 60), (60, 13)])
def test_echo_is_its_definition(heads, kv_heads, tokens, new):
    """One row alone and padded on the left, against loops in float64."""
    size, pads, scaling, window = 6, 9, 1.3, 5
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, new, size, generator=generator)
    key = torch.randn(1, kv_heads, tokens, size, generator=generator)
    frequencies = (1.0, 0.2)  # 4 of the 6 channels are rotated

    angle = tokens * torch.tensor(frequencies, dtype=torch.float64)
    moved = query.double().clone()
    moved[..., :2] = query[..., :2] * angle.cos() - query[..., 2:4] * angle.sin()
    moved[..., 2:4] = query[..., 2:4] * angle.cos() + query[..., :2] * angle.sin()
    again, last = torch.zeros(2, kv_heads, tokens, dtype=torch.float64)
    for h in range(heads):
        group = h * kv_heads // heads
        own = key[0, group].double()
        for n in range(new):
            i = tokens - new + n
            logits = own @ moved[0, h, n] * scaling
            near = [j for j in range(tokens - new, tokens) if abs(i - j) <= 16]
            some = [j for j in range(tokens - new, tokens) if (tokens - j) % 16 == 0]
            z = logits[near].exp().sum() + 16 * logits[some].exp().sum()
            for j in near:
                if abs(i - j) <= 4:
                    again[group, j] += min(1.0, float(logits[j].exp() / z)) ** 2
        for i in range(tokens - min(window, new), tokens):
            seen = own[: i + 1] @ query[0, h, i - tokens].double() * scaling
            last[group, : i + 1] += seen.softmax(0) ** 2
    visible = torch.tensor([min(window, new, tokens - j) for j in range(tokens)])
    again, last = (again * kv_heads / heads).sqrt(), (last / visible).sqrt()
    expected, old = again.clone(), tokens - new
    if old:
        older = last[:, :old]
        expected[:, :old] = older * again[:, old:].mean(-1, keepdim=True) / older.mean(-1, keepdim=True)

    def found(query, key, valid, positions):
        counts = tokens_of(positions)
        seen = Observation(query, key, key, scaling, valid, positions, counts, 0, back=back(frequencies, counts))
        return METHODS["echo"].scorer(CompressionConfig(method="echo", budget=40, window=window)).score(seen)

    positions = torch.arange(tokens, dtype=torch.int32).expand(1, kv_heads, tokens)
    torch.testing.assert_close(found(query, key, None, positions)[0].double(), expected, rtol=1e-4, atol=1e-4)
    front = pads if new == tokens else 0  # queries of padding, too, in a first forward
    query = torch.nn.functional.pad(query, (0, 0, front, 0), value=float("nan"))
    key = torch.nn.functional.pad(key, (0, 0, pads, 0), value=float("nan"))
    valid = torch.arange(tokens + pads)[None] >= pads
    wide = torch.nn.functional.pad(positions, (pads, 0), value=-1)
    for real in (valid, valid[:, None].expand(1, kv_heads, -1)):
        padded = found(query, key, real, wide)[0, :, pads:]
        torch.testing.assert_close(padded.double(), expected, rtol=1e-4, atol=1e-4)


def test_pooling_lifts_neighbours_but_not_from_the_recent_tokens():
    query, key = looking_at(*[4] * 8, 4, 9)
    plain = score("snapkv", observation(query, key), kernel=1)[0, 0]
    pooled = score("snapkv", observation(query, key), kernel=3)[0, 0]
    assert plain[3] < 0.01 < pooled[3]
    assert pooled[5] > 0.1
    assert pooled[7] < 0.01  # its neighbours 8 and 9 are recent: 9 is looked at, but kept anyway


def test_streamingllm_keeps_exactly_sinks_and_recent():
    plain = model("gpt_neox-2-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method="streamingllm", budget=11, window=4, sinks=3)
    ids, mask, positions = padded_batch((40, 25))
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    for layer in cache.layers:
        for row, length in enumerate((40, 25)):
            kept = layer.storage.positions[row, :, : layer.storage.length].tolist()
            assert kept == [[0, 1, 2, *range(length - 8, length)]] * 2


def test_streamingllm_with_more_sinks_than_room_keeps_the_newest():
    plain = model("gpt_neox-2-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method="streamingllm", budget=9, recent=8, sinks=4)
    plain(torch.arange(40)[None], past_key_values=cache)
    for layer in cache.layers:
        assert layer.storage.positions[0, 0, :9].tolist() == [0, *range(32, 40)]


def test_knorm_keeps_small_keys():
    key = torch.ones(1, 1, KEYS, 2) * torch.tensor([5.0, 1, 7, 2, 9, 9, 9, 9, 9, 9])[:, None]
    assert best(score("knorm", observation(key=key)), 2) == [1, 3]


def test_random_depends_on_seed_layer_head_and_position_alone():
    key = torch.zeros(3, 2, KEYS, 2)
    scores = score("random", observation(key=key))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0, 0], scores[0, 1])
    assert not torch.equal(scores, score("random", observation(key=key, layer=1)))
    assert not torch.equal(scores, score("random", observation(key=key), seed=1))
    shifted = observation(key=key, positions=torch.arange(-3, KEYS - 3, dtype=torch.int32).expand(3, 2, KEYS))
    assert torch.equal(score("random", shifted)[..., 3:], scores[..., : KEYS - 3])


def test_random_is_spread_evenly():
    key = torch.zeros(1, 1, 4000, 2)
    kept = score("random", observation(key=key))[0, 0].topk(1000).indices
    for quarter in range(4):
        assert 200 < int(((kept >= 1000 * quarter) & (kept < 1000 * (quarter + 1))).sum()) < 300


@pytest.mark.parametrize("method", [m for m in pyramidkv.methods() if m != "full"])
def test_scores_are_finite_float32_of_the_right_shape(method):
    make = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8, generator=make).bfloat16(), torch.randn(2, 2, 15, 8, generator=make).bfloat16()
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[1, :7] = False
    scores = score(method, observation(query, key, valid), kernel=5)
    assert scores.shape == (2, 2, 15)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()


@pytest.fixture
def own_method():
    """Keeps tokens at even positions: all that a third party has to write."""

    @pyramidkv.register("even", schedule="uniform")
    class Even(pyramidkv.Scorer):
        """Even positions first."""

        def score(self, seen):
            return (seen.positions % 2 == 0).float()

    yield Even
    del METHODS["even"]


def test_a_method_of_ones_own_works_everywhere(own_method):
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((30, 21))
    with pyramidkv.compress(plain, method="even", budget=9, window=1, recent=0) as session:
        out = plain.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
    assert session.report().method == "even"
    assert pyramidkv.methods()["even"] == "Even positions first."
    for layer in out.past_key_values.layers:
        assert layer.storage.positions[0, :, :9].tolist() == [list(range(0, 18, 2))] * 2
        assert layer.storage.positions[1, :, :9].tolist() == [list(range(0, 18, 2))] * 2


def test_the_method_is_gone_again():
    assert "even" not in pyramidkv.methods()
    with pytest.raises(pyramidkv.ConfigError, match="method='even': unknown"):
        CompressionConfig(method="even", budget=64)


@pytest.mark.parametrize("strange", [float("nan"), float("-inf"), float("inf")])
def test_scores_that_are_not_finite_cost_no_real_token_its_slot(own_method, strange):
    own_method.score = lambda self, seen: torch.full(seen.positions.shape, strange)
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method="even", budget=9, window=4)
    plain(torch.arange(30)[None], past_key_values=cache)
    for layer in cache.layers:
        assert layer.storage.positions[0, 0, :9].tolist() == [*range(5), *range(26, 30)]


def test_scores_of_the_wrong_shape_name_the_method(own_method):
    own_method.score = lambda self, seen: torch.zeros(1, 4, 30)
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(plain.config, method="even", budget=9, window=4)
    with pytest.raises(pyramidkv.ConfigError, match=r"method='even': .*\(1, 4, 30\).*\(1, 2, 30\)"):
        plain(torch.arange(30)[None], past_key_values=cache)
