"""Streams: one beside the caller's, on which steps run ahead, and on which every other eviction runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ASIDE: dict[torch.device, torch.cuda.Stream] = {}  # one a device: cuBLAS keeps 32 MB for every stream it has seen
LANES = 2


def aside(device: torch.device) -> torch.cuda.Stream | None:
    """The stream of a device on which steps are captured and run ahead; None where there are no streams."""
    if device.type != "cuda":
        return None
    if device not in _ASIDE:
        _ASIDE[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _ASIDE[device]


class Lanes:
    """Work side by side: lane 0 is the caller's stream, lane 1 the one aside. What one does must not touch the other's.

    One row of a few dozen heads does not fill a device, so two layers take little longer than one.
    """

    def __init__(self) -> None:
        self._other: torch.cuda.Stream | None = None  # while the caller's has not waited for it

    def run(self, work: Callable[[], None], lane: int, device: torch.device) -> None:
        """Begin a work, behind all that its lane was given and all that the caller's had been when the lanes parted."""
        stream = aside(device)
        if stream is None:
            work()
            return
        if self._other is None:
            stream.wait_stream(torch.cuda.current_stream(device))
            self._other = stream
        if lane == 0:
            work()
        else:
            with torch.cuda.stream(stream):
                work()

    def join(self) -> None:
        """Have the caller's stream wait for the other; they part again with the next work."""
        if self._other is not None:
            torch.cuda.current_stream(self._other.device).wait_stream(self._other)
            self._other = None
