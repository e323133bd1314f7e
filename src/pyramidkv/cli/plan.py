"""`pyramidkv plan`: what each layer would keep, and what fits into a memory. Needs a config, no weights, no GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pyramidkv.cli.options import Json, compression_options, config_from
from pyramidkv.cli.output import calm_libraries, json_out, note, out, warn_beyond_positions
from pyramidkv.models.shapes import DEFAULT_MODEL

_BAR = 24  # characters


@compression_options()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A built-in shape such as pythia-2.8b, neox-16m, a folder, a .gguf file or a hub id."
        ),
    ] = DEFAULT_MODEL,
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Tokens in a row.", metavar="TOKENS")] = 6144,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows.", metavar="ROWS")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's own), float32, float16 or bfloat16.", metavar="DTYPE")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="What to fit into, such as 80GB. Default: this machine's GPU, if any.", metavar="SIZE"),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """What each layer would keep, and the largest batch that fits.

    From a model's config alone: no weights are read, no GPU is needed. Tokens of padding are not counted.

    Examples:

        pyramidkv plan pythia-2.8b --prompt 6144 --memory 80GB

        pyramidkv plan llama-3.1-8b --prompt 131072 --bytes 2GiB

        pyramidkv plan pythia-2.8b --method snapkv --budget 512 --json
    """
    config = config_from(options)
    import torch

    from pyramidkv.cli.estimate import Estimate
    from pyramidkv.config import parse_bytes
    from pyramidkv.models.device import pick_device, pick_dtype, total_bytes
    from pyramidkv.models.source import count_parameters, load_config

    limit = parse_bytes("memory", memory) if memory is not None else None
    if limit is None and torch.cuda.is_available():
        limit = total_bytes(pick_device("cuda"))
    calm_libraries()
    model_config = load_config(model)
    chosen = pick_dtype(dtype, torch.device("cuda"), model_config)  # auto as on a GPU: planning is for one
    parameters = count_parameters(model_config)
    estimate = Estimate.of(config, model_config, parameters=parameters, prompt=prompt, itemsize=chosen.itemsize)
    answer = _answer(estimate, model, parameters, str(chosen).removeprefix("torch."), batch, limit)
    what = f"prompt={prompt} with room for {config.room} new tokens"
    warn_beyond_positions(model_config, what, prompt + config.room)
    if as_json:
        json_out(answer)
    else:
        _show(answer)


def _answer(estimate: Any, model: str, parameters: int, dtype: str, batch: int, limit: int | None) -> dict[str, Any]:
    """Everything that is printed, as one JSON value."""
    config, shape = estimate.plan.config, estimate.plan.shape
    budgets = dict(zip(shape.compressed, estimate.budgets(batch), strict=True))
    fits = {
        kind: None if limit is None else estimate.largest_batch(limit, compressed=kind == "compressed")
        for kind in ("full", "compressed")
    }
    return {
        "model": model,
        "model_type": shape.model_type,
        "parameters": parameters,
        "dtype": dtype,
        "method": config.method,
        "setting": config.describe(),
        "prompt_tokens": estimate.prompt,
        "batch": batch,
        "room_tokens": config.room,
        "layers": [
            {
                "layer": i,
                "kv_heads": layer.kv_heads,
                "head_dim": layer.head_dim,
                "sliding_window": layer.sliding_window,
                "budget_tokens": budgets.get(i),
            }
            for i, layer in enumerate(shape.layers)
        ],
        "keep": sum(budgets.values()) / (len(budgets) * estimate.prompt),
        "weights_bytes": estimate.weights_bytes,
        "full_kv_bytes": estimate.full_kv_bytes(batch),
        "kv_bytes": estimate.kv_bytes(batch),
        "full_activation_bytes": estimate.work_bytes(batch, compressed=False),
        "activation_bytes": estimate.work_bytes(batch, compressed=True),
        "full_peak_bytes": estimate.peak_bytes(batch, compressed=False),
        "peak_bytes": estimate.peak_bytes(batch, compressed=True),
        "memory_bytes": limit,
        "full_largest_batch": fits["full"],
        "largest_batch": fits["compressed"],
    }


def _show(answer: dict[str, Any]) -> None:
    from pyramidkv.report.text import share, size

    first = answer["layers"][0]
    out.print(
        f"[bold]{answer['model']}[/bold]: {len(answer['layers'])} layers of {first['kv_heads']} KV heads of "
        f"{first['head_dim']}, {answer['parameters']:,} parameters, {answer['dtype']}"
    )
    out.print(f"{answer['method']} {answer['setting']}, {answer['batch']} x {answer['prompt_tokens']:,} prompt tokens")
    out.print(_layer_table(answer))

    totals = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "full cache", answer["method"], "bytes, full", "bytes"):
        totals.add_column(column, justify="left" if column == "" else "right")
    rows = {
        "weights": ("weights_bytes", "weights_bytes"),
        "keys and values": ("full_kv_bytes", "kv_bytes"),
        "activations": ("full_activation_bytes", "activation_bytes"),
        "peak of the prefill": ("full_peak_bytes", "peak_bytes"),
    }
    for label, (full, compressed) in rows.items():
        big, small = answer[full], answer[compressed]
        totals.add_row(label, size(big), size(small, big), f"{big:,}", f"{small:,}")
    out.print(totals)
    change = answer["kv_bytes"] / answer["full_kv_bytes"]
    out.print(
        f"Kept: {share(answer['keep'])} of the tokens, {share(change)} of the KV bytes "
        f"(with positions and room for {answer['room_tokens']} new tokens)."
    )
    if answer["memory_bytes"] is None:
        note("Give --memory 80GB to see the largest batch that fits.")
    else:
        out.print(
            f"Largest batch in {size(answer['memory_bytes'])}: {answer['full_largest_batch']} with the full cache, "
            f"[bold]{answer['largest_batch']}[/bold] with {answer['method']}."
        )
    note(
        "Counted: weights, cache, one layer's activations of the rows prefilled at once. "
        "Not: CUDA context (about 0.5 GB), fragmentation."
    )


def _layer_table(answer: dict[str, Any]) -> Table:
    from pyramidkv.report.text import share

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("kept", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    most = max(layer["budget_tokens"] or 0 for layer in answer["layers"])
    for layer in answer["layers"]:
        kept = layer["budget_tokens"]
        if kept is None:
            window = f"sliding window of {layer['sliding_window']}, as the model has it"
            table.add_row(str(layer["layer"]), "", "", window, style="dim")
            continue
        bar = ("#" if out.options.ascii_only else "█") * max(1, round(_BAR * kept / most))
        table.add_row(str(layer["layer"]), f"{kept:,}", share(kept / answer["prompt_tokens"]), bar)
    return table
