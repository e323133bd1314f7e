"""Every kernel at odd shapes, for compute-sanitizer to watch: no read or write outside of what was allocated.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/memory_check_gpu.py

Small models of random weights generate from padded prompts and from chunks, compressed in every way that has its own
kernels. Without torch's cache every tensor is an allocation of its own, whose ends the tool knows. A captured graph
could not allocate, so the step that is captured elsewhere simply runs. It fails if a kernel of ours was never launched.

One of the models alone, with heads of that many channels, in a process that has few minutes:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/memory_check_gpu.py --only 128

It watches our kernels alone: torch's own attention runs by matrix products.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend

import pyramidkv
import pyramidkv.ops
from pyramidkv.decode import graph
from pyramidkv.ops import attention, kernels
from pyramidkv.ops.append import append
from pyramidkv.ops.linear import linear
from pyramidkv.ops.merge import merge
from pyramidkv.ops.packed_attention import packed_attention
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.window_scores import window_scores

WAYS: tuple[dict[str, Any], ...] = (
    {"method": "pyramidkv", "window": 13, "keep": 0.3},
    {"method": "rms", "keep": 0.3, "slack": 3, "room": 3},
    {"method": "echo", "heads": "adaptive", "bits": 8, "keep": 0.6},
    {"method": "auto", "share": 0.3, "slack": 3, "room": 3},
    {"method": "snapkv", "bits": 2, "keep": 0.6, "recent": 16, "window": 16},
)
MODELS = (  # kind, heads, KV heads, head size, dtype, whether the batch is padded
    ("gpt_neox", 3, 3, 80, torch.float16, (False, True)),
    ("llama", 6, 2, 32, torch.bfloat16, (True,)),
    ("llama", 4, 1, 128, torch.float16, (False,)),
)
WIDE = ((4, 1, 256), (9, 1, 112), (28, 4, 128))  # heads, KV heads, head size: of which tiles are larger

BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


def record(
    work: Callable[[], object], _: torch.device, warm_ups: int = graph.WARM_UPS, pool: Any = None
) -> Callable[[], None]:
    """What stands in for a captured graph: the work itself, with the buffers that it was given."""
    places = dict(graph.PLACES)
    for _ in range(warm_ups):
        work()

    def replay() -> None:
        graph.PLACES.update(places)
        work()
        graph.PLACES.clear()

    return replay


def tiny(kind: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> Any:
    sizes = {
        "hidden_size": heads * width, "num_attention_heads": heads, "vocab_size": 104, "num_hidden_layers": 2,
        "intermediate_size": 136, "max_position_embeddings": 1024,
    }  # fmt: skip
    if kind == "llama":
        sizes |= {"num_key_value_heads": kv_heads, "head_dim": width}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).cuda().eval()


def attention_by_products() -> None:
    """Has torch attend by matrix products.

    The flash kernel of torch 2.11 writes up to 64 bytes behind its log-sum-exps where a row has few queries
    (`flash_fwd_splitkv_combine_kernel`; torch's cache hides it), and the tool ends the process at the first error. Nor
    is that kernel, or cuDNN's, ours to watch.
    """
    for allow in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, allow)(False)
    attention.BACKENDS = [SDPBackend.MATH]  # which turns flash on again
    attention.why_not_ragged = lambda *_: "only our kernels are watched"


def ops() -> None:
    """What the small models are too small for, by hand."""
    for dtype in (torch.float16, torch.bfloat16):
        for rows in (1, 3, 16):
            x, weight = torch.randn(rows, 2072, device="cuda", dtype=dtype), torch.randn(70, 2072, device="cuda")
            linear(x, weight.to(dtype), torch.randn(70, device="cuda", dtype=dtype))
        for size, past, queries in ((80, 33, 65), (64, 1, 31), (128, 70, 1)):
            new, old = (torch.randn(3, n, 5, size, device="cuda", dtype=dtype).transpose(1, 2) for n in (queries, past))
            for by_token in (False, True):
                append((old, old.contiguous()), (new, new.contiguous()), by_token=by_token, front=3)
            lse = torch.randn(3, 5, queries, device="cuda")
            for parts in (2, 3):
                merge([(new, lse)] * parts, torch.empty_like(new))
        query, key = (torch.randn(3, n, 2501, 80, device="cuda", dtype=dtype) for n in (4, 2))
        window_scores(query[:, :, -13:], key, 0.1)
        for heads, kv_heads, size in WIDE:
            key = torch.randn(3, kv_heads, 230, size, device="cuda", dtype=dtype)
            query, index = key[:, :, :1].repeat(1, heads // kv_heads, 1, 1), torch.arange(200, device="cuda")
            for bits in (16, 8, 4, 2):
                pages = Pages.gather(key, key, index.expand(3, kv_heads, 200), [203] * 3, 3, bits)
                packed_attention(query, pages, key[:, :, :30].clone(), key[:, :, :30].clone(), 17, None, 0.1)


def not_launched() -> list[str]:
    """The kernels in `ops` that have not run in this process."""
    from triton.runtime.jit import JITFunction

    found = []
    for package in pkgutil.iter_modules(pyramidkv.ops.__path__):
        if package.ispkg:
            module = importlib.import_module(f"pyramidkv.ops.{package.name}.triton")
            for name, kernel in vars(module).items():
                ran = isinstance(kernel, JITFunction) and any(caches[0] for caches in kernel.device_caches.values())
                if name.endswith("_kernel") and not ran:
                    found.append(f"{package.name}.{name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [width for _, _, _, width, _, _ in MODELS]
    parser.add_argument("--only", type=int, choices=sizes, help="head size; default: all models")
    only = parser.parse_args().only
    if (why := kernels.why_no_triton(torch.device("cuda"))) is not None:
        raise SystemExit(f"no kernels: {why}")
    graph.record = record
    torch.manual_seed(0)
    attention_by_products()
    ops()
    say("ops: done")
    runs = 0
    for kind, heads, kv_heads, width, dtype, paddings in MODELS:
        if only not in (None, width):
            continue
        model = tiny(kind, heads, kv_heads, width, dtype)
        ids = torch.randint(3, 100, (3, 331), device="cuda")
        mask = torch.ones_like(ids)
        mask[1, :70], mask[2, :200] = 0, 0
        for way in WAYS:
            for padded in paddings:
                with pyramidkv.compress(model, decode="graph", **way) as session:
                    real = mask if padded else torch.ones_like(mask)
                    options: dict[str, Any] = {"attention_mask": real, "do_sample": False, "pad_token_id": 0}
                    model.generate(ids, max_new_tokens=13, **options)
                    cache = session.prefill(ids, chunk=120, attention_mask=real)
                    model.generate(ids, past_key_values=cache, max_new_tokens=2, **options)
                runs += 1
        torch.cuda.synchronize()
        say(f"{kind}, {heads} heads of {width}, {kv_heads} KV heads, {dtype}: done")
    say(f"{runs} runs, {runs * 15} tokens of three rows")
    if only is None and (missing := not_launched()):
        raise SystemExit(f"never launched: {', '.join(missing)}")


if __name__ == "__main__":
    main()
