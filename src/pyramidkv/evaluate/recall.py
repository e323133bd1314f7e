"""Accuracy on the long-range recall tasks (`tasks.py`), with the cache compressed before the question is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.evaluate.perplexity import FULL, compression, setting, stored
from pyramidkv.evaluate.prefill import prefill
from pyramidkv.evaluate.schema import Compression, Recall
from pyramidkv.evaluate.tasks import Example, Probe


def measure(
    model: Any,
    tokenizer: Any,
    name: str,
    examples: Sequence[Example],
    configs: Sequence[CompressionConfig],
    *,
    context: int,
    question_aware: bool = False,
) -> Iterator[list[Recall]]:
    """After each example, the accuracy so far of the full cache and of every config, in that order.

    A probe counts as answered if every token of its answer is the most likely one (greedy exact match).

    Args:
        examples: of one task.
        context: the context length that they were made for, in tokens, for the record.
        question_aware: compress context and question together, so that the method knows what will be asked.
    """
    every = [stored(config, model) for config in (FULL, *configs)]
    correct: list[list[int]] = [[] for _ in every]
    probes: list[int] = []
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        for example in examples:
            answered, held = _answer(model, tokenizer, example, every, question_aware)
            probes.append(len(example.probes))
            for row, number in zip(correct, answered, strict=True):
                row.append(number)
            yield [
                Recall(name, example.task, context, question_aware, replace(c, setting=setting(config)), tuple(row),
                       tuple(probes))
                for config, c, row in zip((FULL, *configs), held, correct, strict=True)
            ]  # fmt: skip
    finally:
        model.set_attn_implementation(before)


def _answer(
    model: Any, tokenizer: Any, example: Example, configs: Sequence[CompressionConfig], question_aware: bool
) -> tuple[list[int], list[Compression]]:
    """Correct probes of each config, and what each kept of the (last) prompt."""
    correct = [0] * len(configs)
    held: list[Compression] = []
    filled: list[PyramidKVCache] = []
    for probe in example.probes:
        if question_aware or not filled:
            prompt = example.context + (probe.question if question_aware else "")
            filled = [PyramidKVCache(model.config, config) for config in configs]
            logits = prefill(model, _ids(tokenizer, prompt, model.device), filled)
            held = [compression(config, cache.report()) for config, cache in zip(configs, filled, strict=True)]
        for index, cache in enumerate(filled):
            asked = cache if question_aware else cache.fork()
            correct[index] += _is_right(model, tokenizer, probe, asked, logits if question_aware else None)
    return correct, held


def _is_right(model: Any, tokenizer: Any, probe: Probe, cache: PyramidKVCache, logits: Tensor | None) -> bool:
    """Whether greedy decoding gives the answer; `logits` (1, V) follow the question if the cache already holds it."""
    answer = _ids(tokenizer, probe.answer, model.device)
    question = answer[:, :0] if logits is not None else _ids(tokenizer, probe.question, model.device)
    # Feeding the right answer is greedy decoding as long as it is right, and one forward instead of one a token.
    fed = torch.cat([question, answer[:, :-1]], dim=1)
    predicted = [] if logits is None else [logits.argmax(-1)]
    if fed.shape[1]:
        with torch.no_grad():
            out = model(fed, past_key_values=cache, use_cache=True).logits[0].argmax(-1)
        predicted.append(out[max(question.shape[1] - 1, 0) :])
    return bool((torch.cat(predicted) == answer[0]).all())


def _ids(tokenizer: Any, text: str, device: torch.device) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], device=device)
