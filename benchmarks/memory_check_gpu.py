"""Every kernel at odd shapes, for compute-sanitizer to watch: no read or write outside of what was allocated.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/memory_check_gpu.py

Small models of random weights generate from padded prompts, compressed in every way that has its own kernels. Without
torch's cache every tensor is an allocation of its own, whose ends the tool knows. A captured graph could not allocate,
so the step that is captured elsewhere simply runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

import pyramidkv
from pyramidkv.decode import graph
from pyramidkv.ops import kernels

WAYS: tuple[dict[str, Any], ...] = (
    {"method": "pyramidkv", "window": 13, "keep": 0.3},
    {"method": "rms", "keep": 0.3, "slack": 5, "room": 5},
    {"method": "echo", "heads": "adaptive", "bits": 8, "keep": 0.6},
    {"method": "auto", "share": 0.3},
    {"method": "snapkv", "bits": 2, "keep": 0.6, "recent": 16, "window": 16},
)


def record(work: Callable[[], None], _: torch.device) -> Callable[[], None]:
    """What stands in for a captured graph: the work itself, with the buffers that it was given."""
    places = dict(graph.PLACES)
    for _ in range(graph.WARM_UPS):
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


def main() -> None:
    if (why := kernels.why_no_triton(torch.device("cuda"))) is not None:
        raise SystemExit(f"no kernels: {why}")
    graph.record = record
    torch.manual_seed(0)
    # torch 2.11's own flash kernel writes behind its log-sum-exps at these shapes, and an error ends the process.
    torch.backends.cuda.enable_flash_sdp(False)
    runs = 0
    for kind, heads, kv_heads, width, dtype in (
        ("gpt_neox", 3, 3, 80, torch.float16),
        ("llama", 6, 2, 32, torch.bfloat16),
        ("llama", 4, 1, 128, torch.float16),
    ):
        model = tiny(kind, heads, kv_heads, width, dtype)
        ids = torch.randint(3, 100, (3, 331), device="cuda")
        mask = torch.ones_like(ids)
        mask[1, :70], mask[2, :200] = 0, 0
        for way in WAYS:
            for padded in (False, True):
                with pyramidkv.compress(model, decode="graph", **way):
                    real = mask if padded else torch.ones_like(mask)
                    model.generate(ids, attention_mask=real, max_new_tokens=14, do_sample=False, pad_token_id=0)
                runs += 1
        print(f"{kind}, {heads} heads of {width}, {kv_heads} KV heads, {dtype}: done", flush=True)
    torch.cuda.synchronize()
    print(f"{runs} runs, {runs * 14} tokens of three rows")


if __name__ == "__main__":
    main()
