"""What the small GPT-NeoX is trained on: books, docstrings of installed packages, and our own recall tasks, as tokens.

Read by `train_small_neox.py`, which documents the command. Nothing here measures; see `small_neox_eval.py` for that.
"""

import argparse
import ast
import functools
import math
import random
import re
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset, get_worker_info

from pyramidkv.evaluate.tasks import TASKS, TRAINING_SEEDS_FROM, Example, make_example, synthetic_sentences

END = "<|endoftext|>"
VOCABULARY = 3072
ANSWER_WEIGHT = 4  # loss weight of an answer's tokens; everything else weighs 1

# Packages whose docstrings are read besides the standard library's; all under BSD licences.
_DOCSTRING_PACKAGES = ("numpy", "torch")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "pydoc_data", "lib2to3"}


def read_archive(path: Path) -> list[str]:
    """The texts in one tar archive, in the order of their names."""
    with tarfile.open(path) as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        return [archive.extractfile(m).read().decode("utf-8", "replace") for m in members]  # type: ignore[union-attr]


def rewrap(text: str, seed: int) -> str:
    """About two thirds of the books with their lines cut at 60 to 78 characters, as printed e-texts have them.

    The archives hold one paragraph a line; many e-texts, the held-out ones too, are wrapped. The model must know both.
    """
    rng = random.Random(f"wrap:{seed}")
    if rng.random() < 1 / 3:
        return text
    width = rng.randint(60, 78)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line: list[str] = []
        length = -1
        for word in paragraph.split(" "):
            if line and length + 1 + len(word) > width:
                lines.append(" ".join(line))
                line, length = [], -1
            line.append(word)
            length += 1 + len(word)
        lines.append(" ".join(line))
    return "\n".join(lines)


def docstrings() -> str:
    """The longer docstrings of the standard library and of `_DOCSTRING_PACKAGES`, module by module."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), *(Path(paths["purelib"]) / name for name in _DOCSTRING_PACKAGES)]
    found = []
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            if _SKIPPED_FOLDERS & set(file.relative_to(root).parts):
                continue
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            found += [text for text in texts if text and len(text) > 80]
    return "\n\n".join(found)


def sentences(text: str) -> list[str]:
    """The plain sentences of a book: 20 to 240 characters, on one line, no digits."""
    flat = re.sub(r"\s+", " ", text)
    return [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", flat) if 20 <= len(s) <= 240 and not re.search(r"\d", s)]


def recall_text(example: Example) -> Iterator[tuple[str, bool]]:
    """The pieces of a training text: the context, then every question with its answer; True marks answers."""
    yield example.context, False
    for probe in example.probes:
        yield probe.question, False
        yield probe.answer, True
        yield ".\n", False


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens; digits stand alone, so a number's length is its number of digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_sample(data: Path, seed: int = 0) -> Iterator[str]:
    """About 20 MB for the tokenizer: a stretch of every book, some docstrings, some recall texts."""
    rng = random.Random(seed)
    for archive in sorted(data.glob("*.tar.xz")):
        for i, text in enumerate(read_archive(archive)):
            start = rng.randrange(max(1, len(text) - 36_000))
            yield rewrap(text[start : start + 36_000], i)
    yield docstrings()[:800_000]
    for task in TASKS:
        for i in range(60):
            example = make_example(task, tokens=8000, count_tokens=len, seed=TRAINING_SEEDS_FROM + i)
            yield "".join(piece for piece, _ in recall_text(example))


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as one run of uint16 tokens, and where each begins (with the run's length as the last entry)."""
    runs = [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(texts)]
    return np.concatenate(runs), np.cumsum([0, *(len(run) for run in runs)])


def read_all(data: Path) -> tuple[list[str], list[list[str]], str]:
    """The books, wrapped or not; sentences of some of them as filler; the docstrings. Read in parallel."""
    archives = sorted(data.glob("*.tar.xz"))
    with ProcessPoolExecutor(max_workers=len(archives) + 2) as pool:
        books = [pool.submit(_wrapped_books, archive) for archive in archives]
        filler = pool.submit(_filler, archives[0])
        docs = pool.submit(docstrings)
        return [text for part in books for text in part.result()], filler.result(), docs.result()


def _wrapped_books(archive: Path) -> list[str]:
    return [rewrap(text, seed) for seed, text in enumerate(read_archive(archive))]


def _filler(archive: Path) -> list[list[str]]:
    return filler_of_books(read_archive(archive), books=60, seed=0)


