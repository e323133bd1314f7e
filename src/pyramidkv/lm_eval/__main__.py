"""`pyramidkv-lm-eval`: the command line of lm-evaluation-harness, with our model and our tasks.

The harness has no hook for plugins: a model is known to it only once its module is imported, which this does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyramidkv.errors import PyramidKVError

TASKS = Path(__file__).parent / "tasks"


def main() -> None:
    """Hand over to `lm_eval`; its defaults are ours where `with_defaults` says so."""
    from lm_eval.__main__ import cli_evaluate

    import pyramidkv.lm_eval  # noqa: F401  # registers the model

    sys.argv = with_defaults(sys.argv)
    try:
        cli_evaluate()
    except PyramidKVError as error:
        sys.exit(f"Error: {error}")


def with_defaults(arguments: list[str]) -> list[str]:
    """The command line, with our tasks for `--include_path` and "auto" for `--device` unless it says otherwise."""
    if len(arguments) < 3:
        return arguments  # help
    runs = arguments[1] == "run" or arguments[1].startswith("-")
    more: list[str] = []
    for name, value, wanted in (("--include_path", str(TASKS), True), ("--device", "auto", runs)):
        if wanted and not any(a == name or a.startswith(name + "=") for a in arguments):
            more += [name, value]
    return arguments + more


if __name__ == "__main__":
    main()
