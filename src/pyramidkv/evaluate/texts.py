"""The corpora that perplexity is measured on. A corpus that can't be had is an error; nothing takes its place."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pyramidkv.config import unknown
from pyramidkv.errors import ConfigError, DataError
from pyramidkv.models.hub import hub_problem

T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """A named text, in whole documents; no chunk crosses from one document into the next."""

    name: str
    source: str  # where it was read from, for the reader of a result
    documents: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the UTF-8 text, documents joined by a zero byte."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


@dataclass(frozen=True)
class _Hub:
    path: str
    config: str | None
    join: bool  # rows are lines of one text, not documents


# deepmind/pg19 itself is a loading script, which `datasets` no longer runs; this is the same text as parquet.
_HUB = {
    "wikitext-2": _Hub("Salesforce/wikitext", "wikitext-2-raw-v1", join=True),
    "pg19": _Hub("emozilla/pg19", None, join=False),
}
LOCAL = "python-reference"
NAMES = (LOCAL, *_HUB)


def load(name: str) -> Corpus:
    """A corpus by name: "python-reference" needs no network; "wikitext-2" and "pg19" come from the Hugging Face hub.

    Raises `ConfigError` for an unknown name, `DataError` if the corpus can't be had, saying what to do.
    """
    if name == LOCAL:
        return python_reference()
    if name in _HUB:
        return _from_hub(name, _HUB[name])
    raise ConfigError(f"corpus={name!r}: {unknown(name, NAMES)}; for a text of your own use --text NAME=FILE_OR_FOLDER")


def python_reference() -> Corpus:
    """The language reference that every CPython carries (`pydoc_data.topics`): technical English, 600 kB."""
    from pydoc_data.topics import topics

    version = ".".join(platform.python_version_tuple()[:2])
    text = "\n\n".join(topics[key] for key in sorted(topics))
    return Corpus(f"python-{version}-reference", "pydoc_data.topics of this CPython", (text,))


def from_path(name: str, path: Path) -> Corpus:
    """A UTF-8 text file, or every `*.txt` of a folder as one document each, in name order. Raises `DataError`."""
    shown = repr(f"{name}={path}")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"text={shown}: the folder holds no *.txt file")
    try:
        documents = tuple(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text={shown}: can't be read as UTF-8 text: {error}") from error
    if not any(document.strip() for document in documents):
        raise DataError(f"text={shown}: there is no text in it")
    return Corpus(name, str(path), documents)


def parse_text(argument: str) -> Corpus:
    """The corpus of a `--text NAME=FILE_OR_FOLDER` argument."""
    name, separator, path = argument.partition("=")
    if not separator or not name or not path:
        raise ConfigError(f"text={argument!r}: must be NAME=FILE_OR_FOLDER, such as wikitext-2=wiki.test.txt")
    return from_path(name, Path(path))


def _from_hub(name: str, hub: _Hub) -> Corpus:
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise DataError(f"corpus={name!r}: needs the datasets library: pip install 'pyramidkv[hub]'") from error
    problem = hub_problem()
    if problem is not None and not constants.HF_HUB_OFFLINE:  # offline by choice: it may be in the local cache
        raise DataError(f"corpus={name!r}: {problem}; with a copy on disk, use --text {name}=FILE_OR_FOLDER")
    try:
        rows: Iterable[Any] = datasets.load_dataset(hub.path, hub.config, split="test")
        texts = [row["text"] for row in rows]
    except Exception as error:  # datasets raises its own, huggingface_hub's, httpx's and OS errors for "not there"
        raise DataError(
            f"corpus={name!r}: {hub.path} can't be loaded from the Hugging Face hub "
            f"({type(error).__name__}); with a copy on disk, use --text {name}=FILE_OR_FOLDER"
        ) from error
    documents = ("\n\n".join(texts),) if hub.join else tuple(texts)
    return Corpus(name, f"hub: {hub.path} {hub.config or ''} test".replace("  ", " "), documents)


def chunks(corpus: Corpus, tokenizer: Any, *, tokens: int, count: int, asked: str = "tokens=") -> list[list[int]]:
    """Up to `count` chunks of exactly `tokens` token ids, spread evenly over the corpus, none overlapping.

    Raises `DataError` if the corpus is too short for one; `asked` is what the caller calls `tokens`.
    """
    documents = _spread(corpus.documents, 4 * count)  # a hundred books need not all be cut into tokens
    starts: list[list[int]] = []
    longest = 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        starts += [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)]
    if not starts:
        raise DataError(
            f"corpus {corpus.name!r}: its longest document has {longest} tokens and one chunk needs {tokens} "
            f"({asked}); ask for fewer, or give a longer text"
        )
    return _spread(starts, count)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, in order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
