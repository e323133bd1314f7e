"""The benchmark as a whole: what it writes, what it refuses, and how a run that was cut off goes on."""

import json

import pytest
import torch

from families import model
from pyramidkv import CompressionConfig, ConfigError, PyramidKVError, models
from pyramidkv.cli.bench import _others, _that_fit
from pyramidkv.evaluate import bench, recall, schema, tasks, texts
from pyramidkv.evaluate.bench import Settings

SMALL = {
    "context": 60,
    "target": 20,
    "chunks": 2,
    "recall_context": (300,),
    "recall_examples": 1,
    "prompt": 50,
    "new_tokens": 4,
    "repeats": 2,
}
CONFIG = CompressionConfig(keep=0.5, window=8)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(bench, "hub_problem", lambda: "there is none in this test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny untrained GPT-NeoX with the shipped tokenizer."""
    path = tmp_path_factory.mktemp("model")
    made = model("gpt_neox-2-2-32")
    made.resize_token_embeddings(3072)
    made.save_pretrained(path)
    models.load()[1].save_pretrained(path)
    return str(path)


def settings(folder, **changes):
    return Settings(**{"configs": (CONFIG,), "model": folder, **SMALL, **changes})


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_a_run_writes_every_kind_of_record(folder, tmp_path):
    seen = []
    path = bench.run(settings(folder), tmp_path / "new", progress=lambda *step: seen.append(step))
    records = schema.read(path)
    assert kinds(path) == ["run", *["skipped"] * 2, *["perplexity"] * 2, "layers", *["recall"] * 6, *["speed"] * 2]
    head = records[0]
    assert (head.settings["method"], head.settings["keep"], head.weights_random) == ("pyramidkv", 0.5, False)
    corpora = schema.pick(records, schema.Perplexity)
    assert {row.corpus_sha256 for row in corpora} == {texts.load("python-reference").sha256}
    layers = schema.pick(records, schema.Layers)[0]
    assert all(
        len(head) == n for n, heads in zip(layers.budget_tokens, layers.kept_positions, strict=True) for head in heads
    )
    assert sum(layers.budget_tokens) == 3 * 30
    assert ("speed at batch 1", 2, 2) in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 2)}, "has 2 numbers; this model has 3 layers"),
        ({"decode": "graph"}, "decode='graph': the model"),
    ],
    ids=["layers", "decode"],
)
def test_settings_that_do_not_go_with_the_model_are_refused_before_anything_is_measured(
    options, message, folder, tmp_path
):
    wrong = CompressionConfig(keep=0.5, window=8, **options)
    with pytest.raises(PyramidKVError, match=message):
        bench.run(
            settings(folder, configs=(wrong,), device="cpu"),
            tmp_path / "new",
            progress=lambda *_: pytest.fail("something was measured"),
        )
    assert not (tmp_path / "new").exists()


def test_corpora_named_take_the_place_of_the_default(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    named, skipped = bench._corpora(Settings(configs=(CONFIG,), text=(f"mine={tmp_path}",)))
    assert ([c.name for c in named], skipped) == (["mine"], [])
    named, skipped = bench._corpora(Settings(configs=(CONFIG,)))
    assert [c.name for c in named] == [texts.load("python-reference").name]
    assert [s.what for s in skipped] == ["perplexity on wikitext-2", "perplexity on pg19"]


def test_random_weights_are_measured_for_speed_alone(tmp_path, monkeypatch):
    made = model("gpt_neox-2-2-32")
    loaded = bench.LoadedModel(made, None, "random:tiny", True, 1)
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: loaded)
    records = schema.read(bench.run(settings("random:tiny", metrics=("perplexity", "recall", "speed")), tmp_path / "r"))
    reasons = {r.what: r.reason for r in schema.pick(records, schema.Skipped)}
    assert reasons[f"perplexity on {texts.load('python-reference').name}"] == "not measured (random weights)"
    assert reasons["recall of kv at 300"] == "not measured (random weights)"
    assert len(schema.pick(records, schema.Speed)) == 2