class Windows:
    """Windows of tokens at random places of a corpus on the device; no window crosses from one text into the next."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, device: torch.device) -> None:
        self._tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self._starts, self._lengths = starts[:-1], np.diff(starts)

    def draw(self, rng: np.random.Generator, n: int, length: int) -> torch.Tensor:
        """(n, length) tokens, int64: every place in the corpus is as likely as any other."""
        room = np.maximum(self._lengths - length, 0)
        ends = np.cumsum(room)
        at = rng.integers(0, ends[-1], size=n)
        book = np.searchsorted(ends, at, side="right")
        first = torch.from_numpy(self._starts[book] + at - (ends[book] - room[book])).to(self._tokens.device)
        index = first[:, None] + torch.arange(length, device=self._tokens.device)
        return self._tokens[index].long()


class RecallRows(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless rows of packed recall texts: (tokens, weights), each (length,); row k is the same in every run.

    `lengths` = (shortest, longest) text in tokens, drawn log-uniformly. Weights belong to the token they stand beside:
    answers `ANSWER_WEIGHT`, other digits 0 (nothing could predict them), the rest 1.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        filler: list[list[str]],
        length: int,
        lengths: tuple[int, int],
        first: int,
        salt: int,
    ) -> None:
        self._file, self._filler, self._length = tokenizer_file, filler, length
        self._lengths, self._first, self._salt = lengths, first, salt

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        tokenizer = Tokenizer.from_file(str(self._file))
        count = functools.lru_cache(maxsize=400_000)(lambda text: len(tokenizer.encode(text).ids))
        row = self._first + worker
        while True:
            yield self.row(row, tokenizer, count)
            row += workers

    def row(self, number: int, tokenizer: Tokenizer, count: Callable[[str], int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row `number`."""
        rng = random.Random(f"row:{self._salt}:{number}")
        ids: list[int] = []
        weights: list[int] = []
        text = 0
        while len(ids) < self._length:
            space = self._length - len(ids)
            low, high = self._lengths[0], min(self._lengths[1], max(space, self._lengths[0]))
            size = round(math.exp(rng.uniform(math.log(low), math.log(high))))
            # The row and the text within it name the seed, far from every other row's.
            seed = TRAINING_SEEDS_FROM + (self._salt * 10**7 + number) * 1000 + text
            for piece, is_answer in recall_text(training_example(rng, size, count, seed, self._filler)):
                piece_ids = tokenizer.encode(piece).ids
                ids += piece_ids
                if is_answer:
                    weights += [ANSWER_WEIGHT] * len(piece_ids)
                else:
                    weights += [0 if token in _digits(tokenizer) else 1 for token in piece_ids]
            ids.append(0)
            weights.append(1)
            text += 1
        return torch.tensor(ids[: self._length]), torch.tensor(weights[: self._length], dtype=torch.float32)


@functools.lru_cache(maxsize=1)
def _digits(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.token_to_id(str(digit)) for digit in range(10))


def training_example(
    rng: random.Random, size: int, count: Callable[[str], int], seed: int, filler: list[list[str]]
) -> Example:
    """A recall example of about `size` tokens with all its questions: any task, any filler, few or many facts."""
    task = rng.choices(TASKS, weights=(5, 3, 2))[0]
    hops = rng.randint(1, 3)
    # A fact takes about 16 tokens and so does its question.
    most = max(1, size // 64)
    pairs = {"kv": rng.randint(2, max(2, min(32, most))), "needle": rng.randint(1, min(4, most))}.get(
        task, rng.randint(1, max(1, min(6, most // (hops + 1))))
    )
    asked = min(pairs, 16)
    kind = rng.random()
    chosen = None if kind < 0.45 else rng.choice(filler)
    return make_example(
        task,
        tokens=max(size - 18 * (asked - 1), 40 + 20 * pairs * (hops + 1 if task == "tracking" else 1)),
        count_tokens=count,
        seed=seed,
        filler=chosen,
        pairs=pairs,
        probes=asked,
        hops=hops,
    )


def filler_of_books(texts: list[str], books: int, seed: int) -> list[list[str]]:
    """The sentences of some of the books, one list a book, to be laid around the facts."""
    chosen = random.Random(seed).sample(texts, min(books, len(texts)))
    return [found for text in chosen if len(found := sentences(text[:400_000])) >= 300]


def synthetic_page(seed: int, n: int) -> str:
    """`n` template sentences; for tests of the pipeline without any data."""
    return " ".join(islice(synthetic_sentences(random.Random(seed)), n))


def main() -> None:
    """Train the tokenizer alone and write tokenizer.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the *.tar.xz archives of texts")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(tokenizer_sample(arguments.data))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))


if __name__ == "__main__":
    main()
