"""The command line: help, exit codes, messages, JSON, and the numbers of `plan` by hand."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import pyramidkv
from pyramidkv.cli import app
from pyramidkv.cli.bench import progress, warn_of_positions
from pyramidkv.cli.estimate import _largest
from pyramidkv.cli.naming import as_typed, called, typed
from pyramidkv.cli.options import DEFAULT_KEEP, config_from
from pyramidkv.cli.stream import first_difference
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError
from pyramidkv.evaluate import schema
from pyramidkv.evaluate.bench import Settings
from pyramidkv.evaluate.schema import Compression, Perplexity, Run

COMMANDS = ("bench", "recall", "calibrate", "plan", "generate", "report", "doctor")
MAIN = "from pyramidkv.cli import main; main()"
WORDS = "The quick brown fox jumps over the lazy dog. " * 8


def run(*arguments, stdin=None, columns="80"):
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env={"COLUMNS": columns})


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """A random GPT-NeoX that reads bytes, saved with its tokenizer."""
    path = tmp_path_factory.mktemp("byte_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**sizes, intermediate_size=96, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    model.save_pretrained(path)
    return path


@pytest.fixture
def results(tmp_path):
    """A results file of one perplexity."""
    path = tmp_path / "results.jsonl"
    versions = {"python": "3", "torch": "2", "transformers": "5", "pyramidkv": "0"}
    schema.append(path, Run("pyramidkv bench", "2026-01-01T00:00:00Z", "cpu", versions, "toy", 10, False, "float32"))
    for method, keep, kv_bytes, nll in (("full", 1.0, 100, 1.0), ("pyramidkv", 0.25, 25, 1.1)):
        compression = Compression(method, f"keep={keep}", keep, kv_bytes, 100)
        schema.append(path, Perplexity("toy", "text", "0" * 64, 64, 8, compression, (nll, nll + 0.1, nll + 0.2)))
    return path


# Help and exit codes


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(arguments):
    done = run(*arguments)
    assert done.exit_code == (0 if arguments else 2)  # typer: no command is a usage error, shown as help
    assert all(command in done.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_help_of_a_command(command, columns):
    done = run(command, "--help", columns=columns)
    assert done.exit_code == 0
    assert "Examples:" in done.output
    assert "--json" in done.output
    assert max(map(len, done.output.splitlines())) <= int(columns)


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_every_setting_is_an_option(command):
    output = run(command, "--help", columns="200").output
    for name in CompressionConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in output


def test_help_needs_no_torch():
    """`import pyramidkv` elsewhere brings it: every other test has its attention registered."""
    command = [sys.executable, "-X", "importtime", "-m", "pyramidkv", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "Usage" in done.stdout and "pyramidkv.config" in imported
    assert not {"torch", "transformers", "pyramidkv.public"} & imported


@pytest.mark.slow
def test_a_command_as_a_process_of_its_own_has_the_whole_package():
    command = [
        sys.executable,
        "-m",
        "pyramidkv",
        "generate",
        "Once",
        "--max-new-tokens",
        "2",
        "--keep",
        "1.0",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)


def test_version():
    done = run("--version")
    assert (done.exit_code, done.output) == (0, f"pyramidkv {pyramidkv.__version__}\n")


@pytest.mark.parametrize("arguments", [("plam",), ("plan", "--metod", "x"), ("plan", "--prompt", "0"), ("report",)])
def test_usage_errors(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


# Arguments, and what the error says: it speaks of what was typed. MODEL is the random model, SHORT a text of few words,
# EMPTY an empty one, NONE is not there.
ERRORS = [
    ("plan pythia-70m --method snapk", "--method 'snapk': unknown; did you mean 'snapkv'"),
    ("plan pythia-70m --keep 1.5", "--keep 1.5: must be a share of the prompt's tokens"),
    ("plan pythia-70m --share 0", "--share 0.0: must be a share of the full cache's bytes"),
    ("plan pythia-70m -k 0.5 -b 99", "give exactly one of --budget, --keep, --share, --bytes; got --budget, --keep"),
    ("plan pythia-70m --method full -k 0.5", "--keep 0.5: --method 'full' keeps everything and takes no amount"),
    (
        "plan pythia-70m --method full --bits 4",
        "--bits 4: --method 'full' stores what the model computes; use --keep 1.0",
    ),
    ("plan pythia-70m --method full --slack 9", "--slack 9: --method 'full' keeps everything"),
    (
        "plan pythia-70m --budget 3",
        "--budget 3: must be at least 33 tokens per layer (--recent 32 are always kept, and 1 ",
    ),
    ("plan pythia-70m --budget 3", "lower --recent or --window to go below"),
    ("plan pythia-70m --window 0", "--window 0: must be a whole number, at least 1"),
    ("plan pythia-70m --kernel 4", "--kernel 4: must be odd"),
    ("plan pythia-70m --bits 3", "--bits 3: must be one of 16, 8, 4, 2"),
    ("plan pythia-70m --kv-dtype int8", "--kv-dtype 'int8': unknown"),
    ("plan pythia-70m --beta 0", "--beta 0.0: must be 1 (uniform) or more"),
    ("plan pythia-70m --layers x", "--layers 'x': must be positive numbers"),
    ("plan pythia-70m --layers 1,2", "--layers (1.0, 2.0): has 2 numbers; this model has 6 layers"),
    ("plan pythia-70m --bytes much", "--bytes 'much': must be a positive number of bytes"),
    (
        "plan pythia-70m --bytes 1MB",
        "--bytes 1000000: a batch of 1 needs at least 2009280 bytes on this model (33 tokens and ",
    ),
    ("plan pythia-70m --bytes 1MB", "and --room 128 in each of 6 layers)"),
    ("plan pythia-70m --memory 8X", "--memory '8X': must be a positive number of bytes"),
    ("plan pythia-70m --dtype fp8", "--dtype 'fp8': unknown"),
    ("plan random:pythia-7b", "MODEL 'random:pythia-7b': its shape is unknown; did you mean 'pythia-1b'"),
    ("plan ./nowhere", "MODEL './nowhere': no such file or folder"),
    ("generate", "PROMPT: give one of a text, - for stdin, or --file FILE"),
    ("generate text --file there.txt", "PROMPT: give one of a text, - for stdin, or --file FILE"),
    ("generate --file NONE", "--file 'NONE': can't be read as UTF-8 text"),
    ("generate --file EMPTY -m MODEL", "--file: has no tokens in it"),
    ("generate text -m pythia-70m", "--model 'pythia-70m': a shape, which has no weights; give 'random:pythia-70m'"),
    ("generate text -m random:pythia-70m", "--model 'random:pythia-70m': has no tokenizer"),
    ("generate text --device gpu", "--device 'gpu': unknown; did you mean 'cpu'"),
    ("generate text -m MODEL --decode graph --device cpu", "--decode 'graph': "),
    ("generate text --save-cache SHORT", "--save-cache 'SHORT': is there already; give --force"),
    ("generate text --save-cache .", "--save-cache '.': is a folder"),
    ("generate text --layers 1,2 -m MODEL", "--layers (1.0, 2.0): has 2 numbers; this model has 3 layers"),
    ("generate text --save-cache NONE/a", "--save-cache 'NONE/a': is a folder, or in one that is not there"),
    ("generate text --load-cache NONE", "--load-cache 'NONE': no such file"),
    ("generate text --load-cache SHORT --compare", "--compare: the full cache of a saved prompt is not there"),
    ("generate text --load-cache SHORT -k 0.5", "--keep 0.5: a saved cache goes on with its own settings"),
    ("generate text --load-cache SHORT -m MODEL", "--load-cache 'SHORT': is truncated, or no safetensors file"),
    (
        "recall --context 5",
        "--context 5: must be longer than the 33 tokens that --method 'snapkv' always keeps (--recent 32",
    ),
    ("recall --context 60 --method snapkv --window 4 -m MODEL", "--context 60: must be at least"),
    ("recall --examples 0", "--examples 0: must be at least 1"),
    ("recall --task kvv", "--task 'kvv': unknown; did you mean 'kv'"),
    ("recall --budget 5000", "--budget 5000: must be below --context 2048, or nothing is compressed"),
    ("recall --method full", "--method 'full': give methods that compress"),
    ("recall --resume", "--resume: give the folder to go on in, with --out DIR"),
    ("bench --metric sped", "--metric 'sped': unknown; did you mean 'speed'"),
    ("bench --context 5", "--context 5: must be longer"),
    ("bench --recall-context 5", "--recall-context 5: must be longer"),
    (
        "bench --recall-context 70 --window 4 -m MODEL --out NONE --metric recall",
        "--recall-context 70: must be at least",
    ),
    ("bench --recall-examples 0", "--recall-examples 0: must be at least 1"),
    ("bench --new-tokens 1", "--new-tokens 1: must be at least 2"),
    ("bench --window 2000 --recent 8", "--window 2000: must be at most --context 1536"),
    ("bench --method full", "--method 'full': give one that compresses"),
    ("bench --corpus pg18", "--corpus 'pg18': unknown; did you mean 'pg19'"),
    ("bench --text words", "--text 'words': must be NAME=FILE_OR_FOLDER"),
    ("bench --text keep=NONE", "--text 'keep=NONE': can't be read as UTF-8 text"),
    ("bench --text a=SHORT --metric perplexity -m MODEL --out NONE", "one chunk needs 2049 (--context + --target + 1)"),
    ("bench --memory x", "--memory 'x': must be a positive number of bytes"),
    ("bench --resume", "--resume: give the folder to go on in, with --out DIR"),
    ("bench --resume --force --out NONE", "--resume, --force: give one of them"),
    ("bench --out SHORT/a", "--out 'SHORT/a': can't be made"),
    ("calibrate --method full", "--method 'full': keeps all tokens"),
    ("calibrate --context 40", "--context 40: must be longer than the 96 tokens that --method 'auto' always keeps"),
    ("calibrate --context 120 -m MODEL", "--context 120: must be at least"),
    ("calibrate --text a=NONE", "--text 'a=NONE': can't be read as UTF-8 text"),
    ("calibrate --text a=SHORT -m MODEL", "one chunk needs 1536 (--context); ask for fewer"),
    ("calibrate --context 600 --share 1 -m MODEL", "--context: one has"),
    ("calibrate -m random:pythia-70m", "--model 'random:pythia-70m': has no tokenizer"),
    ("report NONE/results.jsonl", "RESULTS 'NONE/results.jsonl': No such file"),
    ("report SHORT EMPTY", "--out: several results files are reported in a folder of their own"),
    ("report RESULTS --out SHORT", "--out 'SHORT'"),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_errors_are_one_line_that_names_what_was_typed(line, message, byte_model, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHORT").write_text("Once upon a time.")
    (tmp_path / "EMPTY").touch()
    (tmp_path / "RESULTS").write_bytes(results.read_bytes())
    command, *arguments = line.split()
    done = run(command, *(byte_model if a == "MODEL" else a for a in arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    *notes, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert not any("error" in note for note in notes)
    assert message in error
    flags = set(re.findall(r"--[a-z-]+", run(command, "--help", columns="200").output))
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", error)) <= flags


def test_a_message_in_the_words_of_a_command():
    said = "keep=0.5, budget=: the model's keep=True, path='keep=0.5', \"keep=1\", a.keep=2 and other=3; or keep="
    assert as_typed(said) == said
    with typed({"keep": "--keep", "budget": "--budget"}):
        assert as_typed(said) == (
            "--keep 0.5, --budget: the model's --keep, path='keep=0.5', \"keep=1\", a.keep=2 and other=3; or --keep"
        )
        with pytest.raises(ConfigError, match=r"^--keep 1: other=2$"), called(share="keep", other="no option"):
            raise ConfigError("share=1: other=2")


def test_lm_eval_without_the_harness_is_a_line():
    """A module that is None in `sys.modules` can't be imported, as one that is not installed."""
    code = "import sys; sys.modules['lm_eval'] = None; from pyramidkv.cli.harness import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    needed = "error: pyramidkv-lm-eval needs lm-evaluation-harness: pip install 'pyramidkv[lm-eval]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", needed)


