"""Long-range recall tasks, made from a seed: a long context, and questions that only that context can answer.

Three tasks, each with five-digit answers, so that guessing scores nothing:

- ``kv``: "The code of the amber falcon is 48213." Many such facts at random depths, several of them asked for.
- ``needle``: one fact ("The password of Tamar is 48213.") in a long text.
- ``tracking``: chains ("Nadia keeps the number 48213." ... "Omar keeps the number of Nadia."), asked for at their end.

The facts lie among filler: sentences made here from templates, or sentences handed in. Pure Python, no tensors: the
training of the shipped model and the measurement of recall both read their examples from here. Seeds from
`TRAINING_SEEDS_FROM` on belong to training and to nothing else, so no example that is measured was ever trained on.

How the text is cut into tokens: a context ends in one newline, a question starts with a capital letter and ends in a
letter, and an answer is a space and five digits. Byte-level tokenizers never merge across those borders, so
tokens(context) + tokens(question) + tokens(answer) is what they make of the whole text.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pyramidkv.errors import ConfigError
from pyramidkv.evaluate import words

TASKS: tuple[str, ...] = ("kv", "needle", "tracking")

TRAINING_SEEDS_FROM: int = 2**31
"""Seeds below this one are for measurement, seeds from this one on for training."""

_DEFAULT_PAIRS = {"kv": 8, "needle": 1, "tracking": 4}


@dataclass(frozen=True)
class Probe:
    """One question about a context: the text to complete, the completion, and where in the context its fact lies.

    `depth` is the start of the fact that holds the answer, as a share of the context's characters (0 start, 1 end).
    """

    question: str
    answer: str
    depth: float = 0.0


@dataclass(frozen=True)
class Example:
    """A context and the questions about it; each is asked on its own: context + question + answer."""

    task: str
    context: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class _Fact:
    sentence: str
    question: str
    answer: str
    source: int  # index, among the facts, of the one that holds the digits


def make_example(
    task: str,
    *,
    tokens: int,
    count_tokens: Callable[[str], int],
    seed: int,
    filler: Sequence[str] | None = None,
    pairs: int | None = None,
    probes: int | None = None,
    hops: int = 2,
) -> Example:
    """One example whose context and longest probe together take at most `tokens` tokens, and nearly that many.

    `count_tokens` counts the tokens of a text without special tokens. `filler`: sentences to lie between the facts, in
    their order from a random start on; None makes them from templates. `pairs`: facts (kv: 8, needle: 1) or chains
    (tracking: 4). `probes`: questions asked (kv: up to 4, else one per fact or chain). `hops`: links from a chain's
    last name to its number; only for tracking. The same arguments give the same example on every machine.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if seed < 0:
        raise ConfigError(f"seed={seed}: must be 0 or more")
    if tokens < 1:
        raise ConfigError(f"tokens={tokens}: must be 1 or more")
    if filler is not None and len(filler) == 0:
        raise ConfigError("filler=[]: must hold at least one sentence, or be None")
    pairs = _DEFAULT_PAIRS[task] if pairs is None else pairs
    chains = len(words.NAMES) // (max(hops, 0) + 1)
    most = {"kv": len(words.THINGS), "needle": len(words.NAMES), "tracking": chains}[task]
    if hops < 1 or (task == "tracking" and chains < 1):
        raise ConfigError(f"hops={hops}: must lie between 1 and {len(words.NAMES) - 1}")
    if not 1 <= pairs <= most:
        raise ConfigError(f"pairs={pairs}: must lie between 1 and {most} for the task {task!r}")
    if probes is None:
        probes = min(pairs, 4) if task == "kv" else pairs
    if not 1 <= probes <= pairs:
        raise ConfigError(f"probes={probes}: must lie between 1 and pairs={pairs}")

    rng = random.Random(f"{task}:{seed}")
    facts = _kv(rng, pairs) if task == "kv" else _needles(rng, pairs) if task == "needle" else _chains(rng, pairs, hops)
    askable = [i for i, fact in enumerate(facts) if fact.question]
    asked = rng.sample(askable, probes)
    budget = tokens - max(count_tokens(facts[i].question) + count_tokens(facts[i].answer) for i in asked)
    room = budget - sum(count_tokens(" " + fact.sentence) for fact in facts) - count_tokens("\n")
    if room < 0:
        raise ConfigError(f"tokens={tokens}: must be at least {tokens - room} to hold {pairs} facts and a question")

    text = _fill(_run(filler, rng) if filler is not None else synthetic_sentences(rng), room, count_tokens)
    context, starts = _lay(facts, text, rng.random())
    # Tokenizers that are not additive over sentences (SentencePiece) may overshoot by a few tokens.
    while text and count_tokens(context) > budget:
        text = text[:-1]
        context, starts = _lay(facts, text, rng.random())
    return Example(
        task,
        context,
        tuple(Probe(facts[i].question, facts[i].answer, starts[facts[i].source] / len(context)) for i in asked),
    )


