"""Recall and texts under several settings, question by question beside the full cache, in processes side by side.

    python benchmarks/paired_quality.py --model SmolLM2-135M-Instruct.Q4_1.gguf --setting share=0.125 \\
        --setting "share=0.125 layers=$(pyramidkv calibrate -m SmolLM2-135M-Instruct.Q4_1.gguf --share 0.125)" \\
        --kv 120 --needle 64 --first 1000 --out smollm2-135m-paired.json

Few questions tell two settings apart where each is asked of both: beside the answers that are right, the nats that the
tokens of the true answer lose against the full cache. A `--setting` is the options of a `CompressionConfig` as
`name=value`, with spaces between; `auto` where no method is named. Questions are not known when the context is
compressed. `--kv` and `--needle`: examples, of 4 questions and of one, from the seed
`--first` on. `--text NAME=FILE_OR_FOLDER`: `--chunks` chunks of it, those between the ones that `pyramidkv bench` takes
as a quarter of them; the tokens behind the context are scored. `--processes` share one device; nothing is begun after
`--seconds`, so that all settings have the same questions.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig
from pyramidkv.evaluate import tasks, texts
from pyramidkv.evaluate.perplexity import FULL, stored
from pyramidkv.evaluate.prefill import prefill
from pyramidkv.evaluate.schema import mean_interval
from pyramidkv.models.source import load_model
from result import Result, add_out

TARGET = 512  # scored tokens of a text

Job = tuple[str, int]  # a task and a seed, or a text as it was given and the index of its chunk
Asked = tuple[list[int], list[int]]  # what is fed behind the context, and what should follow its end
Answers = list[list[tuple[float, bool]]]  # of each setting and question: nats a token, and whether greedily right


@dataclass
class Worker:
    """What a process holds."""

    model: Any
    tokenizer: Any
    configs: list[CompressionConfig]
    arguments: argparse.Namespace
    until: float
    cut: dict[str, list[list[int]]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def material(self, job: Job) -> tuple[list[int], list[Asked]]:
        """The tokens of a context, and the questions about it."""
        what, number = job
        context = self.arguments.context
        if what not in tasks.TASKS:
            if what not in self.cut:  # a corpus is cut once
                corpus, tokens = texts.parse_text(what), context + TARGET + 1
                self.cut[what] = texts.chunks(corpus, self.tokenizer, tokens=tokens, count=4 * self.arguments.chunks)
            chunk = self.cut[what][4 * number + 2]
            return chunk[:context], [(chunk[context:-1], chunk[context + 1 :])]
        example = tasks.make_example(what, tokens=context, count_tokens=lambda t: len(self.ids(t)), seed=number)
        asked = []
        for probe in example.probes:
            answer = self.ids(probe.answer)
            asked.append((self.ids(probe.question) + answer[:-1], answer))
        return self.ids(example.context), asked

    @torch.no_grad()
    def answers(self, job: Job) -> tuple[Answers, list[float]] | None:
        """Of the full cache and each setting; and the share of the bytes that each holds. None if time is up."""
        if time.time() > self.until:
            return None
        context, asked = self.material(job)
        caches = [PyramidKVCache(self.model.config, config) for config in self.configs]
        prefill(self.model, torch.tensor([context], device=self.model.device), caches)
        shares = [usage.kv_bytes / usage.full_kv_bytes for usage in (cache.report() for cache in caches)]
        return [[self.answer(cache.fork(), *each) for each in asked] for cache in caches], shares

    def answer(self, cache: PyramidKVCache, fed: list[int], answer: list[int]) -> tuple[float, bool]:
        ids, truth = (torch.tensor([x], device=self.model.device) for x in (fed, answer))
        out: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=len(answer)).logits[0]
        nats = torch.nn.functional.cross_entropy(out.float(), truth[0])
        return float(nats), bool((out.argmax(-1) == truth[0]).all())


WORKER: list[Worker] = []


def start(arguments: argparse.Namespace, until: float) -> None:
    """Load the model, once a process."""
    torch.set_num_threads(1)
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    configs = [FULL, *map(setting, arguments.setting)]
    configs = [stored(config, loaded.model) for config in configs]
    WORKER.append(Worker(loaded.model, loaded.tokenizer, configs, arguments, until))


def run(job: Job) -> tuple[Job, tuple[Answers, list[float]] | None]:
    return job, WORKER[0].answers(job)


def setting(text: str) -> CompressionConfig:
    """What a `--setting` says."""
    options = dict(part.split("=", 1) for part in text.split())
    return CompressionConfig.make(**{"method": "auto", **{name: number(value) for name, value in options.items()}})


def number(text: str) -> Any:
    """The number that a text is, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def summary(rows: list[Answers], name: str, config: CompressionConfig, index: int, text: bool) -> dict[str, Any]:
    """One line of one setting on one task; of what has `_95` the mean and the half width of its 95% interval."""
    pairs = [pair for answers in rows for pair in zip(answers[0], answers[index], strict=True)]
    lost = [ours[0] - full[0] for full, ours in pairs]
    line: dict[str, Any] = {"task": name, "setting": config.describe() or "full cache", "questions": len(pairs)}
    if not text:
        line["right"] = sum(ours[1] for _, ours in pairs)
        line["right_full"] = sum(full[1] for full, _ in pairs)
        line["right_both"] = sum(full[1] and ours[1] for full, ours in pairs)
        line["more_right_95"] = mean_interval([float(ours[1]) - float(full[1]) for full, ours in pairs])
    return line | {"nats_lost_95": mean_interval(lost), "nats_lost_by_a_tenth": sorted(lost)[-(len(lost) // 10) - 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="neox-16m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--setting", action="append", required=True, help="such as 'share=0.125'; repeatable")
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--kv", type=int, default=0)
    parser.add_argument("--needle", type=int, default=0)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600)
    add_out(parser)
    arguments = parser.parse_args()
    until = time.time() + arguments.seconds
    configs = [setting(text) for text in arguments.setting]  # what is wrong with them is said before a process starts
    examples = {"kv": arguments.kv, "needle": arguments.needle}
    jobs: list[Job] = [(task, arguments.first + number) for task, n in examples.items() for number in range(n)]
    jobs += [(text, number) for text in arguments.text for number in range(arguments.chunks)]
    if not jobs:
        parser.error("give --kv, --needle or --text")
    result = Result(arguments.out, arguments.device, model=Path(arguments.model).name)
    found: dict[str, list[Answers]] = {}
    with ProcessPoolExecutor(
        arguments.processes, multiprocessing.get_context("spawn"), initializer=start, initargs=(arguments, until)
    ) as pool:
        for (what, number), measured in pool.map(run, jobs):
            if measured is not None:
                answers, shares = measured
                found.setdefault(what, []).append(answers)
                nats, right = ([[pair[of] for pair in row] for row in answers] for of in (0, 1))
                about = {"task": what.partition("=")[0], "number": number, "shares": shares}
                result.add("questions", about | {"nats": nats, "right": right})
    for what, rows in found.items():
        text = what not in tasks.TASKS
        name = what.partition("=")[0]
        for index, config in enumerate([FULL, *configs]):
            result.add("summary", summary(rows, name, config, index, text))
    result.finish("summary")


if __name__ == "__main__":
    main()
