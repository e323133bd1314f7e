"""Numbers that the host will need of a device, fetched while both work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ReadBack:
    """A small tensor on its way from its device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        # From a GPU into pinned memory. A copy in any case: what lies where the tensor is may change.
        self._here = tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu", non_blocking=True)
        self._there: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(tensor.device))

    @classmethod
    def together(cls, tensors: Sequence[Tensor | None]) -> list[ReadBack | None]:
        """Of each of several tensors of one device and dtype, in one copy; None where there is none."""
        there = [t for t in tensors if t is not None]
        if not there:
            return [None] * len(tensors)
        whole = cls(torch.cat([t.flatten() for t in there]))
        parts = iter(torch.split(whole._here, [t.numel() for t in there]))
        return [None if t is None else whole._part(next(parts).view(t.shape)) for t in tensors]

    def _part(self, here: Tensor) -> ReadBack:
        part = object.__new__(ReadBack)
        part._here, part._there = here, self._there
        return part

    def get(self) -> Tensor:
        """The tensor on the host, once it is there: waits for what had been launched before it was asked for."""
        if self._there is not None:
            self._there.synchronize()
        return self._here

    def __deepcopy__(self, _: object) -> ReadBack:
        return self  # nothing changes it
