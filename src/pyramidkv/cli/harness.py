"""`pyramidkv-lm-eval`: hands over to `pyramidkv.lm_eval`, or says in a line what is missing for it."""

from __future__ import annotations

import importlib

from pyramidkv.cli import output


def main() -> None:
    """Entry point of the console script."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        output.error("pyramidkv-lm-eval needs lm-evaluation-harness: pip install 'pyramidkv[lm-eval]'")
        raise SystemExit(2) from error
    importlib.import_module("pyramidkv.lm_eval.__main__").main()
