"""`compress()` and `replace_*`: what they change is put back, what they hold is let go, and the report is true."""

import threading
import warnings
import weakref

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    StaticCache,
)

import pyramidkv
from families import model, padded_batch

NEOX = "gpt_neox-2-2-32"
LLAMA = "llama-4-2-32"
IDS = padded_batch((40,))[0]
SMALL = {"budget": 10, "window": 4}


def generate(plain, ids=IDS, **options):
    return plain.generate(
        ids, max_new_tokens=5, **{"do_sample": False, "pad_token_id": 0, "min_new_tokens": 5, **options}
    )


def hooks(plain):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in plain.modules()]


def assert_as_before(plain, attention, before):
    assert plain.config._attn_implementation == attention
    assert not any(hooks(plain))
    assert torch.equal(generate(plain), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_closing_puts_the_model_back(attention):
    plain = model(LLAMA)
    plain.set_attn_implementation(attention)
    before = generate(plain)
    with pyramidkv.compress(plain, **SMALL) as session:
        assert session.is_open
        assert plain.config._attn_implementation == "pyramidkv"
        assert not torch.equal(generate(plain), before)
    assert not session.is_open
    assert_as_before(plain, attention, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_of_a_forward_puts_the_model_back(error):
    plain = model(LLAMA)
    before = generate(plain)
    with pyramidkv.compress(plain, **SMALL):
        expected = generate(plain)

    def stop(*_):
        raise error("in layer 1")

    handle = plain.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(error, match="in layer 1"), pyramidkv.compress(plain, **SMALL):
        generate(plain)
    handle.remove()
    assert_as_before(plain, "sdpa", before)
    with pyramidkv.compress(plain, **SMALL):
        assert torch.equal(generate(plain), expected)


def test_after_an_error_a_new_cache_works_in_the_same_session():
    plain = model(LLAMA)
    with pyramidkv.compress(plain, **SMALL) as session:
        expected = generate(plain)
        handle = plain.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(plain)
        handle.remove()
        assert torch.equal(generate(plain), expected)
    assert session.report().evicted


def test_the_warning_does_not_hide_the_error_in_the_block():
    with pytest.raises(ZeroDivisionError), pyramidkv.compress(model(LLAMA), budget=500):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda m: None, "no forward filled a cache"),
        (lambda m: generate(m, use_cache=False), "no forward filled a cache"),
        (lambda m: m(IDS, use_cache=False), "no forward filled a cache"),
        (generate, "budget=500.*every prompt fitted its budget"),
    ],
)
def test_a_session_that_compressed_nothing_warns(use, why):
    plain = model(LLAMA)
    with pytest.warns(pyramidkv.CompressionWarning, match=why), pyramidkv.compress(plain, budget=500):
        use(plain)
    assert plain.config._attn_implementation == "sdpa"


def test_the_warning_points_at_the_callers_file():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pyramidkv.compress(model(LLAMA), budget=500):
            pass
        session = pyramidkv.compress(model(LLAMA), budget=500).open()
        session.close()
    assert [w.filename for w in caught] == [__file__] * 2


