"""Long use of one process: memory, results, threads, models side by side, and forwards that end in the middle."""

import gc
import random
import threading

import psutil
import pytest
import torch

import pyramidkv
from families import model, padded_batch
from pyramidkv import PyramidKVError
from pyramidkv.ops import strips

METHODS = [name for name in pyramidkv.methods() if name != "full"]
LLAMA, NEOX, GEMMA = "llama-4-2-32", "gpt_neox-2-2-32", "gemma3-4-2-32"


def generate(made, ids, mask, new=6, **options):
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0} | options
    return made.generate(ids, attention_mask=mask, **settings)


def drawn(draw):
    """A batch and the settings of one generation, all of it at random."""
    lengths = [draw.randint(24, 90) for _ in range(draw.choice((1, 1, 2, 3, 7)))]
    settings = {"method": draw.choice(METHODS), "window": draw.choice((4, 8, 16)), "bits": draw.choice((16, 16, 8, 4))}
    settings["heads"] = "uniform"  # pages of 64 tokens are more than these prompts have to give
    amount = draw.choice(({"keep": 0.4}, {"budget": 20}, {"share": 0.5}))
    how = draw.choice(({}, {}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 17}))
    return lengths, {**settings, **amount}, how


def one(made, lengths, options, how, seed):
    """One generation; its tensors go with this function."""
    ids, mask, _ = padded_batch(lengths, seed=seed)
    with pyramidkv.compress(made, **options) as session:
        out = generate(made, ids, mask, new=2 + seed % 7, **how)
    assert out.shape[0] == len(lengths)
    assert session.report().shrunk


def soak(rounds, *, warm_up, check_every):
    """Random generations on two models. Returns the growth in resident bytes and in tensors after the warm-up.

    Now and then a generation of the beginning is repeated: its tokens must be those of then.
    """
    draw = random.Random(0)
    models = {name: model(name) for name in (LLAMA, NEOX)}
    ids, mask, _ = padded_batch((60, 33))
    fixed = [
        (name, {"method": method, "keep": 0.4, "window": 4}) for name in models for method in ("pyramidkv", "auto")
    ]

    def repeated():
        tokens = []
        for name, options in fixed:
            with pyramidkv.compress(models[name], **options):
                tokens.append(generate(models[name], ids, mask).tolist())
        return tokens

    def sizes():
        for few in (strips._index, strips._first):  # kept on purpose, four at most, but now more and now fewer
            few.cache_clear()
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return psutil.Process().memory_info().rss, tensors

    expected, before = repeated(), (0, 0)
    for number in range(rounds):
        if number == warm_up:
            before = sizes()
        if number % check_every == 0:
            assert repeated() == expected, f"after {number} generations"
        one(models[draw.choice((LLAMA, NEOX))], *drawn(draw), seed=number)
    assert repeated() == expected
    after = sizes()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.filterwarnings("ignore::pyramidkv.CompressionWarning")
def test_a_few_dozen_generations_leave_no_tensors_behind():
    _, tensors = soak(30, warm_up=10, check_every=15)
    assert tensors == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyramidkv.CompressionWarning")
def test_thousands_of_generations_neither_grow_nor_drift():
    # On an AMD CPU oneDNN keeps something of every size it multiplies; those of these models have all come by then.
    grown, tensors = soak(1600, warm_up=800, check_every=100)
    assert tensors == 0
    assert grown < 16e6, f"{grown / 1e6:.1f} MB more resident memory after 800 generations"


def test_two_threads_with_a_model_each_do_not_meet():
    ids, mask, _ = padded_batch((60, 33, 47))
    jobs = {
        LLAMA: {"method": "pyramidkv", "keep": 0.4, "window": 4},
        NEOX: {"method": "auto", "share": 0.4, "window": 8},
        GEMMA: {"method": "h2o", "budget": 20, "window": 4},
    }
    models = {name: model(name) for name in jobs}

    def once(name):
        with pyramidkv.compress(models[name], **jobs[name]) as session:
            return generate(models[name], ids, mask).tolist(), session.report()

    expected = {name: once(name) for name in jobs}
    found, start = {name: [] for name in jobs}, threading.Barrier(len(jobs))

    def work(name):
        start.wait()
        for _ in range(5):
            found[name].append(once(name))

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in jobs:
        assert found[name] == [expected[name]] * 5


