"""kvpress on the shape of Llama-3.1-8B, random bfloat16 weights: TTFT, TPOT, peak and KV memory on one GPU.

It needs an environment of its own, since kvpress 0.5.5 needs a `transformers` below 5.3:

    pip install torch kvpress==0.5.5 && python benchmarks/kvpress_gpu.py --out kvpress.json

The same shape here: `pyramidkv bench -m random:llama-3.1-8b --device cuda --dtype bfloat16 --metric speed`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


def run(model: Any, press: Any, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over the repeats; every repeat fills a new cache and decodes from it."""
    ids = torch.randint(0, 128000, (1, prompt), device="cuda")
    first, each, peak, held = [], [], 0, 0
    for repeat in range(repeats + 1):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cache = DynamicCache()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with press(model) if press is not None else contextlib.nullcontext():
            token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        ttft = time.perf_counter() - start
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        start = time.perf_counter()
        for i in range(new_tokens):
            place = torch.full((1, 1), prompt + i, device="cuda")
            token = model(token, past_key_values=cache, position_ids=place, use_cache=True).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        if repeat:
            first.append(ttft)
            each.append((time.perf_counter() - start) / new_tokens)
    return {
        "ttft_ms": 1e3 * statistics.median(first), "ttft_all_ms": [round(1e3 * t, 2) for t in first],
        "tpot_ms": 1e3 * statistics.median(each), "tpot_all_ms": [round(1e3 * t, 2) for t in each],
        "max_memory_GB": peak / 1e9, "kv_GB": held / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "kvpress.json")
    parser.add_argument("--prompt", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "kvpress": "0.5.5"},
        "model": "Llama-3.1-8B shape, random weights, bfloat16",
        "runs": [],
    }
    presses = {"none": None, "PyramidKVPress 0.75": kvpress.PyramidKVPress(compression_ratio=0.75)}
    for prompt in arguments.prompt:
        for name, press in presses.items():
            for cudnn in (True, False):
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
                row = {"press": name, "prompt": prompt, "cudnn_attention": cudnn}
                # One step of PyramidKVPress with cuDNN takes over a second: fewer of them tell as much.
                few = 4 if press is not None and cudnn else arguments.new_tokens
                row |= run(model, press, prompt, few, arguments.repeats)
                report["runs"].append(row)
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
