"""Where a measurement comes from: the command, the time, the device and the versions. Every record begins with it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch

import pyramidkv
from pyramidkv.evaluate.ranks import from_environment


def command(alone: Sequence[str], several: Sequence[str]) -> str:
    """The command that is running, as a shell would take it.

    `alone` is what stands before the arguments; `several`, behind `torchrun`, if several processes run it.
    """
    count = from_environment().count
    if count > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        hosts = ["--nnodes", str(count // here)] if count > here else []
        alone = ["torchrun", *hosts, "--nproc-per-node", str(here), *several]
    return shlex.join([*alone, *sys.argv[1:]])


def now_utc() -> str:
    """The time, to a second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions(packages: Iterable[str] = ("torch", "transformers")) -> dict[str, str]:
    """Of Python, of this package and of others."""
    return {
        "python": platform.python_version(),
        "pyramidkv": pyramidkv.__version__,
        **{name: metadata.version(name) for name in packages},
    }


def device_name(device: torch.device) -> str:
    """The name of a device as its maker gives it, with the number of threads used on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
