"""One model over the GPUs of a host (tensor parallelism) beside the same model on one GPU: time, memory, tokens.

    torchrun --nproc-per-node 2 benchmarks/parallel_gpu.py --out parallel.json

Weights are random and made where they lie: `transformers` lays the model out over the ranks as it does when it loads a
checkpoint, and every shard is then cut from the same full tensor, drawn from a seed of its name, so one GPU and several
compute the same model. Needs transformers 5.17. Each part is written to the file as soon as it is measured.

Without GPUs: torchrun --nproc-per-node 2 benchmarks/parallel_gpu.py --device cpu --shape tiny-llama tiny-neox

With one GPU, two ranks can share it as two hosts would talk to each other, which checks tokens and memory but no time
(NCCL refuses a GPU twice on one host, so each rank names a host of its own):
    for RANK in 0 1; do
        NCCL_HOSTID=host$RANK NCCL_SOCKET_IFNAME=lo torchrun --nnodes 2 --node-rank $RANK --nproc-per-node 1 \\
            --master-addr 127.0.0.1 --master-port 29511 benchmarks/parallel_gpu.py --shape tiny-neox tiny-llama &
    done; wait
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import time
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, DistributedConfig
from transformers.initialization import no_init_weights

import pyramidkv
from pyramidkv.evaluate import speed
from pyramidkv.models.device import total_bytes
from pyramidkv.shape import cache_shape
from result import Result, add_out

BEGAN = time.perf_counter()
_LLAMA = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
          "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}  # fmt: skip
_NEOX = {"model_type": "gpt_neox", "hidden_size": 5120, "intermediate_size": 20480, "num_hidden_layers": 36,
         "num_attention_heads": 40, "vocab_size": 50688, "dtype": "float16"}  # fmt: skip
_TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
         "vocab_size": 512, "dtype": "float32"}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "pythia-12b": _NEOX,
    "llama-70b": _LLAMA,
    "tiny-neox": _NEOX | _TINY,
    "tiny-llama": _LLAMA | _TINY,
}
COMPRESSED = pyramidkv.CompressionConfig(method="pyramidkv", keep=0.25, decode="eager")
SPREAD = 4.0  # of the weights of the tiny shapes, times the usual: attention far from uniform, and tokens that vary


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


def device_count(device: torch.device) -> int:
    """How many different GPUs the ranks have; on CPUs, how many ranks."""
    if device.type != "cuda":
        return dist.get_world_size()
    return len(set(gathered(str(torch.cuda.get_device_properties(device).uuid), split=True)))


def config_of(shape: str, layers: int) -> Any:
    sizes = SHAPES[shape] | {"num_hidden_layers": layers}
    return AutoConfig.for_model(**sizes, max_position_embeddings=131072, bos_token_id=None, eos_token_id=None)


def layers_that_fit(shape: str, device: torch.device, prompt: int, ranks: int) -> int:
    """The most layers, at most the shape's own, whose weights, full cache and working memory fit `ranks` devices."""
    sizes = SHAPES[shape]
    if device.type != "cuda":
        return int(sizes["num_hidden_layers"])
    with torch.device("meta"):
        one, two = (AutoModelForCausalLM.from_config(config_of(shape, n)) for n in (1, 2))
    itemsize = one.dtype.itemsize
    of = [sum(p.numel() for p in m.parameters()) * itemsize for m in (one, two)]
    cache = cache_shape(one.config).layers[0]
    layer = of[1] - of[0] + 2 * cache.kv_heads * cache.head_dim * itemsize * (prompt + 256)
    work = prompt * (3 * sizes["intermediate_size"] + 8 * sizes["hidden_size"]) * itemsize + (2 << 30)
    free = 0.95 * total_bytes(device) * ranks - (of[0] - (of[1] - of[0])) - work * ranks
    return max(1, min(int(sizes["num_hidden_layers"]), int(free // layer)))


def build(shape: str, layers: int, device: torch.device, split: bool) -> Any:
    """The model, over all ranks or on this one."""
    config = config_of(shape, layers)
    dtype = getattr(torch, SHAPES[shape]["dtype"])
    if split:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict={},  # every weight is missing: the loader makes each shard on its device, and draws it
            dtype=dtype,
            distributed_config=DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size()),
        )
    else:
        with torch.device(device), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, device, config.initializer_range * (SPREAD if shape.startswith("tiny") else 1))
    return model.eval()


