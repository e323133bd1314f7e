"""One replay ahead: the device begins the next step while the host still works on the token of the last one.

`generate()` chooses a token, waits for it, and only then prepares the next forward; the device has nothing to do
meanwhile. A captured step ends by putting its likeliest token where its input lies, so the next replay can start at
once, on a stream of its own. Whether that was right is known when the next forward asks: greedy decoding always does
what was foreseen, sampling often does not, and a wrong guess costs up to one replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FIRST, MOST = 2, 64  # right guesses in a row before running ahead: at first, and at most after wrong ones


class Ahead:
    """A replay that nobody has asked for yet, and whether to start one."""

    def __init__(self) -> None:
        self.running = False
        self._stream: torch.cuda.Stream | None = None  # None: the caller's, on a device without streams
        self._done: torch.cuda.Event | None = None
        self._right = 0
        self._needed = FIRST

    @property
    def pays(self) -> bool:
        """Whether the guesses have been right for long enough."""
        return self._right >= self._needed

    def judge(self, right: bool) -> None:
        """Take note of whether a token was the one foreseen; every wrong run ahead asks for a longer row of them."""
        if not right and self.running:
            self._needed = min(2 * self._needed, MOST)
        self._right = self._right + 1 if right else 0

    def start(self, replay: Callable[[], None], stream: torch.cuda.Stream | None) -> None:
        """Begin a replay on `stream`, behind all that the current stream has been given."""
        self.running, self._stream, self._done = True, stream, None
        if stream is None:
            replay()
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            replay()
            self._done = stream.record_event()

    def join(self) -> None:
        """It was asked for: the current stream goes on behind it, and the host does not wait."""
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)
        self.running = False

    def settle(self) -> None:
        """It was not: wait until the device has ended it."""
        if self.running and self._stream is not None:
            self._stream.synchronize()
        self.running = False