def test_no_warning_when_something_was_compressed_or_nothing_was_asked_for():
    plain = model(LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pyramidkv.compress(plain, **SMALL):
            generate(plain)
            generate(plain, IDS[:, :6])  # fits; the first did not
        with pyramidkv.compress(plain, method="full"):
            generate(plain)


def test_a_session_opened_again_starts_anew():
    plain = model(LLAMA)
    session = pyramidkv.compress(plain, **SMALL)
    with session:
        generate(plain)
    with pytest.warns(pyramidkv.CompressionWarning):
        session.open()
        with pytest.raises(pyramidkv.PyramidKVError, match="nothing to report"):
            session.report()
        session.close()
    session.close()
    session.close()


def test_the_report_during_and_after():
    plain = model(LLAMA)
    session = pyramidkv.compress(plain, **SMALL)
    with session:
        with pytest.raises(pyramidkv.PyramidKVError, match="nothing to report"):
            session.report()
        plain(IDS)
        during = session.report()
        assert [layer.seen_tokens for layer in during.layers] == [40] * 3
        assert sum(layer.kept_tokens for layer in during.layers) == 30
        assert during.keep == pytest.approx(0.25)
        generate(plain, IDS[:, :20])
        last = session.report()
        assert [layer.seen_tokens for layer in last.layers] == [24] * 3
    assert session.report() == last
    text = str(last)
    assert f"{last.kv_bytes:,} of {last.full_kv_bytes:,} bytes" in text
    assert len(text.splitlines()) == 5


def test_a_second_session_on_the_model_is_refused_and_the_first_goes_on():
    plain = model(LLAMA)
    with pyramidkv.compress(plain, **SMALL) as session:
        expected = generate(plain)
        with (
            pytest.raises(pyramidkv.ConfigError, match="already under compression"),
            pyramidkv.compress(plain, **SMALL),
        ):
            pass
        with pytest.raises(pyramidkv.ConfigError, match="already under compression"):
            session.open()
        assert torch.equal(generate(plain), expected)
    assert not any(hooks(plain))


def test_two_models_side_by_side_in_sessions_of_their_own():
    one, two = model(LLAMA), model(NEOX)
    expected = []
    for plain, options in ((one, SMALL), (two, {"keep": 0.5, "window": 2, "method": "h2o"})):
        with pyramidkv.compress(plain, **options):
            expected.append(generate(plain))
    with pyramidkv.compress(one, **SMALL) as first:
        with pyramidkv.compress(two, keep=0.5, window=2, method="h2o") as second:
            assert torch.equal(generate(one), expected[0])
            assert torch.equal(generate(two), expected[1])
        assert torch.equal(generate(one), expected[0])
    assert (first.report().method, second.report().method) == ("pyramidkv", "h2o")


def test_threads_do_not_mix_their_models():
    models = [model(LLAMA), model(NEOX)]
    prompts = [padded_batch((40,), seed=s)[0] for s in range(4)]
    expected, got = [], [[], []]
    for plain in models:
        with pyramidkv.compress(plain, **SMALL):
            expected.append([generate(plain, ids) for ids in prompts])
    start = threading.Barrier(2)

    def work(number):
        start.wait()
        got[number] += [generate(models[number], ids) for ids in prompts]

    with pyramidkv.compress(models[0], **SMALL), pyramidkv.compress(models[1], **SMALL):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(expected, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def test_an_empty_dynamic_cache_handed_over_is_replaced():
    plain = model(LLAMA)
    with pyramidkv.compress(plain, **SMALL) as session:
        by_name = plain(IDS, past_key_values=DynamicCache()).past_key_values
        by_place = plain(IDS, None, None, DynamicCache(config=plain.config)).past_key_values
        generate(plain, past_key_values=DynamicCache(config=plain.config))
    assert type(by_name) is type(by_place) is pyramidkv.PyramidKVCache
    assert session.report().evicted


@torch.no_grad()
def test_a_filled_foreign_cache_is_refused():
    plain = model(LLAMA)
    filled = plain(IDS).past_key_values
    with pyramidkv.compress(plain, method="full"):
        for give in (lambda: plain(IDS, past_key_values=filled), lambda: plain(IDS, None, None, filled)):
            with pytest.raises(pyramidkv.UnsupportedError, match="past_key_values is a DynamicCache with 40 tokens"):
                give()
        with pytest.raises(pyramidkv.UnsupportedError, match="past_key_values is a StaticCache"):
            plain(IDS, past_key_values=StaticCache(config=plain.config, max_cache_len=64))
        with pytest.raises(pyramidkv.UnsupportedError, match="past_key_values is a StaticCache"):
            generate(plain, cache_implementation="static")


def test_a_cache_of_ones_own_in_a_session_is_the_one_reported():
    plain = model(LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pyramidkv.compress(plain, **SMALL) as session:
            mine = pyramidkv.PyramidKVCache(plain.config, method="snapkv", budget=12, window=4)
            generate(plain, past_key_values=mine)
            assert session.report() == mine.report()
    assert session.report().method == "snapkv"


def test_use_cache_false_makes_no_cache_and_changes_nothing():
    plain = model(LLAMA)
    ids, mask, positions = padded_batch((20, 11))
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    expected = plain(ids, **inputs).logits
    with pyramidkv.compress(plain, method="full"):
        out = plain(ids, **inputs)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_nothing_keeps_a_cache_alive(collected):
    plain = model("gemma3-4-2-32")
    with pyramidkv.compress(plain, **SMALL) as session:
        first = weakref.ref(generate(plain, return_dict_in_generate=True).past_key_values)
        generate(plain)
        collected()
        assert first() is None, "an older cache lives on beside the newest"
        last = weakref.ref(session._cache)
        layer = weakref.ref(session._cache.layers[0].storage)
    collected()
    assert last() is None
    assert layer() is None
    assert session.report().evicted


def test_a_closed_session_does_not_keep_its_cache_after_an_error(collected):
    plain = model(LLAMA)
    session = pyramidkv.compress(plain, **SMALL)
    with session:
        handle = plain.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(plain)
        handle.remove()
        cache = weakref.ref(session._cache)
        with pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError
        generate(plain)
    collected()
    assert cache() is None


REPLACE = [
    (pyramidkv.replace_gptneox, GPTNeoXForCausalLM, NEOX),
    (pyramidkv.replace_llama, LlamaForCausalLM, LLAMA),
    (pyramidkv.replace_mistral, MistralForCausalLM, "mistral-2-2-32"),
]


@pytest.mark.parametrize(("replace", "kind", "name"), REPLACE)
def test_replace_compresses_every_model_of_the_class_until_fullkv(replace, kind, name):
    call = kind.__call__
    one, two = model(name), model(name, seed=5)
    other = model("qwen2-2-2-32")
    before = [generate(m) for m in (one, two, other)]
    try:
        replace("SnapKV", **SMALL)
        out = [generate(m, return_dict_in_generate=True).past_key_values for m in (one, two, other)]
        assert [type(cache).__name__ for cache in out] == ["PyramidKVCache", "PyramidKVCache", "DynamicCache"]
        assert out[0].config.method == "snapkv"
        replace(**SMALL)  # another method takes the place of the first
        cache = generate(one, return_dict_in_generate=True).past_key_values
        assert cache.config.method == "pyramidkv"
        assert one.config._attn_implementation == "pyramidkv"
        assert two.config._attn_implementation == "sdpa"  # not called since
    finally:
        replace("fullkv")
    assert kind.__call__ is call
    assert "__call__" not in vars(kind)
    assert all(torch.equal(generate(m), b) for m, b in zip((one, two, other), before, strict=True))
    assert not any(hooks(one) + hooks(two))
    replace("fullkv")


@pytest.mark.parametrize(("replace", "kind", "name"), REPLACE[:1])
def test_replace_names_what_is_wrong_and_changes_nothing(replace, kind, name):
    call = kind.__call__
    for arguments, message in [
        (("pyramidvk",), r"method='pyramidvk': unknown; did you mean 'pyramidkv'\?.*fullkv"),
        (("fulkv",), r"did you mean 'fullkv'"),
        ((None,), "method=None: unknown"),
    ]:
        with pytest.raises(pyramidkv.ConfigError, match=message):
            replace(*arguments, **SMALL)
    with pytest.raises(pyramidkv.ConfigError, match="buget=3: unknown; did you mean 'budget'"):
        replace("snapkv", buget=3)
    with pytest.raises(pyramidkv.ConfigError, match="budget: method='fullkv' keeps everything"):
        replace("fullkv", budget=64)
    assert kind.__call__ is call


def test_fullkv_restores_everything_even_if_its_warning_is_an_error():
    call = LlamaForCausalLM.__call__
    plain = [model(LLAMA), model(LLAMA)]
    pyramidkv.replace_llama(budget=500)
    for one in plain:
        generate(one)
    with warnings.catch_warnings(), pytest.raises(pyramidkv.CompressionWarning, match="nothing was compressed"):
        warnings.simplefilter("error")
        pyramidkv.replace_llama("fullkv")
    assert LlamaForCausalLM.__call__ is call
    for one in plain:
        assert one.config._attn_implementation == "sdpa"
        assert not any(hooks(one))


def test_a_replaced_class_does_not_keep_its_models_alive(collected):
    pyramidkv.replace_gptneox("snapkv", **SMALL)
    try:
        plain = model(NEOX)
        generate(plain)
        gone = weakref.ref(plain)
        del plain
        collected()
        assert gone() is None
    finally:
        pyramidkv.replace_gptneox("fullkv")
