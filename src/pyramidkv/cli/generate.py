"""`pyramidkv generate`: text from a compressed cache, and what the full cache would have said."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from pyramidkv.cli.naming import called
from pyramidkv.cli.options import Device, Dtype, Force, Json, Model, compression_options, config_from
from pyramidkv.cli.output import calm_libraries, err, json_out, keeping, note, warn_beyond_positions
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, DataError
from pyramidkv.models.shapes import DEFAULT_MODEL

if TYPE_CHECKING:
    from torch import Tensor

    from pyramidkv.cli.stream import Generated
    from pyramidkv.models.source import LoadedModel
    from pyramidkv.usage import CacheUsage


@compression_options()
def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 text file.", metavar="FILE")
    ] = None,
    model: Model = DEFAULT_MODEL,
    new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most.", metavar="N")
    ] = 128,
    compare: Annotated[bool, typer.Option("--compare", "-c", help="Then generate with the full cache too.")] = False,
    save_cache: Annotated[
        Path | None,
        typer.Option("--save-cache", help="Save the compressed prompt, to ask more of it later.", metavar="FILE"),
    ] = None,
    load_cache: Annotated[
        Path | None,
        typer.Option("--load-cache", help="Go on behind a prompt saved with --save-cache.", metavar="FILE"),
    ] = None,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text: no report on stderr.")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Generate text (greedily) with a compressed cache.

    The text goes to stdout as it comes, the report of what was kept to stderr.

    Examples:

        pyramidkv generate --file notes.txt --keep 0.5 -n 64

        cat notes.txt | pyramidkv generate - --budget 256 --compare

        pyramidkv generate --file manual.txt --method auto --share 0.25 -n 1 --save-cache manual.cache

        pyramidkv generate " To replace the filter," --load-cache manual.cache
    """
    config = config_from(options)
    _check_cache_files(save_cache, load_cache, force=force, compare=compare, options=options)
    text = _prompt(prompt, file)
    calm_libraries()
    from pyramidkv.cache import PyramidKVCache
    from pyramidkv.cli import stream
    from pyramidkv.models.source import load_model
    from pyramidkv.session import compress

    loaded = load_model(model, device=device, dtype=dtype, settings=(config,))
    if loaded.tokenizer is None:
        raise ConfigError(f"model={model!r}: has no tokenizer, so it can't read or write text; use {DEFAULT_MODEL!r}")
    past = None
    if load_cache is not None:
        with called(path="load_cache"):
            past = PyramidKVCache.load(load_cache, loaded.model.config, device=loaded.model.device)
        config = past.config
    # Behind a saved prompt there is no second beginning of the text.
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=past is None).input_ids.to(loaded.model.device)
    if ids.shape[1] == 0:
        raise ConfigError(f"{'PROMPT' if file is None else '--file'}: has no tokens in it")
    if past is not None and not quiet:
        note(f"{load_cache}: {past.get_seq_length():,} tokens seen, {config.method} {config.describe()}")
    if not quiet:
        note(f"{loaded.name}, {loaded.parameters:,} parameters; prompt of {ids.shape[1]:,} tokens")
    tokens = ids.shape[1] + (0 if past is None else past.get_seq_length())
    warn_beyond_positions(loaded.model.config, f"a prompt of {tokens} tokens", tokens + 1)
    if compare:
        _warm_up(loaded, ids, config)

    with keeping(lambda: "the text above is as far as it got"), compress(loaded.model, config) as session:
        show = (lambda piece: None) if as_json else _print_piece
        seen = ids.shape[1] if past is None else past.get_seq_length() + ids.shape[1]
        compressed = stream.generate(loaded.model, loaded.tokenizer, ids, new_tokens=new_tokens, past=past, show=show)
        if not as_json:
            typer.echo()  # here, so that a warning of the session's begins a line of its own
        usage = session.report()
        if save_cache is not None:
            session.cache.crop(seen - session.cache.get_seq_length())
            with called(path="save_cache"):
                session.cache.save(save_cache, overwrite=force)
    full = None
    if compare:
        full = stream.generate(loaded.model, loaded.tokenizer, ids, new_tokens=new_tokens)
    if as_json:
        json_out(_answer(loaded.name, ids.shape[1], compressed, usage, full))
    elif not quiet:
        err.print(str(usage), markup=False, soft_wrap=True)
        _show_times(config.method, compressed, full)
    if full is not None and not as_json:
        _show_difference(loaded.tokenizer, config.method, compressed, full)


