"""Perplexity by length of context, and recall with the full cache, of a causal language model, for its card.

    python scripts/small_neox_eval.py --model src/pyramidkv/models/neox-16m --books DIR --windows 96 --tasks
    python scripts/small_neox_eval.py --model src/pyramidkv/models/neox-16m --examples 25 --tasks kv --lengths 2048 4096

`--books`: a folder of held-out *.txt files. Perplexity: the same target tokens after 256, 512, 1024, 2048 and 3840
tokens of context. Recall: teacher-forced; an answer counts when every token of it has the highest logit, which is when
greedy decoding would write it. Writes one JSON object to standard output.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramidkv.evaluate.tasks import TASKS, make_examples

Encode = Callable[[str], list[int]]
Logits = Callable[[Tensor, int], Tensor]
"""(B, T) tokens and how many of the last positions are wanted -> (B, that many, V) logits."""

CONTEXTS = (256, 512, 1024, 2048, 3840)
TARGETS = 256
PAIRS = {"kv": 8, "needle": 1, "tracking": 4}  # facts or chains in a context, each asked for


def recall_rows(encode: Encode, task: str, tokens: int, n: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """`n` rows (context + question + answer as tokens, length of the answer), one question to a context."""
    count = functools.cache(lambda text: len(encode(text)))  # the same sentences come again and again
    examples = make_examples(task, n=n, tokens=tokens, count_tokens=count, seed=seed, probes=1)
    rows = []
    for example in examples:
        probe = example.probes[0]
        answer = encode(probe.answer)
        rows.append((encode(example.context) + encode(probe.question) + answer, len(answer)))
    return rows


@torch.no_grad()
def recall(logits: Logits, rows: Sequence[tuple[list[int], int]], device: torch.device, batch: int = 16) -> float:
    """The share of rows whose whole answer is what greedy decoding would write."""
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(ids) for ids, _ in part)
        # Padding on the right is never seen by the tokens before it.
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in part], device=device)
        shortest = min(len(ids) - answer for ids, answer in part)
        keep = longest - shortest + 1
        best = logits(padded, keep).argmax(-1)
        for i, (ids, answer) in enumerate(part):
            first = len(ids) - answer - 1 - (longest - keep)
            right += best[i, first : first + answer].tolist() == ids[len(ids) - answer :]
    return right / len(rows)


@torch.no_grad()
def recall_with_cache(model: Any, encode: Encode, task: str, tokens: int, examples: int, pairs: int) -> tuple[int, int]:
    """Answers right, and questions asked: all `pairs` of each example, its context read once into a full cache."""
    count = functools.cache(lambda text: len(encode(text)))
    right = asked = 0
    made = make_examples(task, n=examples, tokens=tokens, count_tokens=count, seed=0, pairs=pairs, probes=pairs)
    for example in made:
        context = torch.tensor([encode(example.context)], device=model.device)
        cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
        for probe in example.probes:
            question, answer = encode(probe.question), encode(probe.answer)
            fed = torch.tensor([question + answer[:-1]], device=model.device)
            best = model(fed, past_key_values=cache, use_cache=True).logits[0, len(question) - 1 :].argmax(-1)
            right += best.tolist() == answer
            asked += 1
            cache.crop(-fed.shape[1])
    return right, asked


@torch.no_grad()
def losses_by_context(
    logits: Logits, books: Sequence[list[int]], device: torch.device, windows: int, batch: int = 4
) -> dict[int, Tensor]:
    """Mean loss per token of each of about `windows` windows' targets, for each context length: paired, (windows,)."""
    longest = max(CONTEXTS) + TARGETS
    stride = max(TARGETS, sum(max(0, len(book) - longest) for book in books) // windows)
    ends = [(b, e) for b, book in enumerate(books) for e in range(longest, len(book), stride)]
    found: dict[int, list[Tensor]] = {context: [] for context in CONTEXTS}
    for start in range(0, len(ends), batch):
        whole = torch.tensor([books[b][e - longest : e] for b, e in ends[start : start + batch]], device=device)
        targets = whole[:, -TARGETS:]
        for context in CONTEXTS:
            out = logits(whole[:, -TARGETS - context : -1], TARGETS).float()
            loss = torch.nn.functional.cross_entropy(out.transpose(1, 2), targets, reduction="none")
            found[context].append(loss.mean(1).cpu())
    return {context: torch.cat(parts) for context, parts in found.items()}


def summary(losses: dict[int, Tensor]) -> dict[str, Any]:
    """Perplexity per context length, with the standard error of the loss, and of its paired difference to 1024."""
    table = []
    for context, loss in losses.items():
        difference = loss - losses[1024]
        table.append(
            {
                "context_tokens": context,
                "ppl": round(math.exp(loss.mean().item()), 4),
                "loss_nats": round(loss.mean().item(), 5),
                "loss_minus_1024_nats": round(difference.mean().item(), 5),
                "difference_standard_error_nats": round((difference.std() / len(loss) ** 0.5).item(), 5),
            }
        )
    return {"windows": len(losses[1024]), "target_tokens_per_window": TARGETS, "by_context": table}


def main() -> None:
    """Print the figures of one saved model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained reads")
    parser.add_argument("--books", type=Path, help="folder of held-out *.txt; without it no perplexity is measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--windows", type=int, default=900, help="about how many windows of text to score")
    parser.add_argument("--examples", type=int, default=100, help="contexts for each recall task and length")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096], help="recall lengths in tokens")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()

    def logits(ids: Tensor, keep: int) -> Tensor:
        return model(ids, use_cache=False, logits_to_keep=keep).logits

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    result: dict[str, Any] = {"dtype": arguments.dtype, "contexts_per_recall_task": arguments.examples}
    if arguments.books:
        books = [encode(file.read_text(encoding="utf-8")) for file in sorted(arguments.books.glob("*.txt"))]
        result["perplexity"] = summary(losses_by_context(logits, books, device, arguments.windows))
    for task in arguments.tasks:
        for length in arguments.lengths:
            right, asked = recall_with_cache(model, encode, task, length, arguments.examples, PAIRS[task])
            result[f"{task}_{length}"] = {"right": right, "asked": asked, "accuracy": round(right / asked, 4)}
            print(task, length, right, asked, file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
