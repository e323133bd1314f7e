"""kvpress and this package on the shape of Llama-3.1-8B, random bfloat16 weights: TTFT, TPOT, peak and KV memory.

kvpress 0.5.5 needs a `transformers` below 5.3, this package a newer one, so each runs in a process of its own, one
after the other on the same GPU. Install kvpress and its requirements into a folder, without torch, and name it:

    pip install --target DIR --no-deps kvpress==0.5.5 transformers==5.2.0 ...
    python benchmarks/kvpress_gpu.py --kvpress DIR

Both sides run the same code: a forward of the whole prompt, then greedy tokens one by one through the model; on each,
`DynamicCache` with SDPA is the baseline, with and without cuDNN attention, which plans anew for every new shape.
Medians of the repeats, after one untimed round.

Without a GPU: --device cpu --shape tiny --prompt 1024 --kvpress DIR
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
_TINY = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"llama-3.1-8b": _LLAMA, "tiny": _LLAMA | _TINY}
SIDES = ("pyramidkv", "kvpress")
ROW = "row: "  # how a line of a side's output begins that is a row
SLOW_TOKENS = 3  # where a token takes over a second, which few of them tell as well


class Way:
    """One way to run: a name, whether cuDNN may attend, and what is open during the prompt and during all of it."""

    def __init__(
        self,
        name: str,
        *,
        cudnn: bool = False,
        slow: bool = False,
        prompt: Callable[[Any], Any] = lambda _: contextlib.nullcontext(),
        session: Callable[[Any], Any] = lambda _: contextlib.nullcontext(),
    ) -> None:
        self.name, self.cudnn, self.slow = name, cudnn, slow
        self.prompt, self.session = prompt, session


def ways(side: str) -> Iterator[Way]:
    """What a side measures; 75% of the tokens, or of the bytes, are dropped."""
    yield Way("DynamicCache", cudnn=True)
    yield Way("DynamicCache")
    if side == "kvpress":
        import kvpress

        for press in (kvpress.PyramidKVPress(compression_ratio=0.75), kvpress.SnapKVPress(compression_ratio=0.75)):
            yield Way(f"{type(press).__name__} 0.75", prompt=press)
        yield Way("PyramidKVPress 0.75", cudnn=True, slow=True, prompt=kvpress.PyramidKVPress(compression_ratio=0.75))
        return
    import pyramidkv

    for options in (
        {"method": "full"},
        {"method": "pyramidkv", "keep": 0.25},
        {"method": "snapkv", "keep": 0.25},
        {"method": "auto", "share": 0.25},
    ):
        config = pyramidkv.CompressionConfig(**options)  # type: ignore[arg-type]
        name = f"{config.method} {config.describe()}".strip()
        # cuDNN for the prompt alone: afterwards no layer uses it.
        yield Way(name, cudnn=True, session=lambda model, config=config: pyramidkv.compress(model, config))  # type: ignore[misc]


def run(model: Any, way: Way, prompt: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over the repeats; every repeat fills a new cache and decodes from it."""
    from transformers import DynamicCache

    device = model.device

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    first, each, peak, held = [], [], 0, 0
    with way.session(model) as session:
        for repeat in range(repeats + 1):
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            with way.prompt(model):
                out = model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            del out
            synchronize()
            ttft = time.perf_counter() - start
            if session is None:
                held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            else:
                held = session.report().kv_bytes
            start = time.perf_counter()
            for i in range(new_tokens):
                place = torch.full((1, 1), prompt + i, device=device)
                out = model(input_ids=token, past_key_values=cache, position_ids=place, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            synchronize()
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
            if repeat:
                first.append(ttft)
                each.append((time.perf_counter() - start) / new_tokens)
            del cache, out
    return {
        "ttft_ms": 1e3 * statistics.median(first), "tpot_ms": 1e3 * statistics.median(each),
        "max_memory_GB": peak / 1e9, "kv_GB": held / 1e9,
        "ttft_all_ms": [round(1e3 * t, 2) for t in first], "tpot_all_ms": [round(1e3 * t, 2) for t in each],
    }  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """One side, in this process: prints a row for each prompt length and way."""
    end = time.monotonic() + options.seconds
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers import __version__ as version

    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SHAPES[options.shape])
    config._attn_implementation = "sdpa"
    with torch.device(options.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for prompt in options.prompt:
        for way in ways(options.side):
            row: dict[str, Any] = {"side": options.side, "transformers": version, "way": way.name}
            row |= {"cudnn": way.cudnn, "prompt": prompt}
            if time.monotonic() > end:
                row["error"] = "not measured: out of time"
            else:
                torch.backends.cuda.enable_cudnn_sdp(way.cudnn)
                new, repeats = (SLOW_TOKENS, 1) if way.slow else (options.new_tokens, options.repeats)
                try:
                    row |= run(model, way, prompt, new, repeats)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            print(ROW + json.dumps(row), flush=True)


def side(name: str, options: argparse.Namespace, seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of a side, as its process prints them; everything else that it prints is passed on."""
    environment = dict(os.environ)
    if name == "kvpress":
        environment["PYTHONPATH"] = str(options.kvpress.resolve())
    passed = [f"--{n.replace('_', '-')}={getattr(options, n)}" for n in ("device", "shape", "new_tokens", "repeats")]
    lengths = ["--prompt", *map(str, options.prompt)]
    command = [sys.executable, __file__, f"--side={name}", f"--seconds={seconds}", *passed, *lengths]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
            else:
                print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"the process of {name} ended with {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", type=Path, metavar="DIR", help="where kvpress and its transformers are")
    parser.add_argument("--prompt", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="begin nothing after this time")
    parser.add_argument("--side", choices=SIDES, help="one side alone, in this process; for the script itself")
    if any(argument.startswith("--side") for argument in sys.argv):  # where this package may not import
        return measure(parser.parse_args())
    from result import Result, add_out

    add_out(parser)
    options = parser.parse_args()
    if options.kvpress is None or not (options.kvpress / "kvpress").is_dir():
        parser.error(f"--kvpress {options.kvpress}: must be a folder with kvpress in it")
    begin = time.monotonic()
    result = Result(options.out, options.device, model=f"{options.shape} shape, random weights, bfloat16")
    for number, name in enumerate(SIDES):
        left = options.seconds - (time.monotonic() - begin)
        with result.attempt(name):
            for row in side(name, options, left / (len(SIDES) - number)):
                result.add("runs", row)
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    result.data["seconds"] = time.monotonic() - begin
    return result.finish("runs")


if __name__ == "__main__":
    main()