def test_nothing_is_overwritten_unless_asked(folder, tmp_path):
    one = settings(folder, metrics=("speed",))
    path = bench.run(one, tmp_path)
    before = path.read_text()
    with pytest.raises(ConfigError, match="--resume goes on with it, --force replaces it"):
        bench.run(one, tmp_path)
    assert path.read_text() == before
    bench.run(one, tmp_path, force=True)
    assert path.read_text() != before
    assert kinds(path) == ["run", "speed", "speed"]


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(folder, tmp_path, monkeypatch):
    whole = settings(folder, metrics=("perplexity", "recall"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recall, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            bench.run(whole, tmp_path)
    path = tmp_path / schema.RESULTS
    before = path.read_text()
    assert kinds(path) == ["run", *["skipped"] * 2, *["perplexity"] * 2, "layers"]
    bench.run(whole, tmp_path, resume=True)
    assert path.read_text().startswith(before)
    assert kinds(path)[6:] == ["recall"] * 6
    bench.run(whole, tmp_path, resume=True)
    assert len(kinds(path)) == 12


def test_resume_refuses_other_settings_and_half_written_files(folder, tmp_path):
    bench.run(settings(folder, metrics=("speed",)), tmp_path)
    with pytest.raises(ConfigError, match=r"resume=True: .* was made with prompt=50, this run has 51"):
        bench.run(settings(folder, metrics=("speed",), prompt=51), tmp_path, resume=True)
    path = tmp_path / schema.RESULTS
    path.write_text(path.read_text()[:-40])
    with pytest.raises(schema.DataError, match="line 3"):
        bench.run(settings(folder, metrics=("speed",)), tmp_path, resume=True)


def test_a_folder_that_cannot_be_made_is_a_clear_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out="):
        bench.run(settings(folder, metrics=("speed",)), tmp_path / "file" / "below")
    (tmp_path / schema.RESULTS).mkdir()
    with pytest.raises(schema.DataError, match="can't be written"):
        schema.append(tmp_path / schema.RESULTS, schema.Skipped("a", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("speeed",)}, "metric='speeed': unknown; did you mean 'speed'"),
        ({"tasks": ("nedle",)}, "task='nedle': unknown; did you mean 'needle'"),
        ({"target": 0}, "target=0: must be at least 1"),
        ({"chunks": 0}, "chunks=0: must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1: must be at least 2"),
        ({"batch": (2, 0)}, "batch=0: must be at least 1"),
        ({"prompt": 8}, "prompt=8: must be longer than the 9 tokens that method='pyramidkv' always keeps"),
        ({"recall_context": (5,)}, "recall_context=5: must be longer"),
        ({"context": 4}, "context=4: must be longer"),
        ({"configs": (CompressionConfig(method="full"),)}, "method='full': give one that compresses"),
        ({"configs": (CompressionConfig(budget=60, window=8),)}, "budget=60: must be below context=60"),
        ({"configs": (CompressionConfig(keep=0.5, window=70, recent=8),)}, "window=70: must be at most context=60"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError) as caught:
        bench.run(settings("unused", **changes), tmp_path / "never")
    assert message in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_a_corpus_asked_for_by_name_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))

    def gone(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", gone)
    monkeypatch.setattr(texts, "hub_problem", lambda: None)
    with pytest.raises(schema.DataError, match="--text pg19="):
        bench.run(settings("unused", corpora=("pg19",)), tmp_path / "never")


def test_ablations_are_every_other_method_and_slope_at_equal_bytes():
    names = [(c.method, c.keep, c.share, c.beta, c.recent) for c in _others(CONFIG, ablations=True)]
    assert names == [
        ("snapkv", 0.5, None, 20.0, 8),
        ("rms", 0.5, None, 20.0, 8),
        ("echo", 0.5, None, 20.0, 8),
        ("auto", None, 0.5, 20.0, 8),
        ("h2o", 0.5, None, 20.0, 8),
        ("streamingllm", 0.5, None, 20.0, 8),
        ("knorm", 0.5, None, 20.0, 8),
        ("random", 0.5, None, 20.0, 8),
        ("pyramidkv", 0.5, None, 1.0, 8),
        ("pyramidkv", 0.5, None, 2.0, 8),
    ]


def test_without_ablations_the_preset_stands_beside_the_method_at_equal_bytes():
    assert [(c.method, c.share) for c in _others(CONFIG, ablations=False)] == [("auto", 0.5)]
    assert _others(CompressionConfig(method="auto", share=0.5), ablations=False) == []
    assert _others(CompressionConfig(budget=64), ablations=False) == []


def test_a_run_that_measures_nothing_leaves_no_file_in_the_way(folder, tmp_path):
    with pytest.raises(ConfigError, match="memory=1: the full cache needs"):
        bench.run(settings(folder, metrics=("serving",), memory=1), tmp_path)
    assert not (tmp_path / schema.RESULTS).exists()
    with pytest.raises(ConfigError, match="memory=1: the full cache needs"):
        bench.run(settings(folder, metrics=("speed", "serving"), memory=1), tmp_path)
    assert kinds(tmp_path / schema.RESULTS) == ["run", "speed", "speed"]  # what was measured stays


def test_a_companion_that_these_lengths_are_too_short_for_is_left_out_with_a_line(capsys):
    others = _others(CompressionConfig(keep=0.5), ablations=True)  # `auto` always keeps 32 tokens and a page of 64
    assert list(_that_fit(settings("unused", metrics=("perplexity",), context=97), others, shown=True)) == others
    assert capsys.readouterr().err == ""
    fit = list(_that_fit(settings("unused", metrics=("perplexity",), context=96), others, shown=True))
    assert [c for c in others if c not in fit] == [c for c in others if c.method == "auto"]
    line = capsys.readouterr().err
    speed = settings("unused", metrics=("speed",), prompt=50)  # measures the first method alone
    assert list(_that_fit(speed, others, shown=True)) == others
    assert line.startswith("not measured beside it: auto (context=96: must be longer than the 96 tokens")


@torch.no_grad()
def test_recall_counts_what_greedy_decoding_answers():
    trained, tokenizer = models.load()
    examples = tasks.make_examples("kv", n=2, tokens=400, count_tokens=lambda t: len(tokenizer(t)["input_ids"]), seed=7)
    *_, rows = recall.measure(trained, tokenizer, "m", examples, [CompressionConfig(keep=0.3)], context=400)
    full = rows[0]
    correct = 0
    for example in examples:
        for probe in example.probes:
            ids = tokenizer(example.context + probe.question, return_tensors="pt")["input_ids"]
            answer = tokenizer(probe.answer)["input_ids"]
            out = trained.generate(ids, max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
            correct += out[0, ids.shape[1] :].tolist() == answer
    assert sum(full.correct) == correct
    assert full.probes == rows[1].probes == tuple(len(e.probes) for e in examples)
    assert rows[1].compression.keep == pytest.approx(0.3, abs=0.01)


@torch.no_grad()
def test_question_aware_recall_of_the_full_cache_is_the_same():
    trained, tokenizer = models.load()
    examples = tasks.make_examples("kv", n=1, tokens=400, count_tokens=lambda t: len(tokenizer(t)["input_ids"]), seed=8)
    config = CompressionConfig(keep=0.3)
    *_, blind = recall.measure(trained, tokenizer, "m", examples, [config], context=400)
    *_, aware = recall.measure(trained, tokenizer, "m", examples, [config], context=400, question_aware=True)
    assert aware[0].correct == blind[0].correct
    assert aware[1].accuracy >= blind[1].accuracy


@torch.no_grad()
def test_every_question_is_asked_of_the_context_alone(monkeypatch):
    trained, tokenizer = models.load()
    examples = tasks.make_examples("kv", n=1, tokens=300, count_tokens=lambda t: len(tokenizer(t)["input_ids"]), seed=9)
    context = len(tokenizer(examples[0].context)["input_ids"])
    seen = []
    ask = recall._is_right

    def note(model, tokenizer, probe, cache, logits):
        seen.append(cache.get_seq_length())
        return ask(model, tokenizer, probe, cache, logits)

    monkeypatch.setattr(recall, "_is_right", note)
    list(recall.measure(trained, tokenizer, "m", examples, [CompressionConfig(keep=0.5)], context=300))
    assert seen == [context] * 2 * len(examples[0].probes)
    assert len(examples[0].probes) > 1