def make_examples(
    task: str,
    *,
    n: int,
    tokens: int,
    count_tokens: Callable[[str], int],
    seed: int,
    filler: Sequence[str] | None = None,
    pairs: int | None = None,
    probes: int | None = None,
    hops: int = 2,
) -> list[Example]:
    """`n` examples from the seeds `seed`, `seed` + 1, ...; see `make_example`."""
    if n < 1:
        raise ConfigError(f"n={n}: must be 1 or more")
    return [
        make_example(
            task,
            tokens=tokens,
            count_tokens=count_tokens,
            seed=seed + i,
            filler=filler,
            pairs=pairs,
            probes=probes,
            hops=hops,
        )
        for i in range(n)
    ]


def synthetic_sentences(rng: random.Random) -> Iterator[str]:
    """An endless run of plain sentences, without digits and without anything that looks like one of the facts."""
    while True:
        template = rng.choice(words.TEMPLATES)
        sentence = template.format(
            who=rng.choice(words.WHO),
            other=rng.choice(words.OTHER),
            place=rng.choice(words.PLACE),
            way=rng.choice(words.WAY),
            thing=rng.choice(words.OBJECT),
            kind=rng.choice(words.KIND),
            when=rng.choice(words.WHEN),
            did=rng.choice(words.DID),
            how=rng.choice(words.HOW),
            sky=rng.choice(words.SKY),
            heard=rng.choice(words.HEARD),
        )
        yield sentence[0].upper() + sentence[1:]


def _kv(rng: random.Random, pairs: int) -> list[_Fact]:
    values = _numbers(rng, pairs)
    facts = []
    for i, thing in enumerate(rng.sample(words.THINGS, pairs)):
        stem = f"The code of the {rng.choice(words.COLOURS)} {thing} is"
        facts.append(_Fact(f"{stem} {values[i]}.", stem, f" {values[i]}", i))
    return facts


def _needles(rng: random.Random, pairs: int) -> list[_Fact]:
    values = _numbers(rng, pairs)
    facts = []
    for i, name in enumerate(rng.sample(words.NAMES, pairs)):
        stem = f"The {rng.choice(words.SECRETS)} of {name} is"
        facts.append(_Fact(f"{stem} {values[i]}.", stem, f" {values[i]}", i))
    return facts


def _chains(rng: random.Random, chains: int, hops: int) -> list[_Fact]:
    values = _numbers(rng, chains)
    names = rng.sample(words.NAMES, chains * (hops + 1))
    # The chains are interleaved at random, but no name is used before it was given its number.
    order = [chain for chain in range(chains) for _ in range(hops + 1)]
    rng.shuffle(order)
    done = [0] * chains
    source = [0] * chains
    facts: list[_Fact] = []
    for chain in order:
        step = done[chain]
        done[chain] += 1
        name = names[chain * (hops + 1) + step]
        if step == 0:
            source[chain] = len(facts)
            sentence = f"{name} keeps the number {values[chain]}."
        else:
            sentence = f"{name} keeps the number of {names[chain * (hops + 1) + step - 1]}."
        question = f"In figures, the number of {name} is" if step == hops else ""
        facts.append(_Fact(sentence, question, f" {values[chain]}", source[chain]))
    return facts


def _numbers(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(10_000, 100_000), n)


def _run(filler: Sequence[str], rng: random.Random) -> Iterator[str]:
    """`filler` in its order from a random start on, round and round."""
    start = rng.randrange(len(filler))
    while True:
        for i in range(len(filler)):
            yield filler[(start + i) % len(filler)]


def _fill(sentences: Iterator[str], room: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Sentences that take at most `room` tokens together; those that do not fit are skipped, 20 at most."""
    taken: list[str] = []
    misses = 0
    for sentence in islice(sentences, 20 + room):
        cost = count_tokens(" " + sentence)
        if cost <= room:
            taken.append(sentence)
            room -= cost
        else:
            misses += 1
        if misses == 20 or room < 4:
            break
    return taken


def _lay(facts: list[_Fact], text: list[str], salt: float) -> tuple[str, list[int]]:
    """The context, the facts in their order at random depths among the filler, and each fact's first character."""
    slots = set(random.Random(f"depths:{salt}").sample(range(len(facts) + len(text)), len(facts)))
    waiting_facts, waiting_text = iter(facts), iter(text)
    sentences: list[str] = []
    starts: list[int] = []
    at = 0
    for slot in range(len(facts) + len(text)):
        sentence = next(waiting_facts).sentence if slot in slots else next(waiting_text)
        if slot in slots:
            starts.append(at)
        sentences.append(sentence)
        at += len(sentence) + 1
    return " ".join(sentences) + "\n", starts
