"""What the engine cannot do is one of its own errors, and the message says what was wrong and what to do."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache

import pyramidkv
from families import _BASE, model, padded_batch
from pyramidkv import ConfigError, PyramidKVCache, PyramidKVError, UnsupportedError

LLAMA = "llama-4-2-32"
NEOX = "gpt_neox-2-2-32"
IDS = padded_batch((40,))[0]
SMALL = {"budget": 10, "window": 4}


def generate(plain, ids=IDS, **options):
    return plain.generate(ids, max_new_tokens=5, **{"do_sample": False, "pad_token_id": 0, **options})


def under(name=LLAMA, **options):
    """A model under our attention and a cache for it."""
    plain = model(name)
    plain.set_attn_implementation("pyramidkv")
    return plain, PyramidKVCache(plain.config, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 32}, "budget=32: must be at least 33"),
        ({"budget": -1}, "budget=-1: must be a whole number, at least 1"),
        ({"method": "pyramid", "budget": 64}, "method='pyramid': unknown; did you mean 'pyramidkv'"),
        ({"widnow": 3, "budget": 64}, "widnow=3: unknown; did you mean 'window'"),
        ({"layers": (1, 1), "budget": 64}, "layers=.*has 2 numbers; this model has 3 layers"),
        ({}, "exactly one of budget=, keep=, share=, bytes="),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [pyramidkv.compress, lambda m, **o: PyramidKVCache(m.config, **o)], ids=["compress", "cache"]
)
def test_bad_settings_are_found_before_the_model_runs(make, options, message):
    plain = model(LLAMA)
    with pytest.raises(ConfigError, match=message):
        make(plain, **options)
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "make", [pyramidkv.compress, lambda m, c, **o: PyramidKVCache(m.config, c, **o)], ids=["compress", "cache"]
)
def test_what_is_no_config_is_refused(make):
    with pytest.raises(ConfigError, match="window: give either config= or keyword options"):
        make(model(LLAMA), pyramidkv.CompressionConfig(budget=64), window=3)
    for config in (0.25, "snapkv", {"keep": 0.25}):
        with pytest.raises(ConfigError, match=r"config=.*must be a CompressionConfig.*keep=0.25"):
            make(model(LLAMA), config)


def test_a_session_that_was_never_opened_says_so():
    plain = model(LLAMA)
    session = pyramidkv.compress(plain, **SMALL)
    generate(plain)
    with pytest.raises(PyramidKVError, match="never opened; write `with"):
        session.report()


@pytest.mark.parametrize("how", ["model", "in place", "forward", "layer"])
def test_a_model_given_to_torch_compile_is_refused(how):
    plain = model(LLAMA)
    match how:
        case "model":
            plain = torch.compile(plain, backend="eager")
        case "in place":
            plain.compile(backend="eager")
        case "forward":
            plain.forward = torch.compile(plain.forward, backend="eager")
        case "layer":
            plain.model.layers[1].compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"model: was given to torch\.compile"):
        pyramidkv.compress(plain, **SMALL).open()
    assert plain.config._attn_implementation == "sdpa"


def test_a_compiled_model_made_in_a_session_gives_what_the_session_gives():
    plain = model(LLAMA)
    with torch.no_grad(), pyramidkv.compress(plain, **SMALL) as session:
        expected = plain(IDS).logits, plain(IDS[:, :1], past_key_values=session.cache).logits
        compiled = torch.compile(plain, backend="eager")
        first = compiled(IDS)
        assert torch.equal(first.logits, expected[0])
        assert torch.equal(compiled(IDS[:, :1], past_key_values=first.past_key_values).logits, expected[1])


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_under_compression_is_refused(how):
    plain = model(LLAMA)
    with pyramidkv.compress(plain, **SMALL) as session:
        expected = generate(plain)
        with pytest.raises(UnsupportedError, match=r"model: is under compression.*outside the session"):
            how(plain)
        with pytest.raises(UnsupportedError, match=r"pickled; use cache\.save"):
            pickle.dumps(session.cache)
        assert torch.equal(generate(plain), expected)
    assert torch.equal(generate(copy.deepcopy(plain)), generate(plain))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_of_another_model_s_config_that_runs_another_attention(attention):
    ours, _ = under()
    other = model(LLAMA)
    other.set_attn_implementation(attention)
    with pytest.raises(UnsupportedError, match=r"attends without 'pyramidkv'.*its own model\.config"):
        generate(other, past_key_values=PyramidKVCache(ours.config, **SMALL))


def test_tokens_that_generate_takes_for_seen():
    plain, cache = under()
    generate(plain, past_key_values=cache)
    with pytest.raises(ConfigError, match=r"zero tokens behind the 44 that .* has seen: give .*attention_mask"):
        generate(plain, IDS[:, :9], past_key_values=cache)


def test_rows_for_beams_can_be_repeated():
    plain, cache = under()
    with torch.no_grad():
        plain(IDS[:, :-1], past_key_values=cache)
    with pytest.raises(ConfigError, match=r"1 rows; the new tokens have 3: .*batch_repeat_interleave\(3\)"):
        generate(plain, past_key_values=cache.fork(), num_beams=3)
    cache.batch_repeat_interleave(3)
    assert generate(plain, past_key_values=cache, num_beams=3, num_return_sequences=3).shape == (3, 45)


@pytest.mark.parametrize("tokens", ["a", None, 1.5])
def test_a_crop_by_what_is_no_number(tokens):
    _, cache = under()
    with pytest.raises(ConfigError, match=r"tokens_to_remove=.*must be a whole number"):
        cache.crop(tokens)


@pytest.mark.parametrize("path", [None, 3, b"there", "x" * 300], ids=lambda path: type(path).__name__)
def test_what_can_be_no_file(path):
    plain, cache = under()
    with torch.no_grad():
        plain(IDS, past_key_values=cache)
    with pytest.raises(ConfigError, match=r"path=.*can't be the name of a file"):
        cache.save(path)
    with pytest.raises(ConfigError, match=r"path=.*can't be the name of a file"):
        PyramidKVCache.load(path, plain.config)


def test_a_name_with_a_null_byte(tmp_path):
    plain, cache = under()
    with torch.no_grad():
        plain(IDS, past_key_values=cache)
    with pytest.raises(pyramidkv.DataError, match="can't be written"):
        cache.save(str(tmp_path / "a\0b"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cache", [None, DynamicCache()], ids=lambda cache: type(cache).__name__)
def test_chunks_for_what_is_no_cache_of_ours(cache):
    with pytest.raises(ConfigError, match=f"cache is a {type(cache).__name__}: it must be a PyramidKVCache"):
        pyramidkv.prefill(under()[0], IDS, cache, chunk=20)


def test_chunks_of_no_rows():
    plain, cache = under()
    with pytest.raises(ConfigError, match=r"input_ids has shape \(0, 40\)"):
        pyramidkv.prefill(plain, IDS[:0], cache, chunk=20)


def test_a_budget_above_the_prompt_warns_that_nothing_was_compressed():
    plain = model(LLAMA)
    why = "budget=64: nothing was compressed: every prompt fitted"
    with pytest.warns(pyramidkv.CompressionWarning, match=why), pyramidkv.compress(plain, budget=64):
        generate(plain)


@pytest.mark.parametrize("name", [LLAMA, NEOX, "gemma3-4-2-32"])
def test_a_prompt_of_no_tokens(name):
    plain, cache = under(name)
    with pytest.raises(ConfigError, match="input_ids has zero tokens"):
        plain(IDS[:, :0], past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_a_prompt_shorter_than_the_window_is_kept_whole(tokens):
    plain, cache = under(budget=5)
    expected = generate(model(LLAMA), IDS[:, :tokens])
    assert torch.equal(generate(plain, IDS[:, :tokens], past_key_values=cache), expected)
    assert not cache.report().evicted


def test_too_few_bytes_say_how_many_are_needed():
    plain, cache = under(budget=None, bytes="1kb")
    with pytest.raises(ConfigError, match=r"bytes=1000: a batch of 1 needs at least \d+ bytes"):
        plain(IDS, past_key_values=cache)


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 101}
UNSUPPORTED = [
    (
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=101),
        "model_type='gpt2': not supported.*llama",
    ),
    (transformers.BertConfig(**_TINY, intermediate_size=64, is_decoder=True), "model_type='bert': not supported"),
    (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=101), "model_type='mamba': not supp"),
    (
        transformers.MistralConfig(**_BASE, hidden_size=64, num_attention_heads=2, num_key_value_heads=2),
        "every layer of this mistral has a sliding window of 4096 tokens already",
    ),
]


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED, ids=lambda x: getattr(x, "model_type", ""))
def test_models_that_cannot_be_compressed(config, message):
    plain = transformers.AutoModelForCausalLM.from_config(config)
    attention = plain.config._attn_implementation
    with pytest.raises(UnsupportedError, match=message):
        pyramidkv.compress(plain, **SMALL)
    with pytest.raises(UnsupportedError, match=message):
        PyramidKVCache(plain.config, **SMALL)
    assert plain.config._attn_implementation == attention


def test_an_unknown_kind_of_layer_is_named():
    config = transformers.Qwen2Config(**_BASE, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="layer_types has linear_attention"):
        PyramidKVCache(config, **SMALL)


@pytest.mark.parametrize("thing", ["gpt2", None, torch.nn.Linear(2, 2)], ids=["str", "none", "module"])
def test_what_is_no_transformers_model(thing):
    with pytest.raises(ConfigError, match=rf"model is a {type(thing).__name__}: it must be a transformers model"):
        pyramidkv.compress(thing, **SMALL)


def test_a_model_in_place_of_its_config():
    with pytest.raises(ConfigError, match=r"model_config is a LlamaForCausalLM: .*model\.config"):
        PyramidKVCache(model(LLAMA), **SMALL)


@pytest.mark.parametrize("implementation", ["offloaded", "static", "offloaded_static"])
def test_other_cache_implementations(implementation):
    plain = model(LLAMA)
    with pytest.raises(UnsupportedError, match="cache_implementation"), pyramidkv.compress(plain, **SMALL):
        generate(plain, cache_implementation=implementation)


@pytest.mark.parametrize(
    "name", [LLAMA, NEOX, "phi3-4-2-32", "qwen3-4-2-32", "mistral-2-2-32", "gemma3-4-2-32", "gemma3-4-1-32"]
)
def test_a_plain_cache_under_our_attention_is_refused_at_once(name):
    plain = model(name)
    expected = plain(IDS, use_cache=False).logits
    plain.set_attn_implementation("pyramidkv")
    for run in (lambda: plain(IDS), lambda: generate(plain), lambda: plain(IDS, past_key_values=DynamicCache())):
        with pytest.raises(
            UnsupportedError, match=r"plain transformers cache .* past_key_values=pyramidkv.PyramidKVCache"
        ):
            run()
    assert torch.allclose(plain(IDS, use_cache=False).logits, expected, atol=1e-5)
    assert torch.allclose(plain(IDS[:, :1], use_cache=False).logits, expected[:, :1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [LLAMA, NEOX, "gemma3-4-2-32"])
def test_a_plain_cache_under_our_attention_is_refused_while_decoding(name):
    plain = model(name)
    cache = plain(IDS).past_key_values
    plain.set_attn_implementation("pyramidkv")
    for new in (IDS[:, :1], IDS[:, :3]):
        with pytest.raises(UnsupportedError, match="plain transformers cache"):
            plain(new, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [LLAMA, "gemma3-4-2-32"])
def test_our_cache_under_another_attention(name, attention):
    plain, cache = under(name)
    plain.set_attn_implementation(attention)
    with pytest.raises(UnsupportedError, match=rf"attn_implementation='{attention}': .*set_attn_implementation"):
        plain(IDS, past_key_values=cache)
    plain.set_attn_implementation("pyramidkv")
    cache.reset()
    plain(IDS, past_key_values=cache)
    plain.set_attn_implementation(attention)
    with pytest.raises(UnsupportedError, match=rf"attn_implementation='{attention}'"):
        plain(IDS[:, :1], past_key_values=cache)


def test_padding_on_the_right():
    plain, cache = under()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    with pytest.raises(ConfigError, match=r"attention_mask has padding after a token in row 1: pad on the left"):
        plain(IDS.repeat(2, 1), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 40, 40).bool(), torch.zeros(1, 1, 40, 40)], ids=["boolean", "additive"]
)
@pytest.mark.parametrize("name", [LLAMA, NEOX])
def test_masks_of_four_dimensions(name, mask):
    plain, cache = under(name)
    with pytest.raises(UnsupportedError, match="attention_mask: a compressed layer takes a 2-D padding mask"):
        plain(IDS, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 39), (1, 5, 40), (40,), (3, 40)], ids=str)
def test_masks_of_the_wrong_shape(shape):
    plain, cache = under()
    with pytest.raises(ConfigError, match=rf"attention_mask has shape \({', '.join(map(str, shape))},?\)"):
        plain(IDS, attention_mask=torch.ones(shape, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("name", [LLAMA, NEOX])
def test_attention_weights_are_not_returned(name):
    plain, cache = under(name)
    with pytest.raises(UnsupportedError, match="output_attentions=True"):
        plain(IDS, past_key_values=cache, output_attentions=True)
    plain = model(name)
    with pytest.raises(UnsupportedError, match="output_attentions=True"), pyramidkv.compress(plain, **SMALL):
        generate(plain, output_attentions=True, return_dict_in_generate=True)


def test_offloading_a_layer():
    _, cache = under()
    with pytest.raises(UnsupportedError, match="offloading does not work"):
        cache.layers[0].offload()
    with pytest.raises(UnsupportedError, match="offloading does not work"):
        cache.layers[0].prefetch()


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_goes_on_with_its_batch_dtype_and_model(new):
    plain, cache = under()
    plain(IDS, past_key_values=cache)
    with pytest.raises(ConfigError, match="was filled with 1 rows; the new tokens have 2"):
        plain(IDS[:, :new].repeat(2, 1), past_key_values=cache)
    with pytest.raises(
        ConfigError, match=r"was filled with torch.float32 as dtype; the new tokens have torch.bfloat16"
    ):
        plain.to(torch.bfloat16)(IDS[:, :new], past_key_values=cache)
    with pytest.raises(ConfigError, match="was filled with 2 KV heads; the new tokens have 1"):
        under("mistral-4-1-128")[0](IDS[:, :new], past_key_values=cache)
    with pytest.raises(ConfigError, match="was filled with 32 channels a head; the new tokens have 64"):
        under("llama-2-2-64")[0](IDS[:, :new], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("other", ["llama-2-2-64", "gpt_neox-2-2-32", "gemma3-4-2-32"])
def test_a_cache_made_for_another_model(other):
    plain, _ = under()
    _, cache = under(other)
    with pytest.raises(PyramidKVError, match=r"past_key_values|attention_mask"):
        plain(IDS, past_key_values=cache)


def test_a_cache_made_for_a_model_that_runs_another_attention_says_whose_config_it_needs():
    plain, _ = under()
    cache = PyramidKVCache(model("llama-2-2-64").config, **SMALL)
    with pytest.raises(UnsupportedError, match=r"model\.config itself"):
        plain(IDS, past_key_values=cache)