@torch.no_grad()
def fill(model: Any, device: torch.device, spread: float) -> None:
    """The same weights however the model is split: norms 1, biases 0, the others normal, seeded by their names."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if name.endswith(".bias"):
            local.zero_()
            continue
        if parameter.ndim == 1:
            local.fill_(1.0)
            continue
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        full.normal_(std=spread, generator=generator)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        local.copy_(full)
        del full


def engines(device: torch.device, options: argparse.Namespace, split: bool) -> list[speed.Engine]:
    chosen = [speed.Engine("DynamicCache", cudnn=False)]
    if options.cudnn:
        chosen.append(speed.Engine("DynamicCache, cuDNN allowed"))
    chosen.append(speed.Engine(f"pyramidkv, {COMPRESSED.describe()}", COMPRESSED, cudnn=False))
    if device.type == "cuda" and not split:  # over several ranks, decoding is not captured
        graph = dataclasses.replace(COMPRESSED, decode="graph")
        chosen.append(speed.Engine(f"pyramidkv, {graph.describe()}", graph, cudnn=False))
    if options.static:  # last: it may take minutes, or fail
        chosen.append(speed.Engine("StaticCache, compiled", cache_implementation="static", cudnn=False))
    return chosen


def tokens_of(
    model: Any, ids: Tensor, new: int, config: pyramidkv.CompressionConfig | None
) -> tuple[list[list[int]], int]:
    """Greedy tokens, and the KV bytes held here; without a config, those of a cache that keeps everything."""
    options: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    config = dataclasses.replace(config or pyramidkv.CompressionConfig(method="full", decode="eager"), room=new)
    with (
        torch.no_grad(),
        speed.cudnn_attention(False),
        pyramidkv.compress(model, config) as session,
    ):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[:, ids.shape[1] :].tolist(), session.report().kv_bytes


def gathered(value: Any, split: bool) -> list[Any]:
    """The value of every rank that takes part."""
    if not split:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure(model: Any, shape: str, ids: Tensor, split: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine; an engine that fails gives a row with its error."""
    rows = []
    for engine in engines(ids.device, options, split):
        row: dict[str, Any] = {
            "shape": shape,
            "layers": model.config.num_hidden_layers,
            "ranks": dist.get_world_size() if split else 1,
            "engine": engine.name,
            "batch": ids.shape[0],
            "prompt_tokens": ids.shape[1],
            "new_tokens": options.new,
        }
        try:
            *_, (record,) = speed.measure(
                model, shape, [engine], batch=ids.shape[0], prompt=ids.shape[1], new_tokens=options.new,
                repeats=options.repeats, weights_random=True, bandwidth=None,
            )  # fmt: skip
            row["ttft_seconds"] = {"median": record.ttft_seconds.median, "all": record.ttft_seconds.samples}
            row["tpot_seconds"] = {"median": record.tpot_seconds.median, "all": record.tpot_seconds.samples}
            row["peak_bytes_per_rank"] = gathered(record.max_memory_bytes, split)
            if engine.cache_implementation is None:
                row["tokens"], held = tokens_of(model, ids, options.new, engine.config)
                row["kv_bytes_per_rank"] = gathered(held, split)
                if split:
                    row["tokens_equal_on_all_ranks"] = len({str(t) for t in gathered(row["tokens"], split)}) == 1
            else:
                torch.compiler.reset()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        say(str({name: value for name, value in row.items() if name != "tokens"}))
        rows.append(row)
    return rows


