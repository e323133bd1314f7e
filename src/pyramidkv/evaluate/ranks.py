"""Processes that share a measurement, as `torchrun` and `accelerate launch` start them: each takes every n-th piece.

Every process holds the whole model. The first one writes and prints; what the others measured comes to it as records,
dealt together again into those that one process would have made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pyramidkv.errors import ConfigError, PyramidKVError
from pyramidkv.evaluate.schema import Perplexity, Recall

T = TypeVar("T")
R = TypeVar("R", bound=Perplexity | Recall)

_COLUMNS: dict[type, tuple[str, ...]] = {Perplexity: ("chunk_nll",), Recall: ("correct", "probes")}  # a value a piece
PATIENCE = timedelta(hours=2)  # for the others: one rank measures time alone


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a measurement."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mine(self, pieces: Sequence[T]) -> Sequence[T]:
        """The pieces that this process measures."""
        return pieces[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank; waits for all of them."""
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def same(self, what: str, value: T) -> T:
        """`value`, if it is that of every process; else raises `PyramidKVError`."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                raise PyramidKVError(f"{what}: rank {self.rank} has {value!r} and rank {rank} has {other!r}")
        return value


def from_environment() -> Ranks:
    """As the launcher says it; one process alone where there is none. Raises `ConfigError` for half of a launcher."""
    count, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise ConfigError(f"WORLD_SIZE={count!r}, RANK={rank!r}: numbers that torchrun or accelerate launch would set")
    if int(count) > 1 and "RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={count}: set, but not RANK; start with torchrun or accelerate launch")
    return Ranks(int(rank), int(count))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among the others, connected to them (gloo: only records travel) while open.

    With GPUs, each process of a host takes its own; `device` is what the user asked for. Raises `ConfigError` if there
    are too few, or if all of them were told to take the same one.
    """
    ranks = from_environment()
    if ranks.count == 1:
        yield ranks
        return
    if device.startswith("cuda:"):
        raise ConfigError(f"device={device!r}: {ranks.count} processes would share it; 'cuda' gives each its own")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", ranks.rank)), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"device={device!r}: more processes on this host than its {gpus} GPUs; start {gpus}")
        torch.cuda.set_device(local)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        if mine:
            dist.destroy_process_group()


def merge(parts: Sequence[Sequence[R]]) -> list[R]:
    """The records that one process would have made of all pieces, from those that every rank made of its own."""
    made = []
    for records in zip(*(part for part in parts if part), strict=True):
        columns = {name: _dealt([getattr(r, name) for r in records]) for name in _COLUMNS[type(records[0])]}
        pieces = max(len(column) for column in columns.values())
        # The last piece's record says what was kept, as it does in one process.
        made.append(replace(records[(pieces - 1) % len(records)], **columns))
    return made


def _dealt(columns: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """One value from each in turn, as they were dealt out."""
    count = len(columns)
    return tuple(columns[i % count][i // count] for i in range(sum(len(column) for column in columns)))
