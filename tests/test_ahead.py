"""A replay that runs before it is asked for changes no token, right or wrong; see test_decode_graph.py."""

import pytest
import torch

import pyramidkv
from families import model, padded_batch
from pyramidkv.decode import ahead
from test_decode_graph import steps_anywhere  # noqa: F401

OPTIONS = {"keep": 0.4, "window": 6, "room": 50}


@pytest.fixture
def started(monkeypatch):
    """The replays that were run ahead, and those that were asked for."""
    counts = {"start": 0, "join": 0}
    for name in counts:
        was = getattr(ahead.Ahead, name)

        def counted(self, *args, name=name, was=was):
            counts[name] += 1
            return was(self, *args)

        monkeypatch.setattr(ahead.Ahead, name, counted)
    return counts


def generate(plain, decode, seed=None, options=OPTIONS, **arguments):
    ids, mask, _ = padded_batch((61, 40, 23))
    arguments = {
        "max_new_tokens": 40,
        "do_sample": seed is not None,
        "pad_token_id": 0,
        "eos_token_id": None,
    } | arguments
    with pyramidkv.compress(plain, decode=decode, **options) as session:
        if seed is not None:
            torch.manual_seed(seed)
        return plain.generate(ids, attention_mask=mask, **arguments), session.report()


def test_greedy_decoding_is_always_ahead(started):
    generate(model("llama-4-2-32"), "graph")
    assert started == {
        "start": 36,
        "join": 35,
    }  # of 39 steps


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("name", ["gpt_neox-2-2-80", "llama-4-2-32"])
def test_sampling_draws_the_same_tokens(name, first, started, monkeypatch):
    monkeypatch.setattr(ahead, "FIRST", first)
    plain = model(name)
    found, usage = generate(plain, "graph", seed=3, temperature=0.5)
    if first == 0:
        assert started["start"] > started["join"] + 5  # wrong again and again
    expected, same = generate(plain, "eager", seed=3, temperature=0.5)
    assert torch.equal(found, expected) and usage == same


def test_wrong_guesses_end_running_ahead():
    watch = ahead.Ahead()
    runs = 0
    for token in range(400):
        if watch.pays:
            watch.start(lambda: None, None)
            runs += 1
        watch.judge(token % 6 != 5)  # five right, one wrong
        watch.settle()
    assert runs <= 8 and watch._needed > 5
    for _ in range(ahead.MOST):
        watch.judge(True)
    assert watch.pays


@pytest.mark.parametrize("method", ["snapkv", "knorm"])
def test_a_bound_and_running_ahead(method, started):
    plain = model("llama-4-2-32")
    options = {"method": method, "budget": 16, "window": 6, "slack": 9, "room": 9}
    (found, usage), (expected, same) = (generate(plain, decode, options=options) for decode in ("graph", "eager"))
    assert torch.equal(found, expected) and usage == same
    assert started["join"] > 15


@pytest.mark.parametrize("after", ["turn", "crop", "fork", "another row", "another position"])
def test_whatever_comes_in_place_of_what_was_foreseen(after, started, monkeypatch):
    monkeypatch.setattr(ahead, "FIRST", 0)
    plain = model("gpt_neox-2-2-32").eval()
    ids, _, _ = padded_batch((61, 61, 61))

    def logits(decode):
        out = []
        with pyramidkv.compress(plain, decode=decode, **OPTIONS), torch.no_grad():
            cache = plain(ids, use_cache=True).past_key_values

            def feed(tokens, **how):
                out.append(plain(tokens, past_key_values=cache, **how).logits)
                return out[-1][:, -1].argmax(-1, keepdim=True)

            token = torch.full((3, 1), 7)
            for _ in range(6):
                token = feed(token)
            if after == "turn":
                feed(torch.cat([token, token, token], 1))
            elif after == "crop":
                cache.crop(-2)
            elif after == "fork":
                cache = cache.fork()
            elif after == "another row":
                token = token.flip(0)
            else:
                feed(token, position_ids=torch.full((3, 1), 80))
            for _ in range(6):
                token = feed(token)
            places = [layer.storage.positions[:, :, : layer.storage.length].clone() for layer in cache.layers]
        return torch.cat(out, 1), places

    (one, places), (other, same) = logits("graph"), logits("eager")
    assert (one - other).abs().max() < 1e-5
    assert all(torch.equal(x, y) for x, y in zip(places, same, strict=True))
    assert started["start"] > started["join"] > 5
