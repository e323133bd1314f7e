"""The captured decoding step, with the capture itself replaced by running the same step again; see test_gpu.py."""

import copy
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch.nn import functional

import evicting
import pyramidkv
from families import NAMES, model, padded_batch
from pyramidkv.decode import graph as graphs
from pyramidkv.decode import products
from pyramidkv.decode.evictions import Evictions
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.pool import Pool
from pyramidkv.storage import Storage

PLAIN = [name for name in NAMES if not name.startswith("gemma3")]  # no sliding layers
ARGUMENTS = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def steps_anywhere(monkeypatch):
    def record(work, device, warm_ups=graphs.WARM_UPS, pool=None):
        places = dict(graphs.PLACES)
        for _ in range(warm_ups):
            work()

        def replay():
            graphs.PLACES.update(places)
            work()
            graphs.PLACES.clear()

        return replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "why_eager", lambda *_: None)


def eager(plain, ids, mask, **options):
    with pyramidkv.compress(plain, decode="eager", **options) as session:
        return plain.generate(ids, attention_mask=mask, **ARGUMENTS), session.report()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_and_usage_are_those_of_the_eager_path(name, padded):
    plain = model(name)
    ids, mask, _ = padded_batch((61, 40, 23))
    if not padded:
        ids, mask = ids[:1], mask[:1]
    options = {"keep": 0.4, "window": 6, "room": 50}
    expected, usage = eager(plain, ids, mask, **options)
    with pyramidkv.compress(plain, **options) as session:
        assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
        assert session._graph.captures == 1
        assert session.report() == usage


@pytest.mark.parametrize("options", [{"bits": 4}, {"method": "echo", "heads": "adaptive", "bits": 8}], ids=str)
@pytest.mark.parametrize("name", ["llama-4-2-32", "gpt_neox-2-2-80"])
def test_packed_caches_too(name, options):
    plain = model(name)
    ids, mask, _ = padded_batch((300, 140, 120))
    options = {"keep": 0.5, "window": 6, "room": 50, **options}
    expected, usage = eager(plain, ids, mask, **options)
    with pyramidkv.compress(plain, **options) as session:
        assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
        assert session._graph.captures == 1
        assert session.report() == usage


def test_a_second_prompt_lies_in_the_same_buffers_and_captures_nothing():
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((61, 40, 23))
    shorter = ids[:, 8:], mask[:, 8:]
    options = {"keep": 0.4, "window": 6, "room": 50}
    with pyramidkv.compress(plain, **options) as session:
        plain.generate(ids, attention_mask=mask, **ARGUMENTS)
        found = plain.generate(shorter[0], attention_mask=shorter[1], **ARGUMENTS)
        assert session._graph.captures == 1
    assert torch.equal(found, eager(plain, *shorter, **options)[0])


@pytest.mark.parametrize("options", [{"bits": 4}, {"method": "echo", "heads": "adaptive", "bits": 8}], ids=str)
def test_pages_lie_where_those_of_the_last_prompt_lay(options):
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((300, 140, 120))
    options = {"keep": 0.5, "window": 6, "room": 50, **options}
    with pyramidkv.compress(plain, **options) as session:
        found = []
        for start in (0, 0, 30, 0):  # another prompt, a shorter one, and the first again
            prompt = ids[:, start:].flip(0) if start == 0 and len(found) == 1 else ids[:, start:]
            real = mask[:, start:].flip(0) if start == 0 and len(found) == 1 else mask[:, start:]
            found.append((prompt, real, plain.generate(prompt, attention_mask=real, **ARGUMENTS)))
        # Heads of unequal length find room in larger pages; where all have the same, their number must be the same.
        assert session._graph.captures == (1 if "heads" in options else 3)
        gone = [pool._pages for pool in session._graph.pools]
        assert gone == [None] * len(gone)  # in use
    assert all(pool._pages is None for pool in session._graph.pools)
    for prompt, real, tokens in found:
        assert torch.equal(tokens, eager(plain, prompt, real, **options)[0])


def test_full_buffers_grow_and_are_captured_again():
    plain = model("gpt_neox-2-2-80")
    ids, mask, _ = padded_batch((61, 40, 23))
    options = {"keep": 0.4, "window": 6, "room": 12}
    with pyramidkv.compress(plain, **options) as session:
        found = plain.generate(ids, attention_mask=mask, **ARGUMENTS)
        assert session._graph.captures == 3  # 12 slots, then 12 more, then 24
    assert torch.equal(found, eager(plain, ids, mask, **options)[0])