def _check_cache_files(
    save: Path | None, load: Path | None, *, force: bool, compare: bool, options: dict[str, Any]
) -> None:
    """Raise before any model is loaded."""
    if save is not None and (save.is_dir() or not save.absolute().parent.is_dir()):
        raise ConfigError(f"save_cache={str(save)!r}: is a folder, or in one that is not there; give a file's name")
    if save is not None and save.exists() and not force:
        raise ConfigError(f"save_cache={str(save)!r}: is there already; give --force to overwrite it")
    if load is None:
        return
    if not load.is_file():
        raise DataError(f"load_cache={str(load)!r}: no such file")
    if compare:
        raise ConfigError("--compare: the full cache of a saved prompt is not there to compare with; leave it out")
    fields = {field.name: field.default for field in dataclasses.fields(CompressionConfig)}
    for name, value in options.items():
        if value != fields[name]:
            raise ConfigError(f"{name}={value!r}: a saved cache goes on with its own settings; leave it out")


def _warm_up(loaded: LoadedModel, ids: Tensor, config: CompressionConfig) -> None:
    """Run both ways on the head of the prompt: what only a first forward pays must not be charged to either side."""
    from pyramidkv.cli import stream
    from pyramidkv.session import compress

    head = ids[:, : 2 * config.floor]
    stream.generate(loaded.model, loaded.tokenizer, head, new_tokens=2)
    if config.method != "full" and head.shape[1] > config.floor:
        with compress(loaded.model, dataclasses.replace(config, keep=None, bytes=None, budget=config.floor)):
            stream.generate(loaded.model, loaded.tokenizer, head, new_tokens=2)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("PROMPT: give one of a text, - for stdin, or --file FILE")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"file={str(file)!r}: can't be read as UTF-8 text ({error})") from error
    assert prompt is not None
    return sys.stdin.read() if prompt == "-" else prompt


def _print_piece(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


def _answer(
    model: str, prompt_tokens: int, compressed: Generated, usage: CacheUsage, full: Generated | None
) -> dict[str, Any]:
    from pyramidkv.cli.stream import first_difference

    answer: dict[str, Any] = {
        "model": model,
        "prompt_tokens": prompt_tokens,
        "method": usage.method,
        "compressed": dataclasses.asdict(compressed),
        "cache": {
            "keep": usage.keep,
            "kv_bytes": usage.kv_bytes,
            "full_kv_bytes": usage.full_kv_bytes,
            "layers": [dataclasses.asdict(layer) for layer in usage.layers],
        },
    }
    if full is not None:
        answer |= {"full": dataclasses.asdict(full), "first_difference": first_difference(compressed.ids, full.ids)}
    return answer


def _show_times(method: str, compressed: Generated, full: Generated | None) -> None:
    from pyramidkv.report.text import seconds

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens", "TTFT", "TPOT"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, made in ((method, compressed), ("full cache", full)):
        if made is not None:
            tpot = "" if made.tpot_seconds is None else seconds(made.tpot_seconds)
            table.add_row(name, str(len(made.ids)), seconds(made.ttft_seconds), tpot)
    err.print(table)
    if full is not None:
        note("One run of each, so no benchmark: `pyramidkv bench` is.")


def _show_difference(tokenizer: Any, method: str, compressed: Generated, full: Generated) -> None:
    from pyramidkv.cli.stream import first_difference

    where = first_difference(compressed.ids, full.ids)
    if where is None:
        err.print(f"The full cache gives the same {len(full.ids)} tokens.")
        return
    err.print(f"They differ from new token {where + 1} on:")
    for name, made in ((method, compressed), ("full cache", full)):
        rest = tokenizer.decode(made.ids[where:], skip_special_tokens=True)
        err.print(Text.assemble((f"{name}: ", "bold"), rest or "(the end)"), soft_wrap=True)
