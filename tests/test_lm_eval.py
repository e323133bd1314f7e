"""lm-evaluation-harness on a compressed cache, against the plain model and against a cache filled by hand."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import pyramidkv
from pyramidkv.evaluate.tasks import make_example
from pyramidkv.lm_eval import CompressedLM
from pyramidkv.lm_eval import model as module
from pyramidkv.lm_eval.__main__ import TASKS, with_defaults
from pyramidkv.models.source import load_model

FINITE = {"method": "snapkv", "budget": 48, "window": 8}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`pretrained`"),
]


@pytest.fixture(scope="module")
def plain():
    return load_model("neox-16m", device="cpu")


@pytest.fixture(autouse=True)
def one_copy(monkeypatch, request):
    """The same weights for every test; `plain` is only loaded if a test gets as far as loading a model."""
    monkeypatch.setattr(module, "load_model", lambda *_, **__: request.getfixturevalue("plain"))


@pytest.fixture(scope="module")
def example():
    count = load_model("neox-16m", device="cpu").tokenizer
    return make_example("kv", tokens=220, count_tokens=lambda text: len(count(text)["input_ids"]), seed=3, pairs=4)


def scoring(pairs):
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def pairs_of(example):
    return [(example.context + p.question, q.answer) for p in example.probes[:2] for q in example.probes[:2]] + [
        (example.context + example.probes[0].question, " 1"),  # a single token is scored on the cache too
        ("The code", " of the"),
        ("", "The code of"),
    ]


def ids(plain, text):
    return plain.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(plain, context, continuation, cache=None):
    """Log probability in float64, and whether it is greedy, from one forward, or on top of a cache of the context."""
    before, scored = ids(plain, context) or [plain.tokenizer.eos_token_id], ids(plain, continuation)
    fed, past = before + scored[:-1], {"use_cache": False}
    if cache is not None:
        plain.model.set_attn_implementation("pyramidkv")
        plain.model(torch.tensor([before[:-1]]), past_key_values=cache)
        fed, past = fed[len(before) - 1 :], {"past_key_values": cache}
    with torch.no_grad():
        logits = plain.model(torch.tensor([fed]), **past).logits[0, -len(scored) :].double()
    plain.model.set_attn_implementation("sdpa")
    scores = logits.log_softmax(-1)[range(len(scored)), scored]
    return float(scores.sum()), logits.argmax(-1).tolist() == scored


def test_registered():
    assert get_model("pyramidkv") is CompressedLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shaer": 0.25}, "shaer=0.25: unknown; did you mean 'share'"),
        ({"share": 2.0}, "share=2.0"),
        ({}, "exactly one of"),
        ({"method": "best", "share": 0.5}, "method='best'"),
        ({"share": 0.5, "batch_size": "auto"}, "batch_size='auto'"),
        ({"share": 0.5, "unseen_lines": -1}, "unseen_lines=-1"),
        ({"share": 0.5, "unseen_lines": 1, "batch_size": 2}, "unseen_lines=1: needs batch_size=1"),
    ],
)
def test_arguments_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(pyramidkv.ConfigError) as error:
        CompressedLM("neox-16m", **arguments)
    assert message in str(error.value)


def test_unlimited_is_the_plain_model(plain, example):
    lm = CompressedLM("neox-16m", method="snapkv", keep=1.0)
    with pytest.warns(pyramidkv.CompressionWarning, match="none of 7 requests"):
        scores = lm.loglikelihood(scoring(pairs_of(example)), disable_tqdm=True)
    for got, pair in zip(scores, pairs_of(example), strict=True):
        want = expected(plain, *pair)
        assert got[0] == pytest.approx(want[0], abs=1e-3)
        assert got[1] == want[1]


def test_loglikelihood_is_on_the_compressed_cache(plain, example):
    lm = CompressedLM("neox-16m", **FINITE)
    scores = lm.loglikelihood(scoring(pairs_of(example)), disable_tqdm=True)
    assert (lm.requests, lm.requests_compressed) == (7, 5)  # the two short ones fit the budget
    for got, pair in zip(scores[:5], pairs_of(example), strict=False):
        want = expected(plain, *pair, pyramidkv.PyramidKVCache(plain.model.config, **FINITE))
        assert got[0] == pytest.approx(want[0], abs=1e-3)
        assert got[1] == want[1]
        assert abs(got[0] - expected(plain, *pair)[0]) > 1e-2
    assert plain.model.config._attn_implementation == "sdpa"


def test_what_does_not_fit_is_cut_on_the_left(plain, example):
    context, answer = pairs_of(example)[0]
    room = 100 + 1 - len(ids(plain, answer))
    cut = plain.tokenizer.decode(ids(plain, context)[-room:])
    lm = CompressedLM("neox-16m", method="full", max_length=100)
    got = lm.loglikelihood(scoring([(context, answer)]), disable_tqdm=True)[0]
    assert got[0] == pytest.approx(expected(plain, cut, answer)[0], abs=1e-3)


def test_unseen_lines_are_fed_after_the_compression(plain, example):
    question, answer = example.probes[0].question, example.probes[1].answer  # wrong, so that its score is not just 0
    lm = CompressedLM("neox-16m", unseen_lines=1, **FINITE)
    got = lm.loglikelihood(scoring([(example.context + question, answer)]), disable_tqdm=True)[0]
    cache = pyramidkv.PyramidKVCache(plain.model.config, **FINITE)
    plain.model.set_attn_implementation("pyramidkv")
    with torch.no_grad():
        plain.model(torch.tensor([ids(plain, example.context)]), past_key_values=cache)
        scored = ids(plain, answer)
        logits = plain.model(torch.tensor([ids(plain, question) + scored[:-1]]), past_key_values=cache).logits[0]
    plain.model.set_attn_implementation("sdpa")
    want = logits.double().log_softmax(-1)[-len(scored) :][range(len(scored)), scored].sum()
    assert got[0] == pytest.approx(float(want), abs=1e-3)


@pytest.mark.parametrize("unseen_lines", [0, 1])
def test_generation_is_that_of_a_session(plain, example, unseen_lines):
    prompt = example.context + example.probes[0].question
    lm = CompressedLM("neox-16m", unseen_lines=unseen_lines, **FINITE)
    request = Instance("generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 8}), 0)
    got = lm.generate_until([request], disable_tqdm=True)[0]
    inputs = plain.tokenizer(prompt, return_tensors="pt")
    with pyramidkv.compress(plain.model, **FINITE) as session, torch.no_grad():
        past = {}
        if unseen_lines:
            plain.model(torch.tensor([ids(plain, example.context)]), use_cache=True)
            past = {"past_key_values": session.cache}
        out = plain.model.generate(**inputs, **past, max_new_tokens=8, do_sample=False)
    want = plain.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert got == want.split("\n")[0]
    assert (lm.requests, lm.requests_compressed) == (1, 1)


def test_a_padded_batch_generates_as_its_rows_do(example):
    prompts = [example.context + p.question for p in example.probes[:2]] + ["The code of"]
    requests = [Instance("generate_until", {}, (p, {"until": ["."], "max_gen_toks": 6}), 0) for p in prompts]
    together, alone = CompressedLM("neox-16m", batch_size=3, **FINITE), CompressedLM("neox-16m", **FINITE)
    assert together.generate_until(requests, disable_tqdm=True) == alone.generate_until(requests, disable_tqdm=True)
    assert together.requests_compressed == alone.requests_compressed == 2


def test_rolling_is_refused(example):
    with pytest.raises(pyramidkv.UnsupportedError, match="method=full"):
        CompressedLM("neox-16m", **FINITE).loglikelihood_rolling([])


def test_our_tasks_run():
    arguments = {"pretrained": "neox-16m", "method": "auto", "share": 0.5}
    size = {"tokens": 300, "examples": 2}
    results = simple_evaluate(
        "pyramidkv",
        model_args=arguments,
        tasks=["pyramidkv_ruler", "pyramidkv_longbench"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=arguments | size),
        bootstrap_iters=0,
    )
    found = {name: row for name, row in results["results"].items() if "alias" in row}
    assert {n.removeprefix("pyramidkv_") for n in found} >= {
        "ruler_needle",
        "ruler_multikey",
        "ruler_tracking",
        "longbench_choice",
    }
    assert results["config"]["requests"] == results["config"]["requests_compressed"] == 3 * 2 + 2 * 4


def test_command_line_defaults():
    assert with_defaults(["x", "-h"]) == ["x", "-h"]
    assert with_defaults(["x", "ls", "tasks"])[3:] == ["--include_path", str(TASKS)]
    assert with_defaults(["x", "--tasks", "a", "--device=cpu"])[4:] == ["--include_path", str(TASKS)]
    assert with_defaults(["x", "run", "--include_path", "p"])[4:] == ["--device", "auto"]