def test_a_cache_in_use_keeps_its_buffers():
    plain = model("llama-2-2-64")
    ids, mask, _ = padded_batch((61, 61, 61))
    with pyramidkv.compress(plain, keep=0.4, window=6) as session:
        first = plain.generate(ids, attention_mask=mask, return_dict_in_generate=True, **ARGUMENTS).past_key_values
        before = [layer.storage.keys.clone() for layer in first.layers]
        plain.generate(ids.flip(0) % 90 + 3, attention_mask=mask, **ARGUMENTS)
        assert session._graph.captures == 2
    for layer, keys in zip(first.layers, before, strict=True):
        assert torch.equal(layer.storage.keys[:, :, : layer.storage.length], keys[:, :, : layer.storage.length])


def test_usual_forwards_and_captured_steps_can_alternate():
    plain = model("gpt_neox-2-2-32").eval()
    ids, _, _ = padded_batch((61, 61, 61))
    tokens = torch.randint(3, 101, (3, 30))

    def logits(**options):
        out = []
        with pyramidkv.compress(plain, keep=0.4, window=6, **options), torch.no_grad():
            cache = plain(ids).past_key_values
            for i in range(30):
                ask = {"output_hidden_states": True} if i % 7 == 6 else {}  # what the step does not answer
                out.append(plain(tokens[:, i : i + 1], past_key_values=cache, **ask).logits)
            positions = [layer.storage.positions[:, :, : layer.storage.length].clone() for layer in cache.layers]
            turn = plain(tokens[:, :9], past_key_values=cache)  # evicts, and decodes on
            out += [turn.logits, plain(tokens[:, :1], past_key_values=cache).logits]
            kept = [layer.storage.positions[:, :, : layer.storage.length] for layer in cache.layers]
        return torch.cat(out, 1), positions, kept

    (one, *places), (other, *same) = logits(), logits(decode="eager")
    assert (one - other).abs().max() < 1e-5
    for a, b in zip(places, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_forks_go_their_own_ways():
    plain = model("llama-4-2-32").eval()
    ids, _, _ = padded_batch((61, 61, 61))

    def both(decode):
        with pyramidkv.compress(plain, keep=0.4, window=6, decode=decode), torch.no_grad():
            one = plain(ids).past_key_values
            other = one.fork()
            out = []
            for token in (5, 6, 7, 8):
                for cache, extra in ((one, 0), (other, 20)):
                    out.append(plain(torch.full((3, 1), token + extra), past_key_values=cache).logits)
                    out.append(plain(torch.full((3, 1), token + extra), past_key_values=cache).logits)
        return torch.cat(out, 1)

    assert (both("graph") - both("eager")).abs().max() < 1e-5


def test_beam_search_decodes_the_usual_way():
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((61, 40, 23))
    options = {"keep": 0.4, "window": 6}
    found = []
    for decode in ("eager", "graph"):
        with pyramidkv.compress(plain, decode=decode, **options):
            found.append(plain.generate(ids, attention_mask=mask, num_beams=3, **ARGUMENTS))
    assert torch.equal(*found)


def test_the_step_compiles_whole_and_once(monkeypatch):
    compiled = []
    compile_ = torch.compile

    def traced(step, options, **how):
        compiled.append(how)
        return compile_(step, backend="eager", **how)

    monkeypatch.setattr(torch, "compile", traced)
    plain = model("gpt_neox-2-2-80")
    ids, mask, _ = padded_batch((61, 40, 23))
    for keep in (0.4, 0.3):  # other capacities, another session
        options = {"keep": keep, "window": 6, "room": 50}
        with (
            torch._dynamo.config.patch(error_on_recompile=True),
            pyramidkv.compress(plain, decode="compiled", **options),
        ):
            found = plain.generate(ids, attention_mask=mask, **ARGUMENTS)
        assert torch.equal(found, eager(plain, ids, mask, **options)[0])
    assert compiled == [{"fullgraph": True, "dynamic": False}]


@pytest.mark.parametrize("name", ["gpt_neox-2-2-80", "llama-4-2-32"])
def test_products_of_a_step_and_no_others_go_through_the_op(name, monkeypatch):
    seen = []

    def why_torch(x, weight, bias):
        seen.append((x.shape, weight.data_ptr(), None if bias is None else bias.data_ptr()))
        return "they are watched"

    monkeypatch.setattr(products, "why_torch", why_torch)
    monkeypatch.setattr("pyramidkv.onednn.why_no_onednn", lambda: "as on a GPU")
    plain = model(name)
    layers = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    ids, mask, _ = padded_batch((61, 40, 23))
    expected, _ = eager(plain, ids, mask, keep=0.4, window=6)
    assert not seen
    with pyramidkv.compress(plain, keep=0.4, window=6):
        plain(ids[:, :9], attention_mask=mask[:, :9])
        assert not seen
        assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
    steps, rest = divmod(len(seen), len(layers))
    assert steps > 30
    assert rest == 0
    assert {x for x, *_ in seen} == {(3, layer.in_features) for layer in layers}
    whole = {(layer.weight.data_ptr(), None if layer.bias is None else layer.bias.data_ptr()) for layer in layers}
    assert {tuple(weights) for _, *weights in seen} == whole


def test_other_products_are_left_alone(monkeypatch):
    class Wrapped(torch.Tensor):
        """As a quantised weight is."""

    class Own(torch.nn.Linear):
        def forward(self, x):
            return (self.weight @ x.mT).mT

    monkeypatch.setattr(products, "why_torch", lambda *_: pytest.fail("the op was asked"))
    weight, x = torch.randn(8, 16), torch.randn(2, 1, 16)
    with products.PRODUCTS:
        assert torch.equal(functional.linear(x, weight.as_subclass(Wrapped)).as_subclass(torch.Tensor), x @ weight.T)
        assert Own(16, 8)(x).shape == (2, 1, 8)
        assert functional.linear(torch.randn(17, 1, 16), weight).shape == (17, 1, 8)
        assert functional.linear(x, weight[0]).shape == (2, 1)


def test_closing_gives_back_forward_and_buffers():
    plain = model("llama-4-2-32")
    assert "forward" not in vars(plain)
    ids, mask, _ = padded_batch((61, 40, 23))
    session = pyramidkv.compress(plain, keep=0.4, window=6)
    with session:
        plain.generate(ids, attention_mask=mask, **ARGUMENTS)
        assert "forward" in vars(plain)
        buffers = [type(layer) is PyramidKVLayer and layer.pool is not None for layer in session._cache.layers]
        assert all(buffers)
    assert "forward" not in vars(plain)
    gc.collect()
    assert all(pool._free is None for pool in session._graph.pools)


def test_a_forward_that_was_replaced_before_comes_back():
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((61, 40, 23))
    expected, _ = eager(plain, ids, mask, keep=0.4, window=6)
    plain.forward = hooked = functools.partial(plain.forward)  # as accelerate's hooks leave it: no method
    try:
        with pyramidkv.compress(plain, keep=0.4, window=6) as session:
            assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
            assert session._graph.captures == 1
        assert plain.forward is hooked
    finally:
        del plain.forward


def test_a_pool_lends_to_one_storage_at_a_time():
    pool = Pool()
    key = torch.randn(2, 3, 20, 8)
    positions = torch.arange(20).expand(2, 3, 20).int()
    one = Storage.whole(key, key, positions, 10, pool=pool)
    other = Storage.whole(key, key, positions, 10, pool=pool)
    first = one.keys
    assert other.keys is not first
    del one
    again = Storage.whole(key[:, :, :15], key[:, :, :15], positions[..., :15], 5, pool=pool)
    assert again.keys is first and again.capacity == 30
    del again
    assert Storage.whole(key[:, :, :5], key[:, :, :5], positions[..., :5], 5, pool=pool).keys is not first  # too large
    del other
    pool.close()
    assert pool._free is None


def test_a_pool_has_the_grown_buffers_back_and_the_old_ones_can_go():
    pool = Pool()
    key = torch.randn(2, 3, 20, 8)
    positions = torch.arange(20).expand(2, 3, 20).int()
    one = Storage.whole(key, key, positions, 5, pool=pool)
    old = weakref.ref(one.keys)
    one.append(key, key, positions, 5)
    assert old() is None
    grown, fork = one.keys, copy.deepcopy(one)
    del fork  # owns its buffers
    assert pool._free is None
    del one
    assert Storage.whole(key, key, positions, 5, pool=pool).keys is grown


def test_what_can_not_be_captured_is_said(monkeypatch):
    monkeypatch.undo()
    for decode in ("graph", "compiled"):
        with pytest.raises(pyramidkv.UnsupportedError, match=f"decode='{decode}': the model is on cpu"):
            pyramidkv.compress(model("llama-4-2-32"), keep=0.4, decode=decode).open()
    with pytest.raises(pyramidkv.ConfigError, match="decode='fast': unknown"):
        pyramidkv.CompressionConfig(keep=0.5, decode="fast")


@pytest.mark.parametrize("method", ["snapkv", "rms", "knorm"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_bound_is_kept_in_the_same_buffers(padded, method):
    """Evictions between replays: the graph goes on over the same buffers, and has written the queries they ask for."""
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((61, 40, 10))  # the last row has empty slots until the first eviction
    if not padded:
        ids, mask = ids[:1], mask[:1]
    options = {"method": method, "budget": 16, "window": 6, "slack": 9, "room": 9}
    expected, usage = eager(plain, ids, mask, **options)
    assert max(layer.kept_tokens for layer in usage.layers) <= 25
    with pyramidkv.compress(plain, **options) as session:
        for _ in range(2):  # another prompt: the same buffers and ring, unless another cache uses them
            assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
            assert (session._graph.captures, session._graph.evictions.captures) == (1, 3)
        other = session.cache
        assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
        assert session._graph.captures == 2
        assert other.report() == usage
        assert session.report() == usage


def test_layers_that_evict_out_of_step_are_replayed_too(monkeypatch):
    """Rows of unequal length reach the budgets of a pyramid's layers at different tokens."""
    plain = model("gpt_neox-2-2-80")
    ids, mask, _ = padded_batch((200, 170, 20))
    options = {"method": "pyramidkv", "budget": 40, "window": 8, "slack": 18, "room": 18}
    found, together, run = [], set(), Evictions.run

    def seen_together(due):
        together.add(len(due))
        return due

    monkeypatch.setattr(Evictions, "run", lambda self, due: run(self, seen_together(list(due))))
    for decode in ("eager", "graph"):
        with pyramidkv.compress(plain, decode=decode, **options) as session:
            for prompt in (ids, ids.flip(1)):  # the second finds the graphs of the first
                found.append(
                    plain.generate(
                        prompt, attention_mask=mask, **{**ARGUMENTS, "max_new_tokens": 160, "min_new_tokens": 160}
                    )
                )
            layers = len(session.cache.layers)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert max(together) < layers or len(together) > 1
    assert session._graph.evictions.captures == layers


ONE_IN_8 = {"method": "rms", "bits": 4, "layers": "1:8,1,1"}


swinging = pytest.fixture(evicting.swinging)


@pytest.mark.usefixtures("swinging")
@pytest.mark.parametrize("options", [evicting.SWINGING, {"method": "echo"}], ids=str)
def test_replays_of_an_eviction_leave_what_launches_do(options, monkeypatch):
    """The work of one eviction is run again at all that follow, over other tokens and heads of other numbers."""
    plain = model("gpt_neox-2-2-80")
    ids, _, _ = padded_batch((290, 290))
    new = padded_batch((36, 36), seed=5)[0]
    options = {"budget": 200, "window": 8, "recent": 8, "slack": 5, "room": 5, **options}
    got, replayed = evicting.after_evictions(plain, (ids, ids.flip(1)), new, options)
    monkeypatch.setattr("pyramidkv.decode.evictions._comes_again", lambda *_: False)
    expected, launched = evicting.after_evictions(plain, (ids, ids.flip(1)), new, options)
    assert len(got) == len(expected) == 14
    assert evicting.alike(got, expected)
    layers = len(got[0])
    assert (launched.captures, launched.launched) == (0, 14 * layers)
    assert layers <= replayed.captures <= replayed.launched < 5 * layers
    if options["method"] == "swinging":
        assert len({tuple(pages) for _, _, pages in (layers[-1] for layers in got)}) > 1


REPLACED = {
    "keys": lambda layer: setattr(layer.storage.new, "keys", layer.storage.new.keys.clone()),
    "values": lambda layer: setattr(layer.storage.new, "values", layer.storage.new.values.clone()),
    "positions": lambda layer: setattr(layer.storage.new, "positions", layer.storage.new.positions.clone()),
    "queries": lambda layer: setattr(layer.ring, "queries", layer.ring.queries.clone()),
    "packed keys": lambda layer: replace_pages(layer, keys=layer.storage.pages.keys.each(torch.clone)),
    "packed values": lambda layer: replace_pages(layer, values=layer.storage.pages.values.each(torch.clone)),
    "layout": lambda layer: replace_pages(layer, layout=layer.storage.pages.layout.clone()),
    "bitmap": lambda layer: setattr(layer.storage, "bitmap", layer.storage.bitmap.clone()),
}


def replace_pages(layer, **changed):
    layer.storage.pages = dataclasses.replace(layer.storage.pages, **changed)


def test_a_replaced_buffer_ends_the_replays_over_the_old_one(monkeypatch):
    """Each buffer in turn goes to another place once there are graphs over it: those may not be replayed any more."""
    plain = model("gpt_neox-2-2-80")
    options = {"method": "echo", "bits": 4, "budget": 100, "window": 8, "recent": 8, "slack": 4, "room": 4}
    prompt, new = padded_batch((140,))[0], padded_batch((86,), seed=5)[0]

    def move(evictions, layers):
        if evictions >= 3 and evictions % 2 == 1:  # after the prompt's, one is launched, and the next is captured
            for layer in layers:
                list(REPLACED.values())[(evictions - 3) // 2 % len(REPLACED)](layer)

    got, replayed = evicting.after_evictions(plain, [prompt], new, options, move)
    monkeypatch.setattr("pyramidkv.decode.evictions._comes_again", lambda *_: False)
    expected, launched = evicting.after_evictions(plain, [prompt], new, options, move)
    assert evicting.alike(got, expected)
    layers = len(got[0])
    assert (len(got), launched.launched) == (21, 21 * layers)
    assert (replayed.captures, replayed.launched) == (10 * layers, 11 * layers)


@pytest.mark.usefixtures("swinging")
@torch.no_grad()
def test_what_is_made_of_a_cache_between_replays_goes_its_own_way(tmp_path):
    """Forked, saved, cropped: each over memory of its own, while the graphs go on over that of the first."""
    plain = model("gpt_neox-2-2-80")
    ids = padded_batch((290,))[0]
    new = padded_batch((60,), seed=5)[0]
    options = {"budget": 200, "window": 8, "recent": 8, "slack": 5, "room": 5, **evicting.SWINGING}

    def go(cache, at):
        return torch.cat([plain(new[:, i : i + 1], past_key_values=cache).logits for i in at], 1)

    def run(decode):
        with pyramidkv.compress(plain, decode=decode, **options) as session:
            first = plain(ids).past_key_values
            out = [go(first, range(23))]
            other = first.fork()
            first.save(tmp_path / decode)
            out.append(go(first, range(23, 40)))
            first.crop(-1)
            out.append(go(other, range(40, 60)))
            out.append(go(first, range(39, 50)))
            loaded = pyramidkv.PyramidKVCache.load(tmp_path / decode, plain.config)
            out.append(go(loaded, range(23, 40)))
            kept = [layer.storage.positions for cache in (first, other, loaded) for layer in cache.layers]
        return torch.cat(out, 1), kept, session._graph

    logits, kept, graph = run("auto")
    expected, others, _ = run("eager")
    torch.testing.assert_close(logits[:, 23:40], logits[:, -17:], rtol=1e-4, atol=1e-5)  # as what was written
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, kept, others))
    assert graph.evictions.captures >= 2


@pytest.mark.parametrize("options", [{"method": "auto"}, ONE_IN_8, {"method": "knorm", "bits": 8}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_bound_of_packed_caches_is_kept_in_the_same_pages(padded, options):
    plain = model("llama-4-2-32")
    ids, mask, _ = padded_batch((240, 190))
    if not padded:
        ids, mask = ids[:1], mask[:1]
    options = {"budget": 130, "window": 8, "recent": 8, "slack": 9, "room": 9, **options}
    expected, usage = eager(plain, ids, mask, **options)
    with pyramidkv.compress(plain, **options) as session:
        for _ in range(2):
            assert torch.equal(plain.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
        assert session._graph.captures == 1
        assert session.report().layers == usage.layers
