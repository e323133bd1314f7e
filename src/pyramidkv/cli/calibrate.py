"""`pyramidkv calibrate`: budgets and bits of layers measured on a model, for `--layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramidkv.cli.naming import called
from pyramidkv.cli.options import Device, Dtype, Json, Model, compression_options
from pyramidkv.cli.output import calm_libraries, json_out, note

if TYPE_CHECKING:
    from pyramidkv.evaluate.texts import Corpus


@compression_options("keep", "budget", "share", "bytes", "window", "recent", "kernel", "heads", "bits")
def calibrate(
    model: Model = "neox-16m",
    method: Annotated[
        str, typer.Option(help="One whose scores are shares of attention: auto or echo.", metavar="NAME")
    ] = "auto",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text of your own, as NAME=FILE_OR_FOLDER; may be repeated. Default: facts among filler."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1536,
    prompts: Annotated[int, typer.Option(help="Prompts, of each text.", min=1)] = 4,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **options: Any,
) -> None:
    """Measure how one budget over all layers would spread, and which layers need more bits; print it for --layers.

    The default prompts are made here: facts among plain sentences, from seeds that no measurement uses.

    Examples:

        pyramidkv calibrate --share 0.125

        pyramidkv bench --method auto --share 0.125 --layers "$(pyramidkv calibrate --share 0.125)"
    """
    import torch

    import pyramidkv
    from pyramidkv.calibration import check_method
    from pyramidkv.cli.options import config_from
    from pyramidkv.errors import DataError
    from pyramidkv.evaluate import texts
    from pyramidkv.evaluate.lengths import check_length
    from pyramidkv.evaluate.perplexity import stored
    from pyramidkv.models.source import load_model

    config = config_from(options, method=method)
    check_method(config)
    check_length("context", context, [config])
    corpora = [texts.parse_text(argument) for argument in text or ()]
    calm_libraries()
    loaded = load_model(model, device=device, dtype=dtype)
    if loaded.tokenizer is None:
        raise DataError(f"model={model!r}: has no tokenizer; give token ids to pyramidkv.calibrate")
    with called(tokens="context"):
        ids = _prompts(loaded.tokenizer, corpora, context, prompts)
    note(f"{loaded.name}: {len(ids)} prompts of up to {context} tokens, {config.method} {config.describe()}")
    tensors = [torch.tensor([prompt]) for prompt in ids]
    with called(prompts="context"):
        layers = pyramidkv.calibrate(loaded.model, tensors, stored(config, loaded.model))
    if as_json:
        json_out({"model": loaded.name, "setting": config.describe(), "layers": list(layers)})
    else:
        typer.echo(",".join(_text(layer) for layer in layers))


def _text(layer: float | tuple[float, int]) -> str:
    """A layer's part of `--layers`."""
    return ":".join(f"{number:g}" for number in layer) if isinstance(layer, tuple) else f"{layer:g}"


def _prompts(tokenizer: Any, corpora: list[Corpus], tokens: int, count: int) -> list[list[int]]:
    from pyramidkv.evaluate import tasks, texts

    def ids(words: str) -> list[int]:
        found: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    if corpora:
        return [piece for corpus in corpora for piece in texts.chunks(corpus, tokenizer, tokens=tokens, count=count)]
    examples = tasks.make_examples(
        "kv", n=count, tokens=tokens, count_tokens=lambda t: len(ids(t)), seed=tasks.TRAINING_SEEDS_FROM
    )
    return [ids(example.context) for example in examples]
