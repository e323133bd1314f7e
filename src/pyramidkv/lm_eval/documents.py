"""The documents of our tasks in `tasks/`: made from seeds when a task is loaded, so that there is nothing to download.

The harness calls these with the metadata of a task's file, over it `--metadata`, and the model's arguments.
"""

from __future__ import annotations

import re
from typing import Any

from pyramidkv.errors import ConfigError
from pyramidkv.evaluate.tasks import Example, make_examples
from pyramidkv.evaluate.texts import python_reference
from pyramidkv.models.source import load_tokenizer


def needle(**metadata: Any) -> dict[str, Any]:
    """RULER's single needle: one fact in a long text. Columns: input, answer."""
    return _asked(_examples("needle", metadata))


def multikey(**metadata: Any) -> dict[str, Any]:
    """RULER's multi-key needles: one fact is asked for, among others that look like it. Columns: input, answer."""
    return _asked(_examples("kv", metadata, probes=1))


def tracking(**metadata: Any) -> dict[str, Any]:
    """RULER's variable tracking: the number at the start of a chain of names. Columns: input, answer."""
    return _asked(_examples("tracking", metadata, probes=1))


def choice(**metadata: Any) -> dict[str, Any]:
    """LongBench v2's form: a question about a long document, four choices, all of which stand in the document.

    The document is a part of Python's reference, with facts among it. Columns: input, choices, gold (an index).
    """
    filler = _sentences(python_reference().documents[0])
    rows = []
    for example in _examples("kv", metadata, probes=4, filler=filler):
        asked, choices = example.probes[0], sorted(probe.answer for probe in example.probes)
        rows.append(
            {"input": example.context + asked.question, "choices": choices, "gold": choices.index(asked.answer)}
        )
    return _split(rows)


def recalled(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's score: 1 if the answer stands in what was generated."""
    return {"recall": float(doc["answer"].strip() in results[0])}


def _examples(task: str, metadata: dict[str, Any], **options: Any) -> list[Example]:
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    tokenizer = load_tokenizer(name) if isinstance(name, str) else None
    if tokenizer is None:
        raise ConfigError(
            f"pretrained={name!r}: our tasks count tokens; name a model that has a tokenizer, with --model_args "
            "pretrained=NAME or --metadata '{\"tokenizer\": NAME}'"
        )
    return make_examples(
        task,
        n=metadata["examples"],
        tokens=metadata["tokens"],
        seed=metadata["seed_from"],
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        **options,
    )


def _asked(examples: list[Example]) -> dict[str, Any]:
    return _split([{"input": e.context + p.question, "answer": p.answer} for e in examples for p in e.probes])


def _sentences(text: str) -> list[str]:
    """Sentences of a text in their order; what is too short or too long to be one (a grammar, a table) is left out."""
    return [s for s in re.split(r"(?<=\.) (?=[A-Z])", " ".join(text.split())) if 20 <= len(s) <= 300]


def _split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
