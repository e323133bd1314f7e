"""The attention of two models, and the sizes that all benchmarks of ops have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RECENT = 32  # newest tokens that are always kept
ROOM = 30  # free slots of the buffers, as in a cache that grows


@dataclass(frozen=True)
class Model:
    """What the attention of a model looks like, and where it is to run."""

    name: str
    heads: int
    kv_heads: int
    size: int  # channels of a head
    rotated: int  # of them, those that a rotation turns
    dtype: torch.dtype
    device: str = "cuda"

    @property
    def vector(self) -> int:
        """Bytes of one head's query, key or value."""
        return self.size * self.dtype.itemsize

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def empty(self, *shape: int) -> Tensor:
        """A buffer in which nothing is written yet: NaN."""
        return torch.full(shape, float("nan"), device=self.device, dtype=self.dtype)

    def int32(self, *numbers: int) -> Tensor:
        """A few numbers on the device."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def below(self, end: int, *shape: int, start: int = 0) -> Tensor:
        """int32 numbers from `start` to `end` - 1."""
        return torch.randint(start, end, shape, dtype=torch.int32, device=self.device)

    def mostly(self, *shape: int) -> Tensor:
        """True, but for one in ten."""
        return torch.rand(shape, device=self.device) > 0.1


PYTHIA = Model("pythia-2.8b", 32, 32, 80, 20, torch.float16)
LLAMA = Model("llama-8b", 32, 8, 128, 128, torch.bfloat16)
MODELS = (PYTHIA, LLAMA)
