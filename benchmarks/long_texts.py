"""Quality of long texts: eviction while decoding, and prompts compressed chunk by chunk.

    python benchmarks/long_texts.py decoding --prompt 512 --target 3000 --chunks 4 --seconds 1500
    python benchmarks/long_texts.py chunks --context 3584 --target 511 --chunks 12 --out neox-16m-chunks.jsonl
    python benchmarks/long_texts.py chunks --model SmolLM2-135M-Instruct.Q4_1.gguf --context 7680 --target 512 \\
        --text wikitext-2=wikitext2-valid.txt --text pg19=pg19-valid --chunks 4 --out smollm2-135m-chunks.jsonl
    python benchmarks/long_texts.py recall --context 3840 --chunks 8 --out neox-16m-chunks-recall.jsonl

`decoding`: a prompt, then every token of the continuation fed one by one, as it is while generating; what is scored is
the prediction of each next token. `chunks`: the context fed in chunks of the given sizes, or at once, each layer back
at its budget after each, then the target in one forward, as `pyramidkv bench` does. Both compare with the full cache on
the same tokens: change of perplexity, 95% Student t interval of the paired difference. `recall`: the tasks of
`pyramidkv recall`, `--chunks` examples of each, the context fed at once and in chunks. One JSON object a line; nothing
is begun after `--seconds`: of `decoding` no setting, of `chunks` no text, so that all settings have the same texts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.chunks import prefill
from pyramidkv.evaluate import recall, tasks, texts
from pyramidkv.evaluate.prefill import prefill as prefill_shared
from pyramidkv.evaluate.schema import mean_interval
from pyramidkv.models.source import load_model

Setting = dict[str, Any]
DECODING: list[Setting] = [
    {"method": "full"},
    {"method": "rms", "budget": 512, "slack": 128},
    {"method": "snapkv", "budget": 512, "slack": 128},
    {"method": "streamingllm", "budget": 512, "slack": 128},
    {"method": "rms", "budget": 512, "slack": 32},
    {"method": "rms", "budget": 512, "slack": 128, "bits": 4},
    {"method": "h2o", "budget": 512, "slack": 128},
    {"method": "knorm", "budget": 512, "slack": 128},
]
CHUNKS: list[Setting] = [
    {"method": "full"},
    *(
        {"method": method, "share": share, "chunk": chunk}
        for share in (0.25, 0.125)
        for chunk in (None, 2048, 1024)
        for method in ("pyramidkv", "rms", "echo", "auto")
        if chunk != 2048 or method in ("rms", "auto")
    ),
]

RECALL: list[Setting] = [{"method": "auto", "share": 0.125, "chunk": chunk} for chunk in (None, 1024)]


@torch.no_grad()
def decoding(model: Any, ids: Tensor, setting: Setting, prompt: int) -> tuple[Tensor, PyramidKVCache]:
    """Nats per token of each row (B,) of the continuation, fed token by token."""
    cache = PyramidKVCache(model.config, **setting)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    total = torch.zeros(len(ids), device=ids.device)
    for at in range(prompt, ids.shape[1] - 1):
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
        total += cross_entropy(logits.float(), ids[:, at + 1], reduction="none")
    return total / (ids.shape[1] - 1 - prompt), cache


def decoded(model: Any, rows: Tensor, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of every setting of `decoding`, as it is done."""
    full: Tensor | None = None
    begin = time.monotonic()
    for setting in [*DECODING, *arguments.setting]:
        if time.monotonic() - begin > arguments.seconds:
            return
        start = time.monotonic()
        parts = [decoding(model, part, setting, arguments.prompt) for part in rows.split(arguments.batch)]
        nll = torch.cat([part[0] for part in parts])
        full = nll if full is None else full
        seconds = time.monotonic() - start
        yield record(setting, nll.tolist(), full.tolist(), parts[0][1], seconds)


@torch.no_grad()
def chunked(model: Any, ids: Tensor, settings: Sequence[Setting], context: int) -> list[tuple[float, Any, float]]:
    """Nats per token of the target of one text (T,), the cache and the seconds, of every setting."""
    found: dict[int, tuple[float, Any, float]] = {}
    caches = [
        PyramidKVCache(model.config, kv_dtype="float16", room=1, **{k: v for k, v in s.items() if k != "chunk"})
        for s in settings
    ]
    at_once = [i for i, s in enumerate(settings) if s.get("chunk") is None]
    start = time.monotonic()
    prefill_shared(model, ids[None, :context], [caches[i] for i in at_once])
    shared = (time.monotonic() - start) / max(len(at_once), 1)
    for i in [*at_once, *(i for i in range(len(settings)) if i not in at_once)]:
        start = time.monotonic() - (shared if i in at_once else 0)
        if i not in at_once:
            prefill(model, ids[None, :context], caches[i], chunk=settings[i]["chunk"])
        held = caches[i].report()
        logits = model(ids[None, context:-1], past_key_values=caches[i]).logits[0]
        nll = cross_entropy(logits.float(), ids[context + 1 :]).item()
        found[i] = nll, held, time.monotonic() - start
        caches[i].reset()
    return [found[i] for i in range(len(settings))]


