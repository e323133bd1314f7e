"""Perplexity is that of the plain model, or of the masked reference, on exactly the target tokens."""

import math

import pytest
import torch
from transformers import DynamicCache

from families import model
from pyramidkv import CompressionConfig, ConfigError, PyramidKVError
from pyramidkv.evaluate import perplexity
from pyramidkv.evaluate.schema import perplexity_change
from pyramidkv.evaluate.texts import Corpus
from reference import NAME as REFERENCE
from reference import Reference

CORPUS = Corpus("n", "here", ("text",))
CONTEXT, TARGET = 40, 12
CONFIG = CompressionConfig(budget=14, window=8, beta=3.0)


def chunks(count):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 101, (count, CONTEXT + TARGET + 1), generator=generator).tolist()


def nll_by_hand(logits, ids):
    """Mean negative log likelihood of the tokens behind the context's first follower, in float64."""
    out = 0.0
    for i in range(TARGET):
        row = logits[i].double()
        out -= (row[ids[CONTEXT + 1 + i]] - row.exp().sum().log()).item()
    return out / TARGET


@torch.no_grad()
def test_full_and_compressed_rows_by_hand():
    plain = model("gpt_neox-2-2-32")
    pieces = chunks(2)
    *_, rows = perplexity.measure(plain, "tiny", CORPUS, pieces, [CONFIG], context=CONTEXT)
    assert plain.config._attn_implementation == "sdpa"
    for number, piece in enumerate(pieces):
        ids = torch.tensor([piece])
        full = nll_by_hand(plain(ids).logits[0, CONTEXT:-1], piece)
        assert rows[0].chunk_nll[number] == pytest.approx(full, abs=1e-4)
        Reference([0, 1, 2], budget=14, window=8, beta=3.0)
        plain.set_attn_implementation(REFERENCE)
        cache = DynamicCache()
        plain(ids[:, :CONTEXT], past_key_values=cache)
        evicted = nll_by_hand(plain(ids[:, CONTEXT:-1], past_key_values=cache).logits[0], piece)
        plain.set_attn_implementation("sdpa")
        assert rows[1].chunk_nll[number] == pytest.approx(evicted, abs=1e-4)
        assert abs(evicted - full) > 1e-3
    assert rows[0].perplexity == pytest.approx(math.exp(sum(rows[0].chunk_nll) / 2))


def test_rows_carry_what_was_kept_and_the_bytes_of_it():
    rows = next(perplexity.measure(model("llama-4-2-32"), "tiny", CORPUS, chunks(1), [CONFIG], context=CONTEXT))
    full, compressed = (row.compression for row in rows)
    token = 3 * 2 * 2 * 32 * 2  # layers, keys and values, KV heads, head size, bytes of a float16
    assert full.kv_bytes == full.full_kv_bytes == compressed.full_kv_bytes == CONTEXT * token
    slots = 3 * (14 + 1)  # an average of 14 tokens, and one slot of room a layer
    assert compressed.kv_bytes == slots * 2 * (2 * 32 * 2 + 4)
    assert compressed.keep == pytest.approx(14 / CONTEXT)


def test_several_methods_share_one_prefill_and_score_as_they_do_alone():
    plain = model("qwen3-4-2-32")
    configs = [
        CONFIG,
        CompressionConfig(method="h2o", budget=14, window=8),
        CompressionConfig(method="knorm", keep=0.5, window=8),
    ]
    *_, together = perplexity.measure(plain, "tiny", CORPUS, chunks(2), configs, context=CONTEXT)
    for config, row in zip(configs, together[1:], strict=True):
        *_, alone = perplexity.measure(plain, "tiny", CORPUS, chunks(2), [config], context=CONTEXT)
        assert alone[1].chunk_nll == pytest.approx(row.chunk_nll, abs=1e-6)
    assert len({row.chunk_nll for row in together}) == 4


def test_gemma_keeps_its_sliding_layers_through_a_shared_prefill():
    plain = model("gemma3-2-2-64")
    config = CompressionConfig(keep=1.0 - 1e-9, window=8)
    *_, rows = perplexity.measure(plain, "tiny", CORPUS, chunks(1), [config], context=CONTEXT)
    assert rows[1].chunk_nll != rows[0].chunk_nll
    assert rows[1].chunk_nll == pytest.approx(rows[0].chunk_nll, abs=0.5)


def test_a_comparison_in_which_nothing_was_compressed_fails():
    config = CompressionConfig(budget=CONTEXT - 1, window=8)
    plain = model("llama-2-2-64")
    with pytest.raises(ConfigError, match="budget=40: must be below context=40"):
        next(
            perplexity.measure(plain, "t", CORPUS, chunks(1), [CompressionConfig(budget=40, window=8)], context=CONTEXT)
        )
    with pytest.raises(PyramidKVError, match="nothing was compressed"):
        next(
            perplexity.measure(plain, "t", CORPUS, chunks(1), [CompressionConfig(keep=1.0, window=8)], context=CONTEXT)
        )
    next(perplexity.measure(plain, "t", CORPUS, chunks(1), [config], context=CONTEXT))
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("context", "target", "message"),
    [(0, 5, "context=0"), (40, 0, "target=0"), (9, 5, "context=9: must be longer than the 9 tokens"), (40, 5, "")],
)
def test_lengths_are_checked(context, target, message):
    def measured(context, target):
        chunk = list(range(context + target + 1))
        next(perplexity.measure(model("llama-4-2-32"), "tiny", CORPUS, [chunk], [CONFIG], context=context))

    if not message:
        measured(context, target)
        return
    with pytest.raises(ConfigError, match=message):
        measured(context, target)


def test_the_interval_is_paired_over_chunks():
    *_, rows = perplexity.measure(model("gpt_neox-2-2-32"), "tiny", CORPUS, chunks(3), [CONFIG], context=CONTEXT)
    delta = [b - a for a, b in zip(rows[0].chunk_nll, rows[1].chunk_nll, strict=True)]
    mean = sum(delta) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in delta) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5%
    change = perplexity_change(rows[1], rows[0])
    assert change.value == pytest.approx(math.exp(mean) - 1)
    assert (change.low, change.high) == pytest.approx((math.exp(mean - half) - 1, math.exp(mean + half) - 1), rel=1e-3)
