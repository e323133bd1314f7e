"""Plain `generate()`, pipelines and direct calls under compression; the eviction rule; rows and forks on their own."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextStreamer, pipeline

import pyramidkv
from families import model, padded_batch

METHODS = [name for name in pyramidkv.methods() if name != "full"]
LENGTHS = (50, 31, 44)
NEOX = "gpt_neox-2-2-32"
LLAMA = "llama-4-2-32"


def generate(plain, ids, mask=None, new=6, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return plain.generate(
        ids, attention_mask=mask, max_new_tokens=new, **{"do_sample": False, "pad_token_id": 0, **options}
    )


def cache_for(plain, **options):
    plain.set_attn_implementation("pyramidkv")
    return pyramidkv.PyramidKVCache(plain.config, **{"window": 4, **options})


def kept(layer, row=0, head=0):
    """Positions that a layer holds of a row, without empty slots."""
    return [p for p in layer.storage.positions[row, head, : layer.storage.length].tolist() if p >= 0]


DECODING = [
    {},
    {"do_sample": True, "top_k": 20},
    {"num_beams": 3},
    {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
    {"prefill_chunk_size": 40},
    {"repetition_penalty": 1.3, "min_new_tokens": 4},
]


@pytest.mark.parametrize("options", DECODING, ids=str)
def test_every_way_of_decoding_equals_the_plain_model_when_nothing_is_evicted(options):
    plain = model(LLAMA)
    ids, mask, _ = padded_batch(LENGTHS)
    torch.manual_seed(3)
    expected = generate(plain, ids, mask, **options)
    torch.manual_seed(3)
    with pytest.warns(pyramidkv.CompressionWarning), pyramidkv.compress(plain, budget=300):
        got = generate(plain, ids, mask, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", DECODING, ids=str)
@pytest.mark.parametrize("name", [NEOX, "gemma3-4-2-32"])
def test_every_way_of_decoding_runs_compressed_and_repeatably(name, options):
    plain = model(name)
    ids, mask, _ = padded_batch(LENGTHS)
    out = []
    for _ in range(2):
        torch.manual_seed(3)
        with pyramidkv.compress(plain, budget=12, window=4) as session:
            out.append(generate(plain, ids, mask, **options))
        assert session.report().evicted
    assert torch.equal(*out)
    assert out[0].shape[1] == max(LENGTHS) + 6


def test_beams_after_compression_are_the_beams_of_that_context():
    """Beam search over a compressed prompt scores what teacher forcing over the same compressed prompt scores."""
    plain = model(LLAMA)
    ids = padded_batch((40,))[0]
    options = {"budget": 14, "window": 4}
    with pyramidkv.compress(plain, **options):
        out = generate(
            plain, ids, num_beams=4, new=5, return_dict_in_generate=True, output_scores=True, length_penalty=0.0
        )
    cache = cache_for(plain, **options)
    with torch.no_grad():
        logits = [plain(ids, past_key_values=cache).logits[0, -1]]
        for token in out.sequences[0, 40:-1]:
            logits.append(plain(token.view(1, 1), past_key_values=cache).logits[0, -1])
    score = sum(step.log_softmax(-1)[t] for step, t in zip(logits, out.sequences[0, 40:], strict=True))
    torch.testing.assert_close(out.sequences_scores[0], score, rtol=1e-3, atol=1e-3)


def test_the_dict_that_generate_returns_carries_the_compressed_cache():
    plain = model(NEOX)
    with pyramidkv.compress(plain, keep=0.5, window=4) as session:
        out = generate(plain, padded_batch((40,))[0], return_dict_in_generate=True, output_logits=True)
    assert isinstance(out.past_key_values, pyramidkv.PyramidKVCache)
    assert out.past_key_values.get_seq_length() == 45
    assert len(out.logits) == 6
    assert out.past_key_values.report() == session.report()


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(101)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w1", padding_side="left")


def test_a_text_generation_pipeline_is_compressed(tokenizer):
    plain = model(NEOX)
    texts = [" ".join(f"w{3 + (7 * i) % 90}" for i in range(n)) for n in (40, 25)]
    pipe = pipeline("text-generation", model=plain, tokenizer=tokenizer)
    alone = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    with pyramidkv.compress(plain, keep=0.4, window=4) as session:
        batch = [out[0]["generated_text"] for out in pipe(texts, batch_size=2, **alone)]
        single = [pipe(text, **alone)[0]["generated_text"] for text in texts]
    assert session.report().evicted
    assert batch == single


def test_streaming_gives_every_token_in_order(tokenizer, capsys):
    plain = model(NEOX)
    ids = padded_batch((30,))[0]
    with pyramidkv.compress(plain, keep=0.5, window=4):
        out = generate(plain, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0, 30:]).split()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [NEOX, "gemma3-4-2-32"])
def test_a_padded_row_generates_what_it_generates_alone(name, method):
    plain = model(name)
    ids, mask, _ = padded_batch(LENGTHS)
    with pyramidkv.compress(plain, method=method, keep=0.4, window=6):
        together = generate(plain, ids, mask, min_new_tokens=6)
        for row, length in enumerate(LENGTHS):
            alone = generate(plain, ids[row : row + 1, 50 - length :], min_new_tokens=6)
            assert torch.equal(alone[0, length:], together[row, 50:])


def two_turns(plain, first, second, masks=None, **options):
    """Logits of the second turn, and the cache; positions count real tokens."""
    cache = cache_for(plain, **options)
    masks = (torch.ones_like(first), torch.ones_like(second)) if masks is None else masks
    mask = torch.cat(masks, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    split = first.shape[1]
    with torch.no_grad():
        plain(first, attention_mask=masks[0], position_ids=positions[:, :split], past_key_values=cache)
        logits = plain(second, attention_mask=mask, position_ids=positions[:, split:], past_key_values=cache).logits
    return logits, cache


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"window": 4}, {"window": 6, "recent": 12}, {"window": 3, "recent": 0}], ids=str)
def test_a_row_with_padding_in_its_second_turn_is_as_alone(method, options):
    plain = model(LLAMA)
    first, first_mask, _ = padded_batch((40, 23, 31))
    second, second_mask, _ = padded_batch((9, 12, 2), seed=5)
    options = {"method": method, "budget": 16, "heads": "uniform", **options}
    together, many = two_turns(plain, first, second, (first_mask, second_mask), **options)
    for row, (a, b) in enumerate([(40, 9), (23, 12), (31, 2)]):
        alone, one = two_turns(plain, first[row : row + 1, 40 - a :], second[row : row + 1, 12 - b :], **options)
        torch.testing.assert_close(together[row, 12 - b :], alone[0], rtol=1e-4, atol=1e-4)
        for x, y in zip(many.layers, one.layers, strict=True):
            for head in range(2):
                assert kept(x, row, head) == kept(y, 0, head)


@pytest.mark.parametrize("name", [NEOX, LLAMA, "gemma3-4-2-32"])
def test_an_unlimited_budget_is_the_plain_model_over_two_padded_turns(name):
    plain = model(name)
    first, first_mask, _ = padded_batch((20, 13))
    second, second_mask, _ = padded_batch((5, 11), seed=5)
    mask = torch.cat([first_mask, second_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        start = plain(first, attention_mask=first_mask, position_ids=positions[:, :20])
        expected = plain(
            second, attention_mask=mask, position_ids=positions[:, 20:], past_key_values=start.past_key_values
        ).logits
    got, cache = two_turns(plain, first, second, (first_mask, second_mask), budget=300)
    real = second_mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not cache.report().evicted


@torch.no_grad()
def test_two_turns_of_generate_on_one_cache():
    plain = model(LLAMA)
    cache = cache_for(plain, keep=0.5)
    first = generate(plain, padded_batch((30,))[0], past_key_values=cache)
    again = torch.cat([first, padded_batch((10,), seed=4)[0]], 1)
    out = generate(plain, again, past_key_values=cache)
    assert out.shape[1] == 52
    assert cache.get_seq_length() == 51
    report = cache.report()
    assert report.evicted
    # After turn two (46 tokens seen: 23 a layer on average) only generated tokens came on top.
    assert sum(layer.kept_tokens for layer in report.layers) <= 3 * 23 + 3 * 5


@settings(max_examples=30)
@given(st.data())
def test_after_a_forward_with_several_queries_no_layer_is_above_its_budget(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    method = data.draw(st.sampled_from(METHODS))
    window, recent = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 9))
    amount = data.draw(st.sampled_from([{"budget": recent + 1 + data.draw(st.integers(0, 20))}, {"keep": 0.3}]))
    plain = model(data.draw(st.sampled_from([LLAMA, NEOX])))
    cache = cache_for(plain, method=method, window=window, recent=recent, heads="uniform", **amount)
    ids, mask, positions = padded_batch(lengths)
    width, start = max(lengths), 0
    while start < width:
        size = min(data.draw(st.integers(1, 25)), width - start)
        now = slice(start, start + size)
        with torch.no_grad():
            inputs = {"attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
            plain(ids[:, now], past_key_values=cache, **inputs)
        start += size
        for rank, layer in enumerate(cache.layers):
            for row in range(len(lengths)):
                seen = int(mask[row, :start].sum())
                limit = cache.plan.budgets(seen, batch=len(lengths), itemsize=4)[rank]
                for head in range(layer.storage.positions.shape[1]):
                    have = kept(layer, row, head)
                    assert len(have) == layer.held[row]
                    assert have == sorted(set(have)), "a token is kept twice, or out of order"
                    assert not have or have[-1] < seen
                    if size > 1:
                        assert len(have) <= limit
                        newest = list(range(max(seen - recent, 0), seen))
                        assert have[len(have) - len(newest) :] == newest
                    if size == start:  # a first forward fills its budget: no pad took a slot
                        assert len(have) == min(limit, seen)


@torch.no_grad()
def test_positions_stay_logical():
    """A model that is told no positions counts every token seen, not those stored."""
    plain = model(LLAMA)
    ids = padded_batch((40,))[0]
    told, untold = cache_for(plain, keep=0.3), cache_for(plain, keep=0.3)
    for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
        positions = torch.arange(40)[None, part]
        a = plain(ids[:, part], past_key_values=told, position_ids=positions).logits
        b = plain(ids[:, part], past_key_values=untold).logits
        assert torch.equal(a, b)
    assert untold.get_seq_length() == 40
    assert kept(untold.layers[0])[-1] == 39


@torch.no_grad()
def test_several_tokens_at_once_are_those_tokens_one_by_one_when_nothing_more_is_evicted():
    plain = model(LLAMA)
    ids = padded_batch((48,))[0]
    at_once, one_by_one = (cache_for(plain, method="snapkv", keep=0.5, window=8) for _ in range(2))
    for cache in (at_once, one_by_one):
        plain(ids[:, :40], past_key_values=cache)
    several = plain(ids[:, 40:44], past_key_values=at_once).logits
    single = [plain(ids[:, i : i + 1], past_key_values=one_by_one).logits for i in range(40, 44)]
    torch.testing.assert_close(several, torch.cat(single, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("copied", [lambda cache: cache.fork(), copy.deepcopy], ids=["fork", "deepcopy"])
@pytest.mark.parametrize("name", [LLAMA, "gemma3-4-2-32"])
def test_forks_do_not_influence_each_other(name, copied):
    plain = model(name)
    ids = padded_batch((40,))[0]
    questions = [padded_batch((7,), seed=s)[0] for s in (5, 6)]
    options = {"keep": 0.4}

    def answers(cache, question):
        steps = [question, question[:, :1], question[:, 1:2], question[:, 2:6]]
        return torch.cat([plain(ids, past_key_values=cache).logits for ids in steps], 1)

    expected = []
    for question in questions:
        cache = cache_for(plain, **options)
        plain(ids, past_key_values=cache)
        expected.append(answers(cache, question))
    base = cache_for(plain, **options)
    plain(ids, past_key_values=base)
    before = str(base.report())
    forks = [copied(base) for _ in questions]
    for fork, question, logits in zip(forks, questions, expected, strict=True):
        assert torch.equal(answers(fork, question), logits)
        assert fork.config is base.config
    assert str(base.report()) == before
    assert torch.equal(answers(base, questions[1]), expected[1])


def test_a_cache_filled_with_gradients_enabled_can_be_forked():
    plain = model("gemma3-4-2-32")
    cache = cache_for(plain, keep=0.4)
    plain(padded_batch((40,))[0], past_key_values=cache)
    assert cache.fork().get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["repeat", "select", "mask", "reorder"],
)
def test_rows_that_are_moved_go_on_as_they_were(change, rows, padded):
    plain = model(LLAMA)
    lengths = LENGTHS if padded else (50, 50, 50)
    ids, mask, positions = padded_batch(lengths)
    question = padded_batch((6, 6, 6), seed=5)[0]
    after = torch.tensor(lengths)[:, None] + torch.arange(6)

    def go_on(moved):
        cache = cache_for(plain, keep=0.4)
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        picked = list(range(3))
        if moved:
            change(cache)
            picked = rows
        one = plain(question[picked, :1], position_ids=after[picked, :1], past_key_values=cache).logits
        many = plain(question[picked, 1:], position_ids=after[picked, 1:], past_key_values=cache).logits
        return torch.cat([one, many], 1)

    torch.testing.assert_close(go_on(True), go_on(False)[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [NEOX, LLAMA, "gemma3-4-2-32"])
def test_half_precision_models_run_and_store_half_precision(name, dtype):
    plain = model(name).to(dtype)
    ids, mask, _ = padded_batch(LENGTHS)
    with pyramidkv.compress(plain, keep=0.4, window=4) as session:
        out = generate(plain, ids, mask, return_dict_in_generate=True, output_logits=True)
    assert session.report().evicted
    assert all(logits.isfinite().all() for logits in out.logits)
    assert out.past_key_values.layers[0].storage.keys.dtype == dtype


def test_gradients_reach_the_weights_through_a_compressed_past():
    plain = model(LLAMA)
    cache = cache_for(plain, keep=0.4)
    ids = padded_batch((40,))[0]
    with torch.no_grad():
        plain(ids, past_key_values=cache)
    plain(ids[:, :7], past_key_values=cache).logits.square().mean().backward()
    gradients = [p.grad for p in plain.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert not cache.layers[0].storage.keys.requires_grad


@torch.no_grad()
def test_a_row_of_nothing_but_padding_harms_no_other():
    plain = model(LLAMA)
    ids, mask, positions = padded_batch((30, 0, 12))
    cache = cache_for(plain, keep=0.4)
    logits = plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert [kept(layer, 1) for layer in cache.layers] == [[]] * 3
    plain(ids[:, :4], past_key_values=cache)
    assert kept(cache.layers[0], 1) == [0, 1, 2, 3]


@torch.no_grad()
def test_a_reset_cache_is_a_new_one():
    plain = model("gemma3-4-2-32")
    cache, fresh = cache_for(plain, keep=0.4), cache_for(plain, keep=0.4)
    ids, mask, positions = padded_batch(LENGTHS)
    plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.report().keep == 1.0
    question = padded_batch((33,), seed=8)[0]
    for ids in (question, question[:, :1], question[:, :5]):
        assert torch.equal(plain(ids, past_key_values=cache).logits, plain(ids, past_key_values=fresh).logits)
    assert str(cache.report()) == str(fresh.report())


@torch.no_grad()
def test_free_slots_are_never_read():
    plain = model(LLAMA)
    ids, mask, positions = padded_batch(LENGTHS)
    out = []
    for poisoned in (False, True):
        cache = cache_for(plain, keep=0.4, room=3)
        steps = [plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits]
        for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4), slice(4, 9), slice(9, 10)):
            for layer in cache.layers if poisoned else []:
                for buffer in (layer.storage.keys, layer.storage.values):
                    buffer[:, :, layer.storage.length :] = float("nan")
                layer.storage.positions[:, :, layer.storage.length :] = 77
            steps.append(plain(ids[:, part], past_key_values=cache).logits)
        out.append(torch.cat(steps, 1))
    assert torch.equal(*out)
