"""Serving many requests: rows that end by themselves, batches that fit a memory, records that a report shows."""

import json

import pytest
import torch

import pyramidkv
from families import model
from pyramidkv import CompressionConfig, ConfigError
from pyramidkv.evaluate import schema, serving
from pyramidkv.evaluate.bench import LoadedModel, Settings, run
from pyramidkv.evaluate.speed import Engine
from pyramidkv.plan import Plan
from pyramidkv.report import Results, headline, serving_tables, write
from pyramidkv.shape import cache_shape

CONFIG = CompressionConfig(keep=0.4, window=4)
FULL = Engine("full")
OURS = Engine("ours", CONFIG)


def requests(count=5, prompt=60, new=12):
    return serving.make_requests(count, prompt=prompt, new_tokens=new, vocabulary=101)


def test_requests_are_of_different_lengths_and_the_same_every_time():
    made = requests(50)
    assert made == requests(50)
    assert (len(made[0].prompt), made[0].new_tokens) == (60, 12)
    assert {len(r.prompt) for r in made} <= set(range(15, 61))
    assert {r.new_tokens for r in made} == set(range(3, 13))
    assert serving.make_requests(2, prompt=1, new_tokens=1, vocabulary=9)[1].new_tokens == 1


@pytest.mark.parametrize("config", [None, CONFIG, CompressionConfig(method="auto", share=0.3, window=8)])
def test_the_batch_is_the_largest_that_fits(config):
    made, plain = requests(20), model("llama-4-2-32")

    def need(rows):
        shape = cache_shape(plain.config)
        if config is None:
            return Plan(serving.FULL, shape).full_bytes(60 + 12, batch=rows, itemsize=4)
        options = {name: getattr(config, name) for name in ("method", "keep", "share", "window", "recent")}
        return Plan(CompressionConfig(**options, room=12), shape).kv_bytes(60, batch=rows, itemsize=4)

    for rows in (1, 3, 7):
        for memory in (need(rows), need(rows + 1) - 1):
            assert serving.largest_batch(plain, config, made, memory) == rows
    assert serving.largest_batch(plain, config, made, need(1000)) == 20
    with pytest.raises(
        ConfigError, match=f"memory={need(1) - 1}: .* needs {need(1)} bytes for one request of 60 and 12"
    ):
        serving.largest_batch(plain, config, made, need(1) - 1)


@pytest.mark.parametrize("engine", [FULL, OURS], ids=["full", "compressed"])
def test_a_row_ends_by_itself_and_is_what_it_is_alone(engine):
    """Each row's budget is its own, whatever the batch's longest prompt; after its end come only pads."""
    plain, made = model("gpt_neox-2-2-32"), requests(5)

    def tokens(rows):
        if engine.config is None:
            out, _ = serving._generate(plain, engine, rows, None)
        else:
            with pyramidkv.compress(plain, engine.config):
                out, _ = serving._generate(plain, engine, rows, None)
        width = max(len(row.prompt) for row in rows)
        return [line[width:].tolist() for line in out]

    together = tokens(made)
    assert max(map(len, together)) == 12
    for row, request in zip(together, made, strict=True):
        (alone,) = tokens([request])
        assert len(alone) == request.new_tokens
        assert row == alone + [0] * (12 - request.new_tokens)


def test_more_rows_fit_the_same_memory_and_hold_no_more():
    plain, made = model("llama-4-2-32"), requests(12)
    memory = serving.default_memory(plain, made)
    options = {"memory": memory, "repeats": 2, "weights_random": True}
    *_, (full, ours) = serving.measure(plain, "m", [FULL, OURS], made, **options)
    assert full.batch == 3
    assert ours.batch > full.batch
    assert full.compression.kv_bytes <= memory
    assert 0 < ours.compression.kv_bytes <= memory
    assert ours.compression.kv_bytes < ours.compression.full_kv_bytes
    assert full.generated_tokens == ours.generated_tokens == sum(r.new_tokens for r in made)
    assert len(full.total_seconds.samples) == len(ours.mean_ttft_seconds.samples) == 2
    assert full.mean_ttft_seconds.median < full.total_seconds.median


def test_a_batch_that_does_not_fit_after_all_is_made_smaller(monkeypatch):
    plain, made = model("llama-4-2-32"), requests(8)
    serve, tried = serving._serve, []

    def too_small(_, engine, rows, batch):
        tried.append(batch)
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return serve(_, engine, rows, batch)

    monkeypatch.setattr(serving, "_serve", too_small)
    *_, (record,) = serving.measure(plain, "m", [FULL], made, memory=10**9, repeats=1, weights_random=True)
    assert tried == [8, 6, 4, 4]
    assert record.batch == 4


def test_bench_writes_it_and_the_report_shows_it(tmp_path, monkeypatch):
    loaded = LoadedModel(model("gpt_neox-2-2-32"), None, "random:tiny", True, 1)
    monkeypatch.setattr("pyramidkv.evaluate.bench.load_model", lambda *_, **__: loaded)
    options = {"metrics": ("serving",), "prompt": 60, "new_tokens": 6, "requests": 6, "repeats": 1}
    settings = Settings(configs=(CONFIG,), **options)
    path = run(settings, tmp_path)
    records = schema.read(path)
    assert [record.kind for record in records] == ["run", "serving", "serving"]
    assert schema.read(run(settings, tmp_path, resume=True)) == records
    results = Results.from_files(path)
    (table,) = serving_tables(results)
    assert [row[0].value for row in table.rows] == ["Full cache", "PyramidKV"]
    assert headline(results).startswith("With ")
    assert "serves 6 requests at" in headline(results)
    written = write(path, tmp_path / "report")
    assert "Serving 6 requests" in (tmp_path / "report" / "report.md").read_text()
    assert written
    assert json.loads(path.read_text().splitlines()[1])["memory_bytes"] > 0


def test_bad_settings_name_the_argument():
    with pytest.raises(ConfigError, match="requests=1: must be at least 2"):
        Settings(configs=(CONFIG,), requests=1).check()
    with pytest.raises(ConfigError, match="prompt=4: must be longer than"):
        Settings(configs=(CONFIG,), metrics=("serving",), prompt=4).check()
