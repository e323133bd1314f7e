"""Quality of long texts: eviction while decoding, and prompts compressed chunk by chunk. Python reference, CPU.

    python benchmarks/long_texts.py decoding --prompt 512 --target 3000 --chunks 4 --seconds 1500
    python benchmarks/long_texts.py chunks --context 3584 --target 511 --chunks 12 --batch 1 --seconds 1500

`decoding`: a prompt, then every token of the continuation fed one by one, as it is while generating; what is scored is
the prediction of each next token. `chunks`: the context fed in chunks of the given sizes, each layer back at its budget
after each, then the target in one forward, as `pyramidkv bench` does. Both compare with the full cache on the same
tokens: change of perplexity, 95% Student t interval of the paired difference. One JSON object a line on standard
output; no setting is begun after `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.chunks import prefill
from pyramidkv.evaluate import texts
from pyramidkv.evaluate.schema import mean_interval
from pyramidkv.models.source import load_model

DECODING: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "rms", "budget": 512, "slack": 128},
    {"method": "snapkv", "budget": 512, "slack": 128},
    {"method": "streamingllm", "budget": 512, "slack": 128},
    {"method": "rms", "budget": 512, "slack": 32},
    {"method": "rms", "budget": 512, "slack": 128, "bits": 4},
    {"method": "h2o", "budget": 512, "slack": 128},
    {"method": "knorm", "budget": 512, "slack": 128},
]
CHUNKS: list[dict[str, Any]] = [
    {"method": "full"},
    *(
        {"method": m, "share" if m == "auto" else "keep": 0.25, "chunk": c}
        for m in ("rms", "snapkv", "auto", "h2o")
        for c in (None, 1024, 512)
    ),
]


@torch.no_grad()
def decoding(model: Any, ids: Tensor, setting: dict[str, Any], prompt: int) -> tuple[Tensor, PyramidKVCache]:
    """Nats per token of each row (B,) of the continuation, fed token by token."""
    cache = PyramidKVCache(model.config, **setting)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    total = torch.zeros(len(ids))
    for at in range(prompt, ids.shape[1] - 1):
        logits = model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
        total += cross_entropy(logits.float(), ids[:, at + 1], reduction="none")
    return total / (ids.shape[1] - 1 - prompt), cache


@torch.no_grad()
def chunked(model: Any, ids: Tensor, setting: dict[str, Any], prompt: int) -> tuple[Tensor, PyramidKVCache]:
    """Nats per token of each row (B,) of the target, after the context has come in chunks."""
    options = {name: value for name, value in setting.items() if name != "chunk"}
    cache = PyramidKVCache(model.config, kv_dtype="float16", room=1, **options)
    prefill(model, ids[:, :prompt], cache, chunk=setting.get("chunk") or prompt)
    logits = model(ids[:, prompt:-1], past_key_values=cache).logits
    losses = cross_entropy(logits.float().transpose(1, 2), ids[:, prompt + 1 :], reduction="none")
    return losses.mean(1), cache


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of every setting, as it is done."""
    loaded = load_model(arguments.model)
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    before = arguments.prompt if arguments.what == "decoding" else arguments.context
    corpus = texts.load("python-reference")
    rows = texts.chunks(corpus, loaded.tokenizer, tokens=before + arguments.target + 1, count=arguments.chunks)
    ids = torch.tensor(rows)
    work, settings = (decoding, DECODING) if arguments.what == "decoding" else (chunked, CHUNKS)
    full: Tensor | None = None
    begin = time.monotonic()
    for setting in [*settings, *map(json.loads, arguments.setting)]:
        if time.monotonic() - begin > arguments.seconds:
            return
        start = time.monotonic()
        parts = [work(loaded.model, part, setting, before) for part in ids.split(arguments.batch)]
        nll = torch.cat([part[0] for part in parts])
        full = nll if full is None else full
        usage = parts[0][1].report()
        change = None
        if setting["method"] != "full":
            middle, low, high = (100 * (torch.tensor(x).exp().item() - 1) for x in interval((nll - full).tolist()))
            change = [round(x, 2) for x in (middle, low, high)]
        yield {
            "what": arguments.what,
            "model": loaded.name,
            "setting": setting,
            "before": before,
            "target": arguments.target,
            "chunks": len(rows),
            "perplexity": round(nll.mean().exp().item(), 4),
            "change_percent": change,
            "held_most": max(layer.kept_tokens for layer in usage.layers),
            "seconds": round(time.monotonic() - start, 1),
        }


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95% interval."""
    mean, half = mean_interval(values)
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decoding", "chunks"))
    parser.add_argument("--model", default="neox-16m")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=3584)
    parser.add_argument("--target", type=int, default=511)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--setting", action="append", default=[], help="another setting, as JSON")
    for record in measure(parser.parse_args()):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
