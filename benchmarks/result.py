"""The result of a script here: a JSON file whose head says what ran, where and when, kept whole as parts come and fail.

A script makes one `Result`, adds rows to its parts as they are measured, and ends with `finish`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pyramidkv.evaluate import origin


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that every script has: `--out FILE`."""
    name = Path(sys.argv[0]).stem.removesuffix("_gpu").replace("_", "-") + ".json"
    default = Path(os.environ.get("OUT", ".")) / name
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help=f"results, replaced; {default}")


class Result:
    """What a script has measured so far: `about` the run, and parts, lists of rows.

    Args:
        out: the file, written anew with every row.
        device: where it runs.
        about: further facts for the head: the model, lengths, units.
        writes: whether this process writes and prints; with several, only one does.
    """

    def __init__(self, out: Path, device: torch.device | str = "cuda", *, writes: bool = True, **about: Any) -> None:
        self.out, self.writes = out, writes
        self.data: dict[str, Any] = {
            "command": origin.command(["python", sys.argv[0]], [sys.argv[0]]),
            "started_utc": origin.now_utc(),
            "device": origin.device_name(torch.device(device)),
            "versions": origin.versions(),
            **about,
        }

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row to a part, and write the file."""
        self.data.setdefault(part, []).append(row)
        self.write()

    def write(self) -> None:
        """Write what there is."""
        if self.writes:
            self.out.write_text(json.dumps(self.data, indent=1) + "\n")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Do something that may fail: its error is kept and printed, and the script goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.add("failed", {"what": what, "error": f"{type(error).__name__}: {lines[0][:300]}"})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def finish(self, *parts: str) -> None:
        """Write, print the parts as tables, and exit with 1 if something failed."""
        self.write()
        failed = self.data.get("failed", [])
        if self.writes:
            for part in (*parts, "failed"):
                if self.data.get(part):
                    print(f"\n{part}\n{table(self.data[part])}", flush=True)
            print(f"\n{self.out}: {self.data['device']}, {self.data['versions']}", flush=True)
        if failed:
            sys.exit(1)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a part, a column a name, in the order in which names appear; of repeats the median.

    What is longer than a few numbers is in the file alone.
    """
    lines = [{name: text for name, value in row.items() if (text := _cell(value)) is not None} for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    cells = [names, *([line.get(name, "") for name in names] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str | None:
    """A value in a few letters; None if it needs more."""
    if isinstance(value, dict):
        return _cell(value.get("median"))
    if isinstance(value, (list, tuple)):
        few = [_cell(part) for part in value[:9]]
        return " ".join(str(part) for part in few) if len(value) < 9 and None not in few else None
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return None if value is None else str(value)