@pytest.mark.slow
def test_a_terminal_without_unicode():
    """No character that it can't show ends a command."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "plan", "pythia-70m"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert b"####" in done.stdout


# Options


def test_config_from_options():
    assert config_from({"method": "snapkv", "window": None}) == CompressionConfig(method="snapkv", keep=DEFAULT_KEEP)
    assert config_from({"keep": 0.5, "seed": 3}, method="h2o").seed == 3
    assert config_from({"method": "full"}).keep is None
    assert config_from({"bytes": "1MB"}).bytes == 1_000_000
    with pytest.raises(ConfigError, match="exactly one"):
        config_from({"keep": 0.5}, budget=99)


# Plan


def test_plan_by_hand():
    """Pythia-2.8B in float16, 6144 tokens: 32 layers x 2 x 32 heads x 80 x 2 bytes a token."""
    plan = json.loads(run("plan", "pythia-2.8b", "-p", "6144", "--memory", "80GB", "--json").stdout)
    assert plan["full_kv_bytes"] == 6144 * 32 * 2 * 32 * 80 * 2 == 2_013_265_920
    assert plan["weights_bytes"] == 2 * 2_775_208_960
    budgets = [layer["budget_tokens"] for layer in plan["layers"]]
    assert sum(budgets) == 32 * 6144 // 4
    slot = 32 * (2 * 80 * 2 + 4)  # a key, a value and a position of every head
    assert plan["kv_bytes"] == (sum(budgets) + 32 * 128) * slot
    activations = 6144 * (4 * 2560 + 2 * 10240) * 2
    assert plan["peak_bytes"] == plan["weights_bytes"] + plan["kv_bytes"] + activations
    free = 80_000_000_000 - plan["weights_bytes"]
    assert plan["full_largest_batch"] == free // (2_013_265_920 + activations)
    together = 24_576 // 6144  # rows that a session prefills at once
    assert plan["largest_batch"] == (free - together * activations) // plan["kv_bytes"] == 132  # measured: 136


@pytest.mark.parametrize(
    ("model", "prompt", "batch", "peak"),
    [("pythia-2.8b", 6144, 8, 24.7), ("pythia-2.8b", 32768, 1, 18.4), ("llama-3.1-8b", 32768, 1, 24.3)],
)
def test_plan_against_measured_peaks(model, prompt, batch, peak):
    """Peaks in GB, measured on an H100 with the full cache."""
    plan = json.loads(run("plan", model, "-p", prompt, "--batch", batch, "--json").stdout)
    assert plan["full_peak_bytes"] / 1e9 == pytest.approx(peak, rel=0.01)


def test_plan_of_sliding_layers():
    done = run("plan", "gemma-3-1b", "-p", "4096")
    assert done.exit_code == 0
    assert done.stdout.count("sliding window of 512") == 22
    layers = json.loads(run("plan", "gemma-3-1b", "--json").stdout)["layers"]
    assert [layer["layer"] for layer in layers if layer["budget_tokens"] is not None] == [5, 11, 17, 23]


def test_plan_that_fits_nothing():
    plan = json.loads(run("plan", "pythia-70m", "--memory", "100MB", "--json").stdout)
    assert (plan["full_largest_batch"], plan["largest_batch"]) == (0, 0)


def test_plan_of_bytes_ends_where_they_do():
    """A fixed number of bytes is shared by all rows: at some batch no row can have its least."""
    plan = json.loads(run("plan", "pythia-70m", "-p", "2000", "--bytes", "20MB", "--memory", "9GB", "--json").stdout)
    assert 0 < plan["largest_batch"] < plan["full_largest_batch"]
    assert plan["kv_bytes"] <= 20_000_000


def test_a_table_in_a_file_is_not_folded(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("COLUMNS", raising=False)
    for columns, lines in ((None, 1), ("40", 3)):
        done = run("report", results, "--out", tmp_path / str(columns), columns=columns)
        assert done.exit_code == 0
        heads = [line for line in done.output.splitlines() if "Metric" in line]
        assert len(heads) == lines
        assert "Improvement" in done.output


def test_generate_says_when_positions_run_out(byte_model):
    done = run("generate", "x" * 2050, "-m", byte_model, "-n", "1", "--budget", "64")
    assert done.exit_code == 0
    assert "a prompt of 2050 tokens: more than the model's 2048 positions" in done.stderr


def test_plan_says_when_positions_run_out(byte_model):
    done = run("plan", byte_model, "-p", "4096")
    assert done.exit_code == 0
    assert "more than the model's 2048 positions" in done.stderr


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("perplexity", "context= and target=: 4200 tokens: more than the model's 4096 positions"),
        ("recall", "recall_context=: 5000 tokens: more than the model's 4096 positions"),
        ("speed", ""),
    ],
)
def test_bench_says_when_positions_run_out(metric, said, capsys):
    settings = Settings(
        configs=(CompressionConfig(keep=0.5),), metrics=(metric,), context=4000, target=200, recall_context=(64, 5000)
    )
    warn_of_positions(settings)
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""
    warn_of_positions(replace(settings, context=3896, recall_context=(4096,)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", ["60", "80"])
def test_plan_fits_the_terminal(columns):
    assert max(map(len, run("plan", "pythia-410m", columns=columns).stdout.splitlines())) <= int(columns)


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_largest(answer):
    assert _largest(lambda n: n <= answer) == answer


# Generate


def test_generate(byte_model):
    done = run("generate", WORDS, "-m", byte_model, "-n", "4", "--budget", "64")
    assert done.exit_code == 0
    assert done.stdout.endswith("\n")
    assert "pyramidkv: " in done.stderr
    assert "TTFT" in done.stderr
    assert run("generate", "-", "-m", byte_model, "-n", "4", "--budget", "64", stdin=WORDS).stdout == done.stdout


def test_generate_from_file_and_quietly(byte_model, tmp_path):
    (tmp_path / "prompt.txt").write_text(WORDS, encoding="utf-8")
    done = run("generate", "-f", tmp_path / "prompt.txt", "-m", byte_model, "-n", "2", "-q")
    assert (done.exit_code, done.stderr) == (0, "")


def test_generate_json(byte_model):
    done = run("generate", WORDS, "-m", byte_model, "-n", "4", "--compare", "--json", "-k", "0.999")
    answer = json.loads(done.stdout)
    assert answer["prompt_tokens"] == len(WORDS)
    assert len(answer["compressed"]["ids"]) == len(answer["full"]["ids"]) == 4
    assert answer["first_difference"] == first_difference(
        tuple(answer["compressed"]["ids"]), tuple(answer["full"]["ids"])
    )
    assert answer["compressed"]["ttft_seconds"] > 0
    assert [layer["seen_tokens"] for layer in answer["cache"]["layers"]] == [len(WORDS) + 3] * 3


def test_generate_says_when_nothing_was_compressed(byte_model):
    done = run("generate", "short", "-m", byte_model, "-n", "2")
    assert done.exit_code == 0
    assert "warning: --keep 0.25: nothing was compressed" in done.stderr
    assert "\nwarning: " in done.output  # behind the text, on a line of its own


def test_generate_compares(byte_model):
    same = run("generate", WORDS, "-m", byte_model, "-n", "3", "--method", "full", "--compare")
    assert "The full cache gives the same 3 tokens." in same.stderr


def test_generate_saves_a_prompt_and_goes_on_behind_it(byte_model, tmp_path):
    path = tmp_path / "words.cache"
    amount = ("--budget", "64", "--window", "8")
    done = run("generate", WORDS, "-m", byte_model, "-n", "3", *amount, "--save-cache", path)
    assert done.exit_code == 0
    assert path.is_file()
    answers = [run("generate", " A dog", "-m", byte_model, "-n", "4", "--json", "--load-cache", path) for _ in range(2)]
    first, second = (json.loads(answer.stdout) for answer in answers)
    assert first["compressed"]["ids"] == second["compressed"]["ids"]
    assert [layer["seen_tokens"] for layer in first["cache"]["layers"]] == [len(WORDS) + len(" A dog") + 3] * 3
    model = transformers.AutoModelForCausalLM.from_pretrained(byte_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_model)
    model.set_attn_implementation("pyramidkv")
    cache = pyramidkv.PyramidKVCache(model.config, budget=64, window=8)
    words, question = (tokenizer(text, return_tensors="pt").input_ids for text in (WORDS, " A dog"))
    with torch.no_grad():
        model(words, past_key_values=cache)
    mask = torch.ones(1, words.shape[1] + question.shape[1])
    out = model.generate(question, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out[0, question.shape[1] :].tolist() == first["compressed"]["ids"]


def test_a_cache_file_that_will_not_do_is_left_alone(byte_model, tmp_path):
    (tmp_path / "FILE").write_text("not a cache")
    for option in ("--save-cache", "--load-cache"):
        assert run("generate", "text", "-m", byte_model, option, tmp_path / "FILE").exit_code == 2
        assert (tmp_path / "FILE").read_text() == "not a cache"


def test_generate_shows_where_texts_part(byte_model, monkeypatch):
    from pyramidkv.cli import stream

    made = iter([(65, 66), (65, 66), (70, 71, 72), (70, 75)])  # two for the warm-up, then compressed and full
    monkeypatch.setattr(
        stream,
        "generate",
        lambda model, *_, **__: (model(torch.ones(1, 99).long()), stream.Generated(next(made), "", 1.0, None))[1],
    )
    shown = run("generate", WORDS, "-m", byte_model, "--budget", "64", "--compare").stderr
    assert "They differ from new token 2 on:" in shown


def test_first_difference():
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2


@pytest.mark.slow
def test_interrupt(byte_model):
    """Ctrl-C in the middle of the text: no traceback, exit code 130, a line about what there is."""
    arguments = ["generate", WORDS, "-m", str(byte_model), "-n", "100000"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run in the background of a shell ignores Ctrl-C, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stderr.readline()  # loaded
            time.sleep(0.5)  # generating
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()  # or leaving this block would wait for all its tokens
    assert process.returncode == 130
    assert b"interrupted: the text above" in err
    assert b"Traceback" not in err


# Report


def test_progress_in_a_file_is_there_while_the_job_runs(capsys):
    with progress() as show:
        for done, line in ((1, "perplexity: 1/3 done"), (2, ""), (3, "perplexity: 3/3 done")):
            show("perplexity", done, 3)
            assert capsys.readouterr().err.strip() == line
    assert capsys.readouterr().err == ""
    with progress(shown=False) as show:
        show("perplexity", 1, 1)
    assert capsys.readouterr().err == ""


def test_report(results):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    done = run("report", results)
    assert done.exit_code == 0
    assert "report.html" in done.stdout
    assert (results.parent / "report.html").is_file()
    again = run("report", results.parent)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    answer = json.loads(run("report", results.parent, "--force", "--json").stdout)
    assert str(results.parent / "report.md") in answer["files"]
    several = run("report", results, results.parent)
    assert several.exit_code == 2
    assert "--out DIR" in several.stderr
    folder = results.parent / "both"
    assert run("report", results, results.parent, "--out", folder).exit_code == 0
    assert (folder / "report.html").is_file()


# Doctor


def test_doctor(monkeypatch):
    from pyramidkv.cli import environment
    from pyramidkv.models import hub

    monkeypatch.setattr(hub, "hub_problem", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(environment, "hub_problem", lambda: "HF_HUB_OFFLINE is set")
    monkeypatch.setattr(environment, "model_problem", lambda: None)
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"], found["problems"]) == (0, True, [])
    assert set(found["methods"]) == set(pyramidkv.methods())
    assert {p["name"] for p in found["packages"] if not p["extra"]} >= {"torch", "transformers", "typer"}
    assert found["devices"][0]["device"] == "cpu"
    assert found["attention_kernels"]["prefill"] in {"math", "flash", "efficient", "cudnn"}
    assert found["default_benchmark"]["perplexity"] == ["python-reference"]
    assert found["packed_on_cpu_problem"] is None
    assert "products_on_cpu_problem" in found
    shown = run("doctor")
    assert "can run here" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_doctor_of_a_broken_installation(monkeypatch):
    from pyramidkv.cli import environment

    monkeypatch.setattr(environment, "model_problem", lambda: "the model is gone")
    monkeypatch.setattr(environment, "hub_problem", lambda: None)
    monkeypatch.setattr(environment, "packages", lambda: [environment.Package("torch", "1.0", ">=2.9", "")])
    done = run("doctor")
    assert done.exit_code == 1
    assert "problem: torch 1.0: needs >=2.9" in done.stdout
    assert "problem: the model is gone" in done.stdout


def test_recall_takes_every_amount(byte_model):
    common = ("recall", "-m", byte_model, "--task", "needle", "--context", 400, "--examples", 1, "--json")
    done = run(*common, "--method", "auto", "--share", 0.5, "--bits", 8)
    assert done.exit_code == 0, done.output
    full, packed = json.loads(done.stdout)
    assert full["kv_bytes_share"] == 1 and 0.4 < packed["kv_bytes_share"] <= 0.5 and "bits=8" in packed["setting"]
    by_layer = run(*common, "--method", "auto", "--share", 0.5, "--layers", "0.5,1,1.5")
    assert "layers=" in json.loads(by_layer.stdout)[1]["setting"], by_layer.output
    for options, aware in (((), False), (("--question-aware",), True)):
        rows = json.loads(run(*common, "--method", "snapkv", "--keep", 0.5, *options).stdout)
        assert [row["question_aware"] for row in rows] == [aware, aware]
    assert [r["setting"] for r in json.loads(run(*common, "--method", "snapkv").stdout)[1:]] == [
        f"keep={keep}" for keep in (0.5, 0.25, 0.125)
    ]


def test_calibrate_prints_what_layers_takes(byte_model):
    common = ("-m", byte_model, "--keep", 0.5)
    done = run("calibrate", *common, "--context", 600, "--prompts", 1, "--bits", 8)
    assert done.exit_code == 0, done.output
    layers = done.stdout.strip().splitlines()[-1]
    weights = [float(weight) for weight in layers.split(",")]
    assert len(weights) == 3 and sum(weights) == pytest.approx(3, abs=0.01)
    done = run("plan", byte_model, "--method", "auto", "--bits", 8, "--keep", 0.5, "--layers", layers, "--json")
    kept = [layer["budget_tokens"] for layer in json.loads(done.stdout)["layers"]]
    assert kept == pytest.approx([weight * 6144 / 2 for weight in weights], abs=4)
    assert run("plan", byte_model, "--layers", "1,2").exit_code == 2
    done = run("calibrate", *common, "--context", 600, "--prompts", 1, "--json")
    found = json.loads(done.stdout)["layers"]
    text = ",".join(":".join(map(str, x)) if isinstance(x, list) else str(x) for x in found)
    done = run("plan", byte_model, "--method", "auto", "--share", 0.5, "--layers", text, "--json")
    assert done.exit_code == 0, done.output
