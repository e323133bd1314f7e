"""A batch that is prefilled a few rows at a time: the tokens, the budgets and the bytes of the batch as a whole."""

import pytest
import torch

import pyramidkv
from families import NAMES, model, padded_batch
from kernel_testing import poisoned
from pyramidkv import rows
from test_decode_graph import steps_anywhere  # noqa: F401

PLAIN = [name for name in NAMES if not name.startswith("gemma3")]
LENGTHS = (61, 40, 23, 61, 12, 50, 33)


@pytest.fixture(autouse=True)
def poison():
    with poisoned():
        yield


@pytest.fixture
def grouped(monkeypatch):
    """How many groups each prefill was made of."""
    seen = []
    was = rows.prefill_rows

    def counted(forward, cache, inputs, groups):
        seen.append(len(groups))
        return was(forward, cache, inputs, groups)

    monkeypatch.setattr("pyramidkv.session.prefill_rows", counted)
    return seen


def generate(plain, ids, mask, together, monkeypatch, **options):
    monkeypatch.setattr(rows.row_groups, "__defaults__", (together,))
    with pyramidkv.compress(plain, decode="eager", **options) as session:
        out = plain.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
        return out, session.report(), session.cache.fork()


def alike(plain, ids, mask, grouped, monkeypatch, groups, together=130, **options):
    whole, usage, cache = generate(plain, ids, mask, 10**6, monkeypatch, **options)
    assert grouped == []
    parts, same, other = generate(plain, ids, mask, together, monkeypatch, **options)
    assert grouped == groups
    assert torch.equal(parts, whole) and same == usage
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert (a.counts, a.held, a.seen, a.prompts, a.settled) == (b.counts, b.held, b.seen, b.prompts, b.settled)
        assert torch.equal(a.storage.positions, b.storage.positions)


@pytest.mark.parametrize("name", PLAIN)
def test_padded_rows_in_groups(name, grouped, monkeypatch):
    ids, mask, _ = padded_batch(LENGTHS)
    alike(model(name), ids, mask, grouped, monkeypatch, [4], keep=0.4, window=6)


@pytest.mark.parametrize("options", [{"bytes": 300_000}, {"share": 0.4}, {"budget": 30}, {"keep": 0.9}], ids=str)
def test_budgets_are_those_of_the_whole_batch(options, grouped, monkeypatch):
    ids, mask, _ = padded_batch(LENGTHS)
    alike(model("llama-4-2-32"), ids, mask, grouped, monkeypatch, [4], window=6, room=20, **options)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "heads": "adaptive"}], ids=str)
def test_groups_fill_the_buffers_of_the_whole(options, steps_anywhere, monkeypatch):  # noqa: F811
    monkeypatch.setattr(rows.row_groups, "__defaults__", (130,))
    plain = model("gpt_neox-2-2-80")
    ids, _, _ = padded_batch((61,) * 7)
    found = []
    for decode in ("eager", "graph"):
        with pyramidkv.compress(plain, decode=decode, keep=0.4, window=6, recent=8, room=30, **options) as session:
            for prompt in (ids, ids.flip(1)):
                found.append(plain.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0))
                keys = session.cache.layers[0].storage.newest.keys
                assert keys.untyped_storage().nbytes() == keys.nbytes and len(keys) == 7
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert session._graph.captures == 1


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"method": "auto"},
        {"method": "echo", "heads": "adaptive"},
        {"method": "random"},
        {"method": "h2o"},
        {"method": "rms", "slack": 4, "budget": 20},
        {"method": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt_neox-2-2-80", "llama-4-2-32"])
def test_every_kind_of_storage(name, options, grouped, monkeypatch):
    ids = torch.randint(3, 101, (7, 150), generator=torch.Generator().manual_seed(2))
    amount = {} if "budget" in options or options.get("method") == "full" else {"keep": 0.6}
    options = {"recent": 16, **options, **amount} if options.get("method") != "full" else options
    alike(model(name), ids, torch.ones_like(ids), grouped, monkeypatch, [4], together=320, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_neox-2-2-80", {"bits": 4, "keep": 0.6}),
        ("gpt_neox-2-2-80", {"method": "auto", "bytes": 1_200_000}),
        ("llama-4-2-32", {"method": "auto", "keep": 0.6}),
        ("llama-4-2-32", {"method": "rms", "bits": 8, "heads": "adaptive", "share": 0.5}),
        ("llama-4-2-32", {"method": "snapkv", "bits": 2, "budget": 120}),
    ],
    ids=str,
)
def test_padded_rows_that_are_packed(name, options, grouped, monkeypatch):
    """A group of rows that have nothing to put into pages comes before one that fills many."""
    ids, mask, _ = padded_batch((12, 20, 9, 200, 90, 200, 131))
    alike(model(name), ids, mask, grouped, monkeypatch, [4], together=430, recent=8, window=16, room=20, **options)


def test_padded_rows_that_are_packed_fill_the_pages_of_the_whole(steps_anywhere, monkeypatch):  # noqa: F811
    monkeypatch.setattr(rows.row_groups, "__defaults__", (430,))
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((12, 20, 9, 200, 90, 200, 131))
    options = {"method": "auto", "recent": 8, "window": 16, "keep": 0.6}
    found = []
    for decode in ("eager", "graph"):
        with pyramidkv.compress(plain, decode=decode, **options) as session:
            for prompt in (ids, ids.roll(1, 0)):
                out = plain.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
                found.append(out)
                codes = session.cache.layers[0].storage.pages.keys.codes
                assert len(codes) == 7 and codes.untyped_storage().nbytes() == codes.nbytes
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert session._graph.captures == 1


def test_groups():
    assert rows.row_groups(7, 61, 130) == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 7)]
    assert rows.row_groups(3, 500, 130) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert rows.row_groups(5, 10, 130) == [slice(0, 5)]
    assert rows.row_groups(1, 10**6) == [slice(0, 1)]
    assert rows.row_groups(8, 6144) == [slice(0, 4), slice(4, 8)]


def test_an_error_in_the_second_group_leaves_an_empty_cache(monkeypatch):
    monkeypatch.setattr(rows.row_groups, "__defaults__", (130,))
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch(LENGTHS)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory left")

    hook = plain.model.layers[1].register_forward_pre_hook(fail)
    with pyramidkv.compress(plain, keep=0.4, window=6) as session, torch.no_grad():
        with pytest.raises(RuntimeError, match="no memory left"):
            plain(ids, attention_mask=mask, logits_to_keep=1)
        cache = session.cache
        assert cache.get_seq_length() == 0
        hook.remove()
        out = plain(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        assert cache.get_seq_length() == 61 and out.logits.shape == (7, 1, 101)