def chunks(model: Any, corpora: dict[str, Tensor], arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """After each text, the records so far of every corpus and setting; the corpora take turns."""
    settings = [*CHUNKS, *arguments.setting] if not arguments.only else [CHUNKS[0], *arguments.setting]
    found: dict[str, list[list[tuple[float, Any, float]]]] = {name: [] for name in corpora}
    begin = time.monotonic()
    for number in range(arguments.chunks):
        for name, rows in corpora.items():
            if number >= len(rows) or time.monotonic() - begin > arguments.seconds:
                continue
            found[name].append(chunked(model, rows[number], settings, arguments.context))
            yield [
                {"corpus": corpus}
                | record(
                    setting,
                    [of[i][0] for of in done],
                    [of[0][0] for of in done],
                    done[0][i][1],
                    sum(of[i][2] for of in done),
                )
                for corpus, done in found.items()
                if done
                for i, setting in enumerate(settings)
            ]


@torch.no_grad()
def recalled(loaded: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of each task and setting: right answers of all, the questions unknown while the context is read."""
    model, tokenizer = loaded.model, loaded.tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for task in ("kv", "needle"):
        examples = tasks.make_examples(task, n=arguments.chunks, tokens=arguments.context, count_tokens=count, seed=0)
        for setting in [*RECALL, *arguments.setting]:
            right = []
            for example in examples:
                ids = recall._ids(tokenizer, example.context, model.device)
                options = {name: value for name, value in setting.items() if name != "chunk"}
                cache = PyramidKVCache(model.config, kv_dtype="float16", room=1, **options)
                prefill(model, ids, cache, chunk=setting["chunk"] or ids.shape[1])
                right += [recall._is_right(model, tokenizer, p, cache.fork(), None) for p in example.probes]
            yield {"task": task, "setting": setting, "right": sum(right), "questions": len(right)}


def record(setting: Setting, nll: list[float], full: list[float], held: Any, seconds: float) -> dict[str, Any]:
    """What a setting costs over the full cache on the same texts; `held` is a cache, or its report."""
    usage = held.report() if isinstance(held, PyramidKVCache) else held
    change = None
    if setting["method"] != "full" and len(nll) > 1:
        middle, half = mean_interval([a - b for a, b in zip(nll, full, strict=True)])
        ends = (middle, middle - half, middle + half)
        change = [round(100 * (torch.tensor(x).exp().item() - 1), 2) for x in ends]
    return {
        "setting": setting,
        "chunks": len(nll),
        "perplexity": round(torch.tensor(nll).mean().exp().item(), 4),
        "change_percent": change,
        "nll": [round(x, 5) for x in nll],
        "held_most": max(layer.kept_tokens for layer in usage.layers),
        "share_of_bytes": round(usage.kv_bytes / usage.full_kv_bytes, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decoding", "chunks", "recall"))
    parser.add_argument("--model", default="neox-16m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", action="append", help="NAME=FILE_OR_FOLDER; default: the Python reference")
    parser.add_argument("--prompt", type=int, default=512, help="of decoding")
    parser.add_argument("--context", type=int, default=3584, help="of chunks")
    parser.add_argument("--target", type=int, default=511)
    parser.add_argument("--chunks", type=int, default=12, help="texts of each corpus")
    parser.add_argument("--batch", type=int, default=6, help="rows at once of decoding")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--setting", action="append", default=[], type=json.loads, help="another setting, as JSON")
    parser.add_argument("--only", action="store_true", help="of chunks: the full cache and --setting, no others")
    parser.add_argument("--out", type=Path, help="write the records there, anew after each text")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    if arguments.what == "recall":
        found = []
        for one in recalled(loaded, arguments):
            found.append({"what": "recall", "model": Path(loaded.name).name, "context": arguments.context} | one)
            print(json.dumps(found[-1]), flush=True)
            write(arguments.out, found)
        return
    before = arguments.prompt if arguments.what == "decoding" else arguments.context
    chosen = [texts.parse_text(text) for text in arguments.text or ()] or [texts.load("python-reference")]
    length = before + arguments.target + 1
    rows = {
        corpus.name: torch.tensor(texts.chunks(corpus, loaded.tokenizer, tokens=length, count=arguments.chunks)).to(
            loaded.model.device
        )
        for corpus in chosen
    }
    head = {"what": arguments.what, "model": Path(loaded.name).name, "before": before, "target": arguments.target}
    records: list[dict[str, Any]] = []
    if arguments.what == "decoding":
        steps = decoded(loaded.model, next(iter(rows.values())), arguments)
        for one in steps:
            records.append(head | one)
            print(json.dumps(records[-1]), flush=True)
            write(arguments.out, records)
        return
    for several in chunks(loaded.model, rows, arguments):
        records = [head | one for one in several]
        write(arguments.out, records)
    for one in records:
        print(json.dumps(one), flush=True)


def write(path: Path | None, records: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
