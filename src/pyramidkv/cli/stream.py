"""Text as it is generated, and the time of every token. Knows nothing of compression."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer


@dataclass(frozen=True)
class Generated:
    """One generation."""

    ids: tuple[int, ...]  # new tokens
    text: str
    ttft_seconds: float
    tpot_seconds: float | None  # None for a single token


class _Stream(TextStreamer):  # type: ignore[misc]
    """Hands on text in pieces that are whole characters, and remembers when each token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())  # the token is on the host already: generate() copied it there
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def generate(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    *,
    new_tokens: int,
    past: Any = None,
    show: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Greedy generation of up to `new_tokens` tokens after one prompt, `ids` (1, T); `show` gets the text in pieces.

    With `past`, a cache, the prompt goes behind what that has seen.
    """
    seen = 0 if past is None else past.get_seq_length()
    more = {} if past is None else {"past_key_values": past}
    stream = _Stream(tokenizer, show)
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=ids.new_ones(1, seen + ids.shape[1]),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=stream,
            pad_token_id=0 if pad is None else pad,
            **more,
        )
    new = tuple(made[0, ids.shape[1] :].tolist())
    times = stream.times
    return Generated(
        ids=new,
        text=tokenizer.decode(new, skip_special_tokens=True),
        ttft_seconds=times[0] - start,
        tpot_seconds=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
    )


def first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Index of the first token in which two generations differ; None if they are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
