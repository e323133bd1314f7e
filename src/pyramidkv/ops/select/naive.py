"""The plain torch definition: two sorts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyramidkv.ops.valid import by_head

_LEAST = torch.finfo(torch.float32).min


def select(
    scores: Tensor,
    limits: Sequence[int] | Tensor,
    width: int,
    *,
    recent: int = 0,
    valid: Tensor | None = None,
    finite: bool = False,
) -> Tensor:
    """The slots with the highest scores, in their old order.

    Args:
        scores: (B, H, K), any float dtype; -inf marks a slot that must not be kept, +inf one that must. NaN counts as
            the least finite number.
        limits: tokens that each row may keep, one number a row; or (B, H) int32 on the device of the scores, one
            number a row and head.
        width: slots of the result, at most K and at least the largest number that any row keeps.
        recent: the newest valid slots of each row and head, kept before all others whatever they score.
        valid: (B, K) or (B, H, K) bool, False for slots that must not be kept; None: all are valid.
        finite: take infinite scores for the largest finite ones, so that they mark nothing: only `valid` can then keep
            a slot out, and only `recent` in.

    Returns:
        (B, H, width) int64 indices into K, rising; rows that keep fewer than `width` begin with -1.
        Equal scores are settled in favour of the earlier slot, so that a selection does not depend on the device.
    """
    order = mark(scores, recent=recent, valid=valid, finite=finite).sort(dim=-1, descending=True, stable=True)
    index, best = order.indices[..., :width], order.values[..., :width]
    kept = best > float("-inf")
    if isinstance(limits, Tensor):
        kept &= torch.arange(width, device=scores.device) < limits[..., None]
    elif min(limits) < width:
        kept &= torch.arange(width, device=scores.device) < row_limits(limits, scores.device)[:, None, None]
    return index.masked_fill(~kept, -1).sort(dim=-1).values


def mark(scores: Tensor, *, recent: int = 0, valid: Tensor | None = None, finite: bool = False) -> Tensor:
    """(B, H, K) float32: +inf for what `select` must keep, -inf for what it must not, the scores for the rest."""
    infinity = -_LEAST if finite else float("inf")
    marked = scores.float().nan_to_num(nan=_LEAST, neginf=-infinity, posinf=infinity)
    if valid is None:
        marked[..., max(scores.shape[-1] - recent, 0) :] = float("inf")
        return marked
    # Counted from each row's own end: there may be padding among the last slots.
    valid = by_head(valid)
    newest = valid.flip(-1).cumsum(-1).flip(-1) <= recent
    return marked.masked_fill(newest, float("inf")).masked_fill(~valid, float("-inf"))


def row_limits(limits: Sequence[int], device: torch.device) -> Tensor:
    """One number a row, (B,) int32 on the device."""
    # Not pinned: so small a copy is taken along at once, and new pinned memory would have to wait for the device.
    return torch.tensor(limits, dtype=torch.int32).to(device, non_blocking=True)


def spread(limits: Sequence[int] | Tensor, heads: int, device: torch.device) -> tuple[int, Tensor | None]:
    """Limits as a kernel takes them: one number for all rows, or (B, H) int32 on the device."""
    if isinstance(limits, Tensor):
        return 0, limits
    if min(limits) == max(limits):
        return limits[0], None
    return 0, row_limits(limits, device)[:, None].expand(-1, heads)
