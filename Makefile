# make bench    set up, then print the benchmark's table and write results.jsonl, report.md, report.html, result.png
# make test     set up, then run the everyday tests (under two minutes on two cores)
# make check    what CI runs: tests, slow tests, lint, types, and the tests on the oldest transformers allowed
# make test-gpu the tests that need a CUDA device

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN = $(VENV)/bin
BENCH_ARGS ?=

.PHONY: bench test slow lint oldest check test-gpu clean

bench: $(VENV)/.installed
	$(BIN)/pyramidkv bench $(BENCH_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -q

check: test lint slow oldest

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements.txt -e '.[dev]'
	touch $@

$(OLDEST)/.dev: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.13.0 transformers==5.10.1 -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
