"""The plain torch definition."""

from __future__ import annotations

from torch import Tensor


def append(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], *, by_token: bool = False, front: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values with new ones behind them.

    Args:
        old: keys (B, H, P, D) and values (B, H, P, Dv).
        new: keys (B, H, Q, D) and values (B, H, Q, Dv), of the same dtype.
        by_token: in memory the result is (B, N, H, D), so that the strides of a row say nothing of how many tokens
            there are; else (B, H, N, D).
        front: slots before them all, yet to be written.

    Returns:
        Keys (B, H, N, D) and values (B, H, N, Dv), copies, where N is front + P + Q.
    """
    key, value = (_joined(a, b, by_token, front) for a, b in zip(old, new, strict=True))
    return key, value


def _joined(old: Tensor, new: Tensor, by_token: bool, front: int) -> Tensor:
    past = old.shape[2]
    whole = room(new, front + past + new.shape[2], by_token)
    whole[:, :, front : front + past] = old
    whole[:, :, front + past :] = new
    return whole


def room(like: Tensor, slots: int, by_token: bool) -> Tensor:
    """(B, H, slots, *), in memory token by token or head by head."""
    rows, heads, _, size = like.shape
    if by_token:
        return like.new_empty(rows, slots, heads, size).transpose(1, 2)
    return like.new_empty(rows, heads, slots, size)
