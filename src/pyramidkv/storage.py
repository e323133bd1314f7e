"""The buffers of one layer: a fixed number of slots a row and head, filled from the front.

A slot holds one token's key, value and position. A row with fewer tokens than the others begins with empty slots
(position -1), so that new tokens go to the same slot in every row. Nothing here decides what to keep, and no gradient
flows through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyramidkv.ops.append import append
from pyramidkv.ops.compact import compact
from pyramidkv.ops.split_attention import wants_tokens
from pyramidkv.pool import Lease, Pool

POSITION_BYTES = 4  # int32


class Spec(NamedTuple):
    """What the slots of a layer are: everything about its buffers but their number."""

    rows: int
    heads: int
    key_width: int
    value_width: int
    itemsize: int  # bytes of a number, unpacked

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of every row in an uncompressed cache."""
        return self.rows * self.heads * (self.key_width + self.value_width) * self.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of every row: key, value and position."""
        return self.token_bytes + self.rows * self.heads * POSITION_BYTES


class Storage:
    """Keys (B, H, C, D), values (B, H, C, Dv) and positions (B, H, C) int32 of capacity C, `length` slots in use."""

    lease: Lease | None = None  # of buffers that belong to a pool

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, length: int, padded: bool) -> None:
        self.keys = keys
        self.values = values
        self.positions = positions
        self.length = length
        self.padded = padded  # some slot in use may be empty
        self.appended = 0  # slots filled since the buffers were made
        self.holes = False  # some empty slot may lie between two tokens
        self.start: Tensor | None = None  # (B, H) int32: empty slots at the front; None: none

    @classmethod
    def allocate(
        cls,
        like_key: Tensor,
        like_value: Tensor,
        capacity: int,
        padded: bool,
        dtype: torch.dtype | None = None,
        pool: Pool | None = None,
    ) -> Storage:
        """Empty buffers for rows and heads of (B, H, *, D) keys and (B, H, *, Dv) values, in `dtype` or theirs.

        From `pool` if it has some that serve, which may have more than `capacity` slots.
        """
        dtype, device = dtype or like_key.dtype, like_key.device
        key, value = (torch.Size((*t.shape[:2], capacity, t.shape[-1])) for t in (like_key, like_value))
        found = None if pool is None else pool.take(key, value, dtype, device)
        if found is None:
            found = (
                torch.empty(key, dtype=dtype, device=device),
                torch.empty(value, dtype=dtype, device=device),
                torch.full(key[:3], -1, dtype=torch.int32, device=device),
            )
        new = cls(*found, 0, padded)
        if pool is not None:
            new.lease = pool.lend(new, found)
        return new

    @classmethod
    def gather(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        index: Tensor,
        room: int,
        padded: bool,
        dtype: torch.dtype | None = None,
        pool: Pool | None = None,
    ) -> Storage:
        """The slots `index` (B, H, N), -1 for an empty one, of (B, H, K, *) tensors, and `room` free slots."""
        kept = index.shape[-1]
        new = cls.allocate(key, value, kept + room, padded, dtype, pool)
        compact((key.detach(), value.detach(), positions), index, new.buffers())
        new.length = kept
        if padded:
            new.start = (index < 0).sum(-1, dtype=torch.int32)
        return new

    @classmethod
    def whole(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        room: int,
        dtype: torch.dtype | None = None,
        pool: Pool | None = None,
    ) -> Storage:
        """All of (B, H, K, *), and `room` free slots."""
        new = cls.allocate(key, value, key.shape[2] + room, padded=False, dtype=dtype, pool=pool)
        new.append(key, value, positions, room)
        new.appended = 0
        return new

    @property
    def spec(self) -> Spec:
        rows, heads, _, width = self.keys.shape
        return Spec(rows, heads, width, self.values.shape[-1], self.keys.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def capacity(self) -> int:
        """Slots allocated for each row and head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the buffers, positions included."""
        return sum(t.untyped_storage().nbytes() for t in self.buffers())

    def view(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values in use; no copy, unless `dtype` is another than theirs."""
        key, value = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        return (key, value) if dtype is None else (key.to(dtype), value.to(dtype))

    def followed_by(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values in use, and (B, H, T, *) new ones behind them; in the dtype of these."""
        by_token = not self.padded and wants_tokens(key)
        return append(self.view(key.dtype), (key, value), by_token=by_token)

    def valid(self) -> Tensor | None:
        """(B, length) bool, False for empty slots; None when there can be none."""
        return self.positions[:, 0, : self.length] >= 0 if self.padded else None

    @property
    def newest(self) -> Storage:
        """What new tokens are written into: all of it."""
        return self

    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions, free slots too."""
        return self.keys, self.values, self.positions

    def append(self, key: Tensor, value: Tensor, positions: Tensor | int, room: int) -> None:
        """Put (B, H, T, *) behind the slots in use, one position if all are alike; out of capacity, grow.

        The new capacity leaves `room` free slots, or as many as were appended so far: few reallocations in all.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            self._grow(end + max(room, self.appended))
        self.keys[:, :, self.length : end] = key.detach()
        self.values[:, :, self.length : end] = value.detach()
        self.positions[:, :, self.length : end] = positions
        self.length = end
        self.appended += key.shape[2]

    def compact(self, index: Tensor) -> None:
        """Move the slots `index` (B, H, N) to the front; -1 is for an empty one. `cut` frees the others.

        Buffers stay where they are: a captured graph holds their addresses.
        """
        kept = index.shape[-1]
        keys, values, positions = (t.new_empty(*t.shape[:2], kept, *t.shape[3:]) for t in self.buffers())
        compact(self.buffers(), index, (keys, values, positions))  # not at once: a slot may lie where another is to go
        for buffer, part in zip(self.buffers(), (keys, values, positions), strict=True):
            buffer[:, :, :kept] = part

    def cut(self, length: int, padded: bool) -> None:
        """Free all slots behind the first `length`, of which some are empty if `padded`."""
        self.length, self.padded, self.holes, self.start = length, padded, False, None

    def crop(self, slots: int) -> None:
        """Free the newest `slots` slots in use."""
        self.length -= slots

    def hide_newest(self, rows: Tensor) -> None:
        """Make the newest slot empty in the rows where (B,) bool is True."""
        self.padded = self.holes = True
        self.positions[:, :, self.length - 1].masked_fill_(rows[:, None], -1)

    def rows(self, index: Tensor) -> Storage:
        """A copy with the rows `index` (N,), in that order; rows may repeat (beam search) or be left out."""
        keys, values, positions = (t.index_select(0, index.to(t.device)) for t in self.buffers())
        new = Storage(keys, values, positions, self.length, self.padded)
        new.holes, new.appended = self.holes, self.appended
        if self.start is not None:
            new.start = self.start.index_select(0, index.to(self.start.device))
        return new

    def _grow(self, capacity: int) -> None:
        for name in ("keys", "values", "positions"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)
        if self.lease is not None:
            self.lease = self.lease.instead(self, self.buffers())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lease"}  # a copy owns its buffers
