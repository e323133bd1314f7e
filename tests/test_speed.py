"""Speed rows: what was run, what it held, and clocks that can't be fooled by work that is still queued."""

import pytest
import torch

from families import model
from pyramidkv import CompressionConfig, PyramidKVError
from pyramidkv.evaluate import perplexity, speed

CONFIG = CompressionConfig(keep=0.25, window=8)


def test_engines_alternate_and_rows_hold_every_repeat():
    plain = model("llama-4-2-32")
    contenders = speed.engines([CONFIG], plain.device)
    arguments = {"batch": 2, "prompt": 60, "new_tokens": 5, "repeats": 3, "weights_random": True, "bandwidth": 1e9}
    steps = list(speed.measure(plain, "tiny", contenders, **arguments))
    assert len(steps) == 3
    full, compressed = steps[-1]
    assert full.engine == "transformers DynamicCache, sdpa"
    assert compressed.engine == "pyramidkv, keep=0.25 window=8"
    for row in steps[-1]:
        assert len(row.ttft_seconds.samples) == len(row.tpot_seconds.samples) == 3
        assert 0 < row.tpot_seconds.low <= row.tpot_seconds.median <= row.tpot_seconds.high
        assert row.throughput_tokens_per_second == pytest.approx(2 / row.tpot_seconds.median)
        assert row.weights_bytes == sum(p.numel() * 4 for p in plain.parameters())
        assert row.read_bytes_per_second == 1e9
        assert row.tpot_floor_seconds == pytest.approx((row.weights_bytes + row.compression.kv_bytes) / 1e9)
        assert row.max_memory_bytes is None or row.max_memory_bytes > row.weights_bytes
    token = 3 * 2 * 2 * 32 * 4
    assert full.compression.kv_bytes == 2 * 65 * token
    # Kept tokens, and exactly as many free slots as tokens were asked for.
    assert compressed.compression.kv_bytes == 2 * 3 * (15 + 5) * 2 * (2 * 32 * 4 + 4)
    assert plain.config._attn_implementation == "sdpa"


def test_ways_of_decoding_are_engines_not_settings():
    plain = model("llama-4-2-32")
    *_, graph, compiled = speed.engines([CONFIG], torch.device("cuda"))
    assert [e.config.decode for e in (graph, compiled)] == ["graph", "compiled"]
    assert graph.name == "pyramidkv, keep=0.25 window=8 decode=graph"
    assert perplexity.setting(graph.config) == perplexity.setting(compiled.config) == "keep=0.25 window=8"
    eager = speed.Engine("pyramidkv, eager", CompressionConfig(keep=0.25, window=8, decode="eager"))
    arguments = {"batch": 1, "prompt": 60, "new_tokens": 3, "repeats": 1, "weights_random": True, "bandwidth": None}
    (row,) = next(speed.measure(plain, "tiny", [eager], **arguments))
    assert row.compression.setting == "keep=0.25 window=8"


def test_a_speed_row_in_which_nothing_was_compressed_fails():
    plain = model("llama-4-2-32")
    lazy = speed.Engine("lazy", CompressionConfig(keep=1.0, window=8))
    arguments = {"batch": 1, "prompt": 30, "new_tokens": 3, "repeats": 1, "weights_random": True, "bandwidth": None}
    with pytest.raises(PyramidKVError, match="nothing was compressed"):
        next(speed.measure(plain, "tiny", [lazy], **arguments))


def test_the_peak_is_of_this_region_alone():
    device = torch.device("cpu")
    speed.reset_peak(device)
    before = speed.peak_bytes(device)
    if before is None:
        pytest.skip("no resident-set peak on this platform")
    big = torch.ones(200 << 20, dtype=torch.uint8)
    with_big = speed.peak_bytes(device)
    del big
    speed.reset_peak(device)
    after = speed.peak_bytes(device)
    assert with_big - before > 150 << 20
    assert with_big - after > 150 << 20


def test_bandwidth_is_that_of_reading_random_numbers(monkeypatch):
    read = []
    add_up = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda numbers: (read.append(numbers), add_up(numbers))[1])
    rate = speed.read_bandwidth(torch.device("cpu"))
    assert 1e8 < rate < 1e13
    assert all(numbers.nbytes >= 64 << 20 and numbers[:1000].unique().numel() > 900 for numbers in read)
