"""Storage in fewer bits: tiers of pages for the older slots; the newest, and all that is decoded, stay as computed.

A tier is what is kept at one precision, in pages (`ops/pages.py`) and with one bit a token for its positions. The
newest slots are a `Storage`. Seen from outside, the slots of a row and head are in the order of their positions, behind
its empty slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyramidkv.ops.bitmap import pack_positions, unpack_positions
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE, key_bytes, value_bytes
from pyramidkv.ops.valid import joined
from pyramidkv.storage import Spec, Storage


class Level(NamedTuple):
    """What a tier is to hold of the slots of each row and head that are not the newest.

    Where heads differ, by `limits` or because the index of slots gives them unequal numbers, `pages` must be given.
    """

    key_bits: int
    value_bits: int
    slots: int | None = None  # the most that any head may have; None: all that the levels before have left
    limits: Tensor | None = None  # (B, H) integers, each at most `slots`: what each row and head may have
    pages: int | None = None  # of the heads of a row together; None: what the slots need, alike in each head


class Tier(NamedTuple):
    """What is kept at one precision."""

    pages: Pages
    bitmap: Tensor  # (B, H, tokens / 8) uint8: the positions, one bit a token

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return self.pages.tensors() | {"bitmap": self.bitmap}

    def positions(self) -> Tensor:
        """(B, H, 64 * most) int32, rising; -1 for an empty slot."""
        return unpack_positions(self.bitmap, self.pages.most * PAGE)

    def rows(self, index: Tensor) -> Tier:
        """A copy with the rows `index` (N,), in that order."""
        return Tier(self.pages.rows(index), self.bitmap.index_select(0, index.to(self.bitmap.device)))


class PackedStorage:
    """A drop-in for `Storage` whose slots, but for the newest at the time of packing, lie in tiers of fewer bits."""

    def __init__(self, tiers: tuple[Tier, ...], new: Storage) -> None:
        self.tiers = tiers
        self.new = new

    @classmethod
    def gather(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        index: Tensor,
        levels: Sequence[Level],
        *,
        recent: int,
        tokens: int,
        room: int,
        padded: bool,
        scores: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PackedStorage | Storage:
        """The slots `index` (B, H, N), rising behind -1s, of (B, H, K, *) tensors; all but the newest are packed.

        Args:
            key, value, positions: all slots; positions below `tokens`, -1 for an empty slot.
            index: the slots to keep, the newest `recent` of each row and head among them.
            levels: what goes where, the best slots first.
            recent: slots of each row and head that are not packed.
            tokens: real tokens of the longest row.
            room: free slots behind the newest.
            padded: some rows or heads keep fewer than `recent` slots.
            scores: (B, H, K); with several levels, by which the slots are ranked, infinite ones and NaN as by `select`.
            dtype: of what is stored as it is; None: theirs.

        Returns:
            A plain `Storage` if there is nothing to pack.
        """
        count = index.shape[2] - recent
        newest = Storage.gather(key, value, positions, index[:, :, max(count, 0) :], room, padded, dtype)
        if count <= 0:
            return newest
        stored = newest.dtype
        tiers = []
        for level, chosen in zip(levels, _split(index[:, :, :count], levels, scores), strict=True):
            if chosen.shape[2] == 0:
                continue
            pages = Pages.gather(
                key.detach().to(stored) if level.key_bits == 16 else key,
                value.detach().to(stored) if level.value_bits == 16 else value,
                chosen,
                level.key_bits,
                level.value_bits,
                level.pages,
            )
            tiers.append(Tier(pages, pack_positions(positions, chosen, tokens)))
        return cls(tuple(tiers), newest)

    @property
    def newest(self) -> Storage:
        """What new tokens are written into."""
        return self.new

    @property
    def length(self) -> int:
        """Slots in use of each row and head, empty ones included."""
        return sum(tier.pages.most for tier in self.tiers) * PAGE + self.new.length

    @property
    def padded(self) -> bool:
        """Some slot in use may be empty."""
        return True

    @property
    def positions(self) -> Tensor:
        """(B, H, length) int32; -1 for an empty slot."""
        parts = [tier.positions() for tier in self.tiers]
        if len(parts) > 1:
            parts = [torch.cat(parts, dim=2).sort(dim=-1).values]
        return torch.cat([*parts, self.new.positions[:, :, : self.new.length]], dim=2)

    @property
    def spec(self) -> Spec:
        return self.new.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: codes, scales, zero points, bitmaps, the layout of pages, and the newest slots."""
        return self.new.nbytes + sum(
            t.untyped_storage().nbytes() for tier in self.tiers for t in tier.tensors().values()
        )

    def view(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values in use, unpacked: a copy, in `dtype` or that of the newest."""
        key, value = self.new.view(dtype)
        parts = [tier.pages.unpack(key.dtype) for tier in self.tiers]
        if len(parts) > 1:
            order = torch.cat([tier.positions() for tier in self.tiers], dim=2).argsort(dim=-1)[..., None]
            both = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
            parts = [tuple(x.gather(2, order.expand(-1, -1, -1, x.shape[-1])) for x in both)]  # type: ignore[list-item]
        (old_key, old_value), *_ = parts
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)

    def valid(self) -> Tensor:
        """(B, length) bool, False for empty slots, or (B, H, length) where heads keep unequal numbers."""
        parts = [tier.pages.valid() for tier in self.tiers]
        if all(tier.pages.even for tier in self.tiers):
            parts = [part[:, 0] for part in parts]
        old = torch.cat(parts, dim=-1)
        if len(parts) > 1:
            old = old.int().sort(dim=-1).values.bool()
        new = self.new.valid()
        if new is None:
            new = old.new_ones(old.shape[0], self.new.length)
        return joined(old, new)

    def append(self, key: Tensor, value: Tensor, positions: Tensor, room: int) -> None:
        """Put (B, H, T, *) behind the slots in use, unpacked."""
        self.new.append(key, value, positions, room)

    def crop(self, slots: int) -> None:
        """Free the newest `slots` slots in use; they are not among the packed ones."""
        self.new.crop(slots)

    def hide_newest(self, rows: Tensor) -> None:
        """Make the newest slot empty in the rows where (B,) bool is True."""
        self.new.hide_newest(rows)

    def rows(self, index: Tensor) -> PackedStorage:
        """A copy with the rows `index` (N,), in that order."""
        return PackedStorage(tuple(tier.rows(index) for tier in self.tiers), self.new.rows(index))


def _split(index: Tensor, levels: Sequence[Level], scores: Tensor | None) -> list[Tensor]:
    """The slots `index` (B, H, N) of each level, (B, H, *) with -1 for none; those with the highest scores first."""
    if len(levels) == 1 and levels[0].slots is None and levels[0].limits is None:
        return [index]
    uneven = False
    for level in levels:
        uneven |= level.limits is not None
        if uneven and level.pages is None:
            raise ValueError("pages=None: where heads have limits of their own, their sum is needed from there on")
    if scores is None:
        raise ValueError("scores=None: what goes to which level is decided by the scores of the slots")
    worst = torch.finfo(torch.float32).min
    worth = scores.gather(2, index.clamp(min=0)).float().nan_to_num(nan=worst, neginf=worst)
    worth = worth.masked_fill(index < 0, float("-inf"))
    index = index.gather(2, worth.sort(dim=-1, descending=True, stable=True).indices)
    parts = []
    taken: int | Tensor = 0  # of each head, by the levels before; (B, H, 1) where heads differ
    for level in levels:
        slots = index.shape[2] - (taken if isinstance(taken, int) else 0) if level.slots is None else level.slots
        place = torch.arange(slots, device=index.device)
        there = (place + taken < index.shape[2]).expand(*index.shape[:2], slots)
        if level.limits is not None:
            there = there & (place < level.limits[..., None])
        place = (place + taken).clamp(max=index.shape[2] - 1).expand(there.shape)
        part = index.gather(2, place).masked_fill(~there, -1)
        parts.append(part.sort(dim=-1).values)
        taken = taken + (slots if level.limits is None else level.limits[..., None])
    return parts


def packed_bytes(spec: Spec, kept: int, levels: Sequence[Level], *, recent: int, tokens: int, room: int) -> int:
    """Bytes of a layer that holds `kept` of `tokens` tokens a row, as `PackedStorage.gather` stores them."""
    left = kept - recent
    if not levels or left <= 0:
        return spec.slot_bytes * (kept + room)
    size = spec.slot_bytes * (recent + room)
    for level in levels:
        slots = left if level.slots is None else min(level.slots, left)
        if slots == 0:
            continue
        left -= slots
        page = key_bytes(spec.key_width, level.key_bits, spec.itemsize)
        page += value_bytes(spec.value_width, level.value_bits, spec.itemsize)
        layout = spec.heads * (3 * 4 + -(-tokens // 8))
        pages = spec.heads * -(-slots // PAGE) if level.pages is None else level.pages
        size += spec.rows * (pages * page + layout)
    return size
