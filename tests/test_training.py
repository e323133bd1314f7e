"""The script that trained the shipped model: in miniature, cut off and gone on, to a model that loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyramidkv import models

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_small_neox.py"


def train(out, *more):
    command = [sys.executable, str(SCRIPT), "--tiny", "--tokenizer", str(models.path() / "tokenizer.json")]
    command += ["--out", str(out), "--steps", "12", "--warmup", "2", "--log-every", "2"]
    command += ["--workers", "0", "--compile", "none"]
    return subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path):
    train(tmp_path, "--stop-after", "7")
    assert "resumed at step 7" in train(tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in log] == [2, 4, 6, 7, 8, 10, 12]
    assert log[-1]["books_loss_nats"] < log[0]["books_loss_nats"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
