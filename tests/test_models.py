"""The shipped model: its files hold only data, it loads without a network, and it can read and recall."""

import json
import math
import time

import pytest
import torch

from pyramidkv import models
from pyramidkv.errors import ConfigError
from pyramidkv.evaluate.tasks import TASKS, make_examples

# Written for this test, in the manner of what the model was trained on.
PASSAGE = """\
The morning was cold and grey when Mr. Harding came down to breakfast. His sister had already taken her place
at the table, and was reading a letter which had been brought from the village an hour before. She did not
look up when he entered the room, nor did she answer when he wished her a good morning, and he knew at once
that the news was bad.

"It is from Edward," she said at last, laying the paper beside her plate. "He will not come. He says that the
roads are not safe, and that he must stay in London until the end of the month."

Mr. Harding walked to the window and stood there for some time without speaking. He had been sure that his son
would come. The house had been made ready for him, the best room had been opened and warmed, and the old
servant, who had known the boy since he was a child, had gone every day to the gate to look for the carriage.
"Then we must wait," he said, "as we have waited before. It is not the first time that he has kept us waiting,
and I do not suppose that it will be the last."
"""


@pytest.fixture(scope="module")
def shipped():
    """The model in float32 and its tokenizer."""
    return models.load()


def recall(shipped, task, *, tokens, n):
    """The share of `n` questions that plain greedy decoding answers, the full cache in use."""
    model, tokenizer = shipped
    right = 0
    for example in make_examples(
        task, n=n, tokens=tokens, count_tokens=lambda text: len(tokenizer(text).input_ids), seed=1000, probes=1
    ):
        probe = example.probes[0]
        ids = tokenizer(example.context + probe.question, return_tensors="pt").input_ids
        wanted = tokenizer(probe.answer).input_ids
        written = model.generate(ids, max_new_tokens=len(wanted), do_sample=False)[0, ids.shape[1] :]
        right += written.tolist() == wanted
    return right / n


def test_loads_fast(shipped):
    start = time.perf_counter()
    models.load()
    assert time.perf_counter() - start < 5  # about half a second on an idle core


def test_is_what_it_is_said_to_be(shipped):
    model, tokenizer = shipped
    config = model.config
    assert model.dtype == torch.float32
    assert not model.training
    assert (config.num_hidden_layers, config.max_position_embeddings, len(tokenizer)) == (12, 4096, 3072)
    assert config.use_parallel_residual
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 15_779_200


def test_loads_in_another_precision():
    model, _ = models.load(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_files_hold_only_data():
    folder = models.path()
    files = {file.name: file for file in folder.rglob("*")}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in files.values()) <= 32_000_000
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads(files[name].read_text(encoding="utf-8"))
    with files["model.safetensors"].open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16"}


def test_tokenizer_gives_the_text_back_and_splits_numbers(shipped):
    tokenizer = shipped[1]
    text = "Über 48213 naïve ☃ tokens,\n\tand  two spaces."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" 48213") == ["Ġ", "4", "8", "2", "1", "3"]


@pytest.mark.parametrize("task", TASKS)
def test_tokens_of_a_recall_text_are_those_of_its_parts(shipped, task):
    def encode(text):
        return shipped[1](text).input_ids

    for example in make_examples(task, n=5, tokens=512, count_tokens=lambda text: len(encode(text)), seed=0):
        for probe in example.probes:
            parts = [example.context, probe.question, probe.answer]
            assert encode("".join(parts)) == [token for part in parts for token in encode(part)]


def test_perplexity_of_a_fixed_text(shipped):
    model, tokenizer = shipped
    ids = tokenizer(PASSAGE, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = math.exp(model(ids, labels=ids).loss.item())
    assert 15.8 < perplexity < 17.9  # 16.82 when it was trained


@pytest.mark.parametrize("task", ["kv", "needle"])
def test_recall(shipped, task):
    assert recall(shipped, task, tokens=512, n=5) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("task", ["kv", "needle"])
@pytest.mark.parametrize("tokens", [2048, 4096])
def test_recall_over_the_whole_context(shipped, task, tokens):
    assert recall(shipped, task, tokens=tokens, n=6) >= 0.8


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"name='neox-17m'.*neox-16m"):
        models.path("neox-17m")
