"""Corpora: what is read is what is named, and nothing takes the place of what can't be had."""

import hashlib

import pytest

from pyramidkv.errors import ConfigError, DataError
from pyramidkv.evaluate import texts


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    monkeypatch.setattr(texts, "hub_problem", lambda: None)


class Words:
    """A tokenizer of one id a word."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(start, count):
    return " ".join(str(n) for n in range(start, start + count))


def test_the_python_reference_is_long_english_and_named_with_its_version():
    corpus = texts.load("python-reference")
    assert corpus.name.startswith("python-3.")
    assert sum(map(len, corpus.documents)) > 300_000
    assert corpus.sha256 == hashlib.sha256(corpus.documents[0].encode()).hexdigest()


def test_a_folder_is_one_document_a_file_in_name_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("no")
    corpus = texts.parse_text(f"books={tmp_path}")
    assert corpus.documents == ("first", "second")
    assert corpus.sha256 == hashlib.sha256(b"first\0second").hexdigest()


@pytest.mark.parametrize("argument", ["books", "=x", "books="])
def test_a_text_argument_needs_a_name_and_a_path(argument):
    with pytest.raises(ConfigError, match="NAME=FILE_OR_FOLDER"):
        texts.parse_text(argument)


def test_texts_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no \*.txt"):
        texts.parse_text(f"books={tmp_path}")
    with pytest.raises(DataError, match="books="):
        texts.parse_text(f"books={tmp_path / 'missing.txt'}")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        texts.parse_text(f"books={tmp_path}")
    (tmp_path / "empty.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        texts.parse_text(f"books={tmp_path}")


def test_an_unknown_corpus_suggests_the_near_one():
    with pytest.raises(ConfigError, match="did you mean 'wikitext-2'"):
        texts.load("wikitext2")


def test_a_hub_that_fails_is_an_error_that_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="--text pg19=FILE_OR_FOLDER"):
        texts.load("pg19")


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(texts, "hub_problem", lambda: "it does not answer")
    with pytest.raises(DataError, match="it does not answer; with a copy on disk, use --text wikitext-2="):
        texts.load("wikitext-2")


def test_hub_lines_are_joined_and_hub_books_are_not(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "a"}, {"text": "b"}])
    assert texts.load("wikitext-2").documents == ("a\n\nb",)
    assert texts.load("pg19").documents == ("a", "b")


def test_chunks_are_whole_spread_and_never_cross_documents():
    corpus = texts.Corpus("n", "here", (numbers(0, 25), numbers(100, 7), numbers(200, 31)))
    got = texts.chunks(corpus, Words(), tokens=10, count=10)
    assert got == [list(range(s, s + 10)) for s in (0, 10, 200, 210, 220)]
    assert texts.chunks(corpus, Words(), tokens=10, count=2) == [list(range(10)), list(range(200, 210))]


def test_a_corpus_too_short_for_one_chunk_is_an_error():
    corpus = texts.Corpus("n", "here", (numbers(0, 9), numbers(0, 5)))
    with pytest.raises(DataError, match="longest document has 9 tokens and one chunk needs 10"):
        texts.chunks(corpus, Words(), tokens=10, count=3)