def weights_of(model: Any) -> int:
    """Bytes of the weights that lie here."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def one_way(
    shape: str, layers: int, split: bool, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Build, measure and drop a model: over all ranks, or on rank 0 while the others wait."""
    rows: list[dict[str, Any]] = []
    if split or dist.get_rank() == 0:
        where = "all ranks" if split else "one rank"
        try:
            began = time.perf_counter()
            model = build(shape, layers, device, split)
            speed.synchronize(device)
            say(f"{shape}, {layers} layers, {where}: made in {time.perf_counter() - began:.1f} s")
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, SHAPES[shape]["vocab_size"], (options.batch, options.prompt), generator=generator)
            rows = measure(model, shape, ids.to(device), split, options)
            for row in rows:
                row["weights_bytes_per_rank"] = gathered(weights_of(model), split)
            del model
        except Exception as error:  # another shape may fit; what fails on one rank alone ends in a timeout
            rows.append(
                {"shape": shape, "layers": layers, "engine": where, "error": f"{type(error).__name__}: {error}"}
            )
            say(str(rows[-1]))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dist.all_reduce(torch.zeros(1))  # wait for each other, on the CPU
    return rows


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every engine of a shape that gave tokens on one rank and on several: how far they agree."""
    one, several = (
        {
            (r["shape"], r["layers"], r["engine"]): r["tokens"]
            for r in rows
            if (r["ranks"] == 1) == alone and "tokens" in r
        }
        for alone in (True, False)
    )
    found = []
    for key in one.keys() & several.keys():
        same = [
            next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
            for a, b in zip(one[key], several[key], strict=True)
        ]
        row = dict(zip(("shape", "layers", "engine"), key, strict=True))
        found.append(row | {"tokens": len(one[key][0]), "equal_before_the_first_difference": same})
    return sorted(found, key=str)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["tiny-neox", "tiny-llama", "pythia-12b", "llama-70b"]
    )
    parser.add_argument("--prompt", type=int, default=8192, help="of the large shapes; 512 for the tiny ones")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--static", action="store_true", help="also StaticCache with the compiled step: minutes")
    parser.add_argument("--cudnn", action="store_true", help="also DynamicCache with cuDNN attention, which plans anew")
    parser.add_argument("--seconds", type=float, default=240, help="begin no other model after this time")
    options = parser.parse_args()
    # The ranks that wait for rank 0 to measure alone must not give up; of a rank that died they must hear in time.
    patience = timedelta(seconds=max(options.seconds, 120))
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=patience)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=patience)
    transformers.logging.set_verbosity_error()
    result = Result(
        options.out,
        device,
        writes=dist.get_rank() == 0,
        unit="seconds, bytes; medians of the repeats, after one untimed round",
        rows=[],
    )
    report = result.data
    gpus = device_count(device)
    report["device"] = f"{gpus} x {report['device']}"
    if gpus < dist.get_world_size():
        report["shared"] = f"{dist.get_world_size()} ranks on {gpus} GPU: their times mean nothing, tokens and bytes do"
        say(report["shared"])
    large = options.prompt
    for shape in options.shape:
        options.prompt = 512 if shape.startswith("tiny") else large
        alone, everywhere = (layers_that_fit(shape, device, options.prompt, n) for n in (1, dist.get_world_size()))
        for layers, split in dict.fromkeys([(alone, True), (alone, False), (everywhere, True)]):
            late = torch.tensor(time.perf_counter() - BEGAN > options.seconds, dtype=torch.int32)
            dist.broadcast(late, 0)  # all ranks must go on, or none
            if late:
                say(f"{shape}, {layers} layers: not measured, out of time")
                report["rows"] += [{"shape": shape, "layers": layers, "error": "not measured: out of time"}]
                continue
            report["rows"] += one_way(shape, layers, split, device, options)
            report["agreement"] = compare([row for row in report["rows"] if "ranks" in row])
            result.write()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    result.finish("rows", "agreement")


main()
