"""The recall examples: deterministic, within their length, and answerable from the context alone."""

import random
import re
from itertools import islice, pairwise

import pytest

from pyramidkv.errors import ConfigError
from pyramidkv.evaluate.tasks import (
    TASKS,
    TRAINING_SEEDS_FROM,
    Example,
    make_example,
    make_examples,
    synthetic_sentences,
)

# A stand-in for a byte-level tokenizer: words with the space before them, single digits, single marks.
_PIECES = re.compile(r" ?[A-Za-z']+|\d| (?=\d)|[^\sA-Za-z\d]|\s")


def count(text: str) -> int:
    return len(_PIECES.findall(text))


def example(task: str, **arguments: object) -> Example:
    return make_example(task, **({"tokens": 512, "count_tokens": count, "seed": 7} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_length_is_nearly_what_was_asked_for(task: str, tokens: int) -> None:
    made = example(task, tokens=tokens)
    longest = max(count(probe.question + probe.answer) for probe in made.probes)
    assert tokens - 16 <= count(made.context) + longest <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_example_other_seed_another(task: str) -> None:
    assert example(task) == example(task)
    assert example(task).context != example(task, seed=8).context


@pytest.mark.parametrize("task", ["kv", "needle"])
def test_every_question_has_its_one_answer_in_the_context(task: str) -> None:
    for made in make_examples(task, n=20, tokens=700, count_tokens=count, seed=0):
        for probe in made.probes:
            assert made.context.count(probe.question + probe.answer + ".") == 1
            assert made.context.count(probe.question) == 1
            assert re.fullmatch(r" [1-9]\d{4}", probe.answer)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_chains_lead_to_the_answer_and_no_name_comes_before_its_number(hops: int) -> None:
    for made in make_examples("tracking", n=20, tokens=700, count_tokens=count, seed=0, hops=hops):
        held: dict[str, str] = {}
        for name, value, other in re.findall(r"(\w+) keeps the number (?:(\d+)|of (\w+))\.", made.context):
            held[name] = value or held[other]
        assert len(held) == 4 * (hops + 1)
        for probe in made.probes:
            name = probe.question.removeprefix("In figures, the number of ").removesuffix(" is")
            assert probe.answer == " " + held[name]


@pytest.mark.parametrize("task", TASKS)
def test_depth_points_at_the_fact_that_holds_the_digits(task: str) -> None:
    for made in make_examples(task, n=10, tokens=900, count_tokens=count, seed=3):
        for probe in made.probes:
            start = round(probe.depth * len(made.context))
            assert probe.answer in made.context[start : start + 60]


def test_depths_spread_over_the_whole_context() -> None:
    depths = [made.probes[0].depth for made in make_examples("needle", n=200, tokens=600, count_tokens=count, seed=0)]
    assert min(depths) < 0.05
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_texts_meet_where_no_tokenizer_merges(task: str) -> None:
    made = example(task)
    assert made.context.endswith(".\n")
    for probe in made.probes:
        assert probe.question[0].isupper()
        assert probe.question[-1].isalpha()


def test_filler_handed_in_is_used_in_its_order() -> None:
    filler = [f"Line {'x' * i} ends here." for i in range(1, 40)]
    made = example("needle", tokens=120, filler=filler)
    found = [len(run) for run in re.findall(r"Line (x+) ends", made.context)]
    assert len(found) > 10
    assert all(after == before % 39 + 1 for before, after in pairwise(found))


def test_synthetic_filler_is_varied_and_holds_no_digits() -> None:
    sentences = list(islice(synthetic_sentences(random.Random(0)), 2000))
    assert len(set(sentences)) > 1500
    assert not any(re.search(r"\d|\{|  ", sentence) for sentence in sentences)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)


def test_counts_of_a_tokenizer_that_is_not_additive_still_fit() -> None:
    def plus_one_per_ten_words(text: str) -> int:
        return count(text) + len(text.split()) // 10

    made = example("kv", count_tokens=plus_one_per_ten_words)
    longest = max(count(probe.question) + count(probe.answer) for probe in made.probes)
    assert plus_one_per_ten_words(made.context) + longest <= 512


def test_numbers_of_facts_and_questions() -> None:
    made = example("kv", pairs=12, probes=5)
    assert len(re.findall(r"The code of the \w+ \w+ is \d{5}\.", made.context)) == 12
    assert len({probe.question for probe in made.probes}) == 5
    assert len(example("needle").probes) == 1
    assert len(example("tracking", pairs=3).probes) == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"task": "maze"}, "task='maze'.*kv, needle, tracking"),
        ({"seed": -1}, "seed=-1"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 40, "pairs": 8}, "tokens=40.*at least"),
        ({"pairs": 0}, "pairs=0.*between 1 and"),
        ({"pairs": 1000}, "pairs=1000.*between 1 and"),
        ({"probes": 9, "pairs": 8}, "probes=9.*pairs=8"),
        ({"hops": 0}, "hops=0"),
        ({"task": "tracking", "hops": 500}, "hops=500"),
        ({"filler": []}, "filler="),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    task = str(arguments.pop("task", "kv"))
    with pytest.raises(ConfigError, match=named):
        example(task, **arguments)


def test_bad_number_of_examples_is_named() -> None:
    with pytest.raises(ConfigError, match="n=0"):
        make_examples("kv", n=0, tokens=256, count_tokens=count, seed=0)


def test_training_seeds_start_where_documented() -> None:
    assert TRAINING_SEEDS_FROM == 2**31
