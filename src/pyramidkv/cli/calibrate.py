"""`pyramidkv calibrate`: budgets and bits of layers measured on a model, for `--layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyramidkv.cli.naming import called
from pyramidkv.cli.options import Device, Dtype, Json, Model, compression_options
from pyramidkv.cli.output import calm_libraries, json_out, note

FOLLOWING = 64  # tokens of a text that count
QUESTIONS = 2  # of each context of facts

if TYPE_CHECKING:
    from pyramidkv.evaluate.texts import Corpus


@compression_options("keep", "budget", "share", "bytes", "window", "recent", "kernel", "heads", "bits")
def calibrate(
    model: Model = "neox-16m",
    method: Annotated[str, typer.Option(help="Any that drops tokens.", metavar="NAME")] = "auto",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text of your own, as NAME=FILE_OR_FOLDER; may be repeated. Default: facts, filler, questions."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 1536,
    prompts: Annotated[int, typer.Option(help="Prompts, of each text.", min=1)] = 6,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **options: Any,
) -> None:
    """Measure what each layer is worth to the model's predictions, and divide the bytes by it; print it for --layers.

    Every layer is compressed alone, to several amounts and bits; counted is what that changes in the predictions for
    what follows. The default prompts are made here: facts among plain sentences and two questions, of whose answers the
    tokens count, from seeds that no measurement uses. Of a text of your own, the last 64 tokens of each prompt count.

    Examples:

        pyramidkv calibrate --share 0.125

        pyramidkv bench --method auto --share 0.125 --layers "$(pyramidkv calibrate --share 0.125)"
    """
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
        made = _prompts(loaded.tokenizer, corpora, context, prompts)
    note(f"{loaded.name}: {len(made)} prompts of up to {context} tokens, {config.method} {config.describe()}")
    tensors = [(_row(ids), [(_row(question), _row(answer)) for question, answer in asked]) for ids, asked in made]
    with called(prompts="context"):
        layers = pyramidkv.calibrate(
            loaded.model, tensors, stored(config, loaded.model),
            progress=lambda done, all_of_them: note(f"prompt {done} of {all_of_them} measured"),
        )  # fmt: skip
    if as_json:
        json_out({"model": loaded.name, "setting": config.describe(), "layers": list(layers)})
    else:
        typer.echo(",".join(_text(layer) for layer in layers))


def _text(layer: float | tuple[float, int]) -> str:
    """A layer's part of `--layers`."""
    return ":".join(f"{number:g}" for number in layer) if isinstance(layer, tuple) else f"{layer:g}"


def _row(ids: list[int]) -> Any:
    """Token ids as a batch of one row."""
    import torch

    return torch.tensor([ids])


def _prompts(
    tokenizer: Any, corpora: list[Corpus], tokens: int, count: int
) -> list[tuple[list[int], list[tuple[list[int], list[int]]]]]:
    """Token ids of each context, and of its questions and answers."""
    from pyramidkv.evaluate import tasks, texts

    def ids(words: str) -> list[int]:
        found: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    if corpora:
        pieces = (texts.chunks(corpus, tokenizer, tokens=tokens, count=count) for corpus in corpora)
        behind = FOLLOWING + 1  # what is asked is the first of these, alone
        return [
            (piece[:-behind], [(piece[-behind:-FOLLOWING], piece[-FOLLOWING:])])
            for corpus in pieces
            for piece in corpus
        ]
    examples = tasks.make_examples(
        "kv", n=count, tokens=tokens, count_tokens=lambda t: len(ids(t)), seed=tasks.TRAINING_SEEDS_FROM
    )
    return [
        (ids(example.context), [(ids(probe.question), ids(probe.answer)) for probe in example.probes[:QUESTIONS]])
        for example in examples
    ]