def test_two_open_sessions_token_by_token_in_turn():
    ids, mask, positions = padded_batch((60, 33))
    jobs = ((model(LLAMA), {"keep": 0.4, "window": 4}), (model(LLAMA, seed=1), {"method": "auto", "share": 0.4}))

    def decoding(made):
        """A generator of greedy tokens, which stops after each."""
        attended, at, token, cache = mask, positions, ids, None
        for _ in range(6):
            with torch.no_grad():
                out = made(token, attention_mask=attended, position_ids=at, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            attended, at = torch.cat([attended, torch.ones_like(token)], 1), at[:, -1:] + 1
            yield token

    expected = []
    for made, options in jobs:
        with pyramidkv.compress(made, **options):
            expected.append(torch.cat(list(decoding(made)), 1))
    (one, first), (two, second) = jobs
    with pyramidkv.compress(one, **first) as a, pyramidkv.compress(two, **second) as b:
        turns = list(zip(decoding(one), decoding(two), strict=True))
        assert a.report() != b.report()
    for got, want in zip(zip(*turns, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(got, 1), want)
    assert [made.config._attn_implementation for made, _ in jobs] == ["sdpa", "sdpa"]


# Forwards that end in the middle.

CASES = {
    LLAMA: (
        {"keep": 0.4, "window": 4},
        {"method": "auto", "share": 0.4, "window": 8},
        {"budget": 24, "window": 4, "slack": 4},
    ),
    NEOX: ({"keep": 0.4, "window": 4},),
}
SETTINGS = [(name, options) for name, cases in CASES.items() for options in cases]


class Broken:
    """Makes a model's forward end in layer `layer`: before, inside or after the attention."""

    def __init__(self, made, layer, where, error):
        block = made.base_model.layers[layer]
        attention = getattr(block, "self_attn", None) or block.attention
        out = getattr(attention, "o_proj", None) or attention.dense
        target = {"before": attention, "inside": out, "after": block.mlp}[where]
        self.error = error
        self.handle = target.register_forward_pre_hook(self.stop)

    def stop(self, *_):
        raise self.error("in the middle")

    def __enter__(self):
        return pytest.raises(self.error, match="in the middle").__enter__()

    def __exit__(self, *problem):
        self.handle.remove()
        assert problem[0] is self.error, problem
        return True


def started(name, options):
    made = model(name)
    made.set_attn_implementation("pyramidkv")
    ids, mask, positions = padded_batch((60, 33))
    return made, pyramidkv.PyramidKVCache(made.config, **options), ids, mask, positions


def forward(made, cache, ids, mask, positions):
    with torch.no_grad():
        return made(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


def steps(count, mask, positions):
    """Single tokens with their masks and positions."""
    for number in range(count):
        mask, positions = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1), positions[:, -1:] + 1
        yield torch.full((2, 1), 7 + number), mask, positions


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("layer", "where"), [(0, "before"), (0, "inside"), (1, "after"), (2, "before")])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_a_forward_that_ends_in_the_middle_can_be_tried_again(name, options, layer, where, error):
    """The prompt, then every other token, fail once: what follows is as if they had not."""
    made, cache, *prompt = started(name, options)
    _, whole, *_ = started(name, options)
    with Broken(made, layer, where, error):
        forward(made, cache, *prompt)
    assert cache.get_seq_length() == 0
    assert torch.equal(forward(made, cache, *prompt), forward(made, whole, *prompt))
    for number, step in enumerate(steps(9, *prompt[1:])):
        if number % 2:
            seen = cache.get_seq_length()
            with Broken(made, layer, where, error):
                forward(made, cache, *step)
            assert cache.get_seq_length() == seen
        assert torch.equal(forward(made, cache, *step), forward(made, whole, *step)), number
    assert cache.report() == whole.report()


def test_an_eviction_that_fails_loses_no_prompt():
    """Out of memory in the scorer of the second layer, after the first has evicted."""
    made, cache, *prompt = started(LLAMA, {"keep": 0.4, "window": 4})
    scorer = cache.layers[1].scorer
    cache.layers[1].scorer = None
    cache.layers[1]._choose = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        forward(made, cache, *prompt)
    del cache.layers[1]._choose
    cache.layers[1].scorer = scorer
    fresh = started(LLAMA, {"keep": 0.4, "window": 4})[1]
    assert torch.equal(forward(made, cache, *prompt), forward(made, fresh, *prompt))


@pytest.mark.parametrize("options", CASES[LLAMA], ids=str)
def test_a_further_turn_that_fails_says_what_is_lost(options):
    made, cache, *prompt = started(LLAMA, options)
    forward(made, cache, *prompt)
    turn, mask, positions = torch.full((2, 5), 9), torch.cat([prompt[1], torch.ones(2, 5).long()], 1), prompt[2][:, -1:]
    turn = (turn, mask, positions + torch.arange(1, 6))
    saved = cache.fork()
    with Broken(made, 0, "before", RuntimeError):  # nothing has been evicted yet
        forward(made, cache, *turn)
    expected = forward(made, saved.fork(), *turn)
    again = cache.fork()
    assert torch.equal(forward(made, again, *turn), expected)
    with Broken(made, 2, "before", RuntimeError):
        forward(made, cache, *turn)
    for use in (lambda: forward(made, cache, *turn), cache.fork, lambda: cache.crop(-1)):
        with pytest.raises(PyramidKVError, match="a forward did not finish, and layers have let go"):
            use()
    assert torch.equal(forward(made, saved, *turn), expected)
    cache.reset()
    fresh = started(LLAMA, options)[1]
    assert torch.equal(forward(made, cache, *prompt), forward(made, fresh, *prompt))


def test_with_sliding_layers_a_prompt_can_be_tried_again_and_a_token_says_what_is_lost():
    made, cache, *prompt = started(GEMMA, {"keep": 0.4, "window": 4})
    with Broken(made, 2, "inside", RuntimeError):
        forward(made, cache, *prompt)
    fresh = started(GEMMA, {"keep": 0.4, "window": 4})[1]
    assert torch.equal(forward(made, cache, *prompt), forward(made, fresh, *prompt))
    step = next(steps(1, *prompt[1:]))
    with Broken(made, 2, "inside", RuntimeError):
        forward(made, cache, *step)
    with pytest.raises(PyramidKVError, match="a forward did not finish"):
        forward(made, cache, *step)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_session_goes_on_after_an_error_while_generating(error):
    made = model(LLAMA)
    ids, mask, _ = padded_batch((60, 33))
    with pyramidkv.compress(made, keep=0.4, window=4) as session:
        expected = generate(made, ids, mask)
        calls = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 4:
                raise error("in the middle")

        handle = made.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(error, match="in the middle"):
            generate(made, ids, mask)
        handle.remove()
        assert torch.equal(generate(made, ids, mask), expected)
        assert session.report().evicted


def test_an_error_behind_the_last_layer_s_attention_leaves_the_tokens_in_the_cache():
    made, cache, *prompt = started(LLAMA, {"keep": 0.4, "window": 4})
    forward(made, cache, *prompt)
    first, second = steps(2, *prompt[1:])
    whole = cache.fork()
    forward(made, whole, *first)
    with Broken(made, 2, "after", RuntimeError):
        forward(made, cache, *first)
    assert cache.get_seq_length() == whole.get_seq_length() == 61
    assert torch.equal(forward(made, cache, *second), forward(made, whole, *second))
