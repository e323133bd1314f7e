"""Storage in fewer bits: the older slots lie in pages of codes; the newest, and all that is decoded, stay as computed.

Beside its pages (`ops/pages.py`) a layer keeps one bit a token for their positions. The newest slots are a `Storage`.
Seen from outside, the slots of a row and head are in the order of their positions, behind its empty slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyramidkv.ops.bitmap import pack_positions, unpack_positions
from pyramidkv.ops.compact import Slots, compact
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE, key_bytes, value_bytes
from pyramidkv.ops.read_back import ReadBack
from pyramidkv.ops.valid import joined
from pyramidkv.pool import Lease, Pool
from pyramidkv.storage import Spec, Storage


class PackedStorage:
    """A drop-in for `Storage` whose slots, but for the newest at the time of packing, lie in pages."""

    lease: Lease | None = None  # of pages and a bitmap that belong to a pool

    def __init__(self, pages: Pages, bitmap: Tensor, new: Storage, pool: Pool | None = None) -> None:
        self.pages = pages
        self.bitmap = bitmap  # (B, H, tokens / 8 or more) uint8: the positions of what is in pages, one bit a token
        self.new = new
        if pool is not None:
            self.lease = pool.lend_packed(self, pages, bitmap)

    @classmethod
    def gather(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        index: Tensor,
        limits: Sequence[int] | Tensor,
        bits: int,
        pages: int | None = None,
        *,
        recent: int,
        tokens: int,
        room: int,
        padded: bool,
        dtype: torch.dtype | None = None,
        pool: Pool | None = None,
        again: bool = False,
    ) -> PackedStorage | Storage:
        """The slots `index` (B, H, N), rising behind -1s, of (B, H, K, *) tensors; all but the newest are packed.

        Args:
            key, value, positions: all slots; positions below `tokens`, -1 for an empty slot.
            index: the slots to keep, the newest `recent` of each row and head among them.
            limits: how many those are, as `select` was told them.
            bits: of a number in pages; 16 stores it in `dtype`.
            pages: of the heads of a row together, each taking what its slots need; None: what N slots need, in each
                head.
            recent: slots of each row and head that are not packed.
            tokens: real tokens of the longest row.
            room: free slots behind the newest.
            padded: some rows or heads keep fewer than `recent` slots.
            dtype: of what is stored as it is; None: theirs.
            pool: where the buffers come from; None: from torch.
            again: its length will be asked for soon, by another chunk or eviction.

        Returns:
            A plain `Storage` if there is nothing to pack.
        """
        count = index.shape[2] - recent
        newest = Storage.gather(key, value, positions, index[:, :, max(count, 0) :], room, padded, dtype, pool)
        if count <= 0:
            return newest
        if bits == 16:
            key, value = (t.detach().to(newest.dtype) for t in (key, value))
        old = index[:, :, :count]
        found = None if pool is None else pool.take_pages
        packed = Pages.gather(key, value, old, limits, recent, bits, pages, found, again)
        size = *index.shape[:2], -(-tokens // 8)
        bitmap = None if pool is None else pool.take_bitmap(size, index.device)
        if bitmap is None:
            bitmap = torch.empty(size, dtype=torch.uint8, device=index.device)
        pack_positions(positions, old, bitmap)
        return cls(packed, bitmap, newest, pool)

    @property
    def newest(self) -> Storage:
        """What new tokens are written into."""
        return self.new

    @property
    def length(self) -> int:
        """Slots in use of each row and head, empty ones included."""
        return self.pages.slots + self.new.length

    @property
    def padded(self) -> bool:
        """Some slot in use may be empty."""
        return True

    @property
    def positions(self) -> Tensor:
        """(B, H, length) int32; -1 for an empty slot."""
        old = unpack_positions(self.bitmap, self.pages.slots)
        return torch.cat([old, self.new.positions[:, :, : self.new.length]], dim=2)

    @property
    def spec(self) -> Spec:
        return self.new.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: codes, scales, zero points, the bitmap, the layout of pages, and the newest slots."""
        return self.new.nbytes + self.pages.nbytes + self.bitmap.untyped_storage().nbytes()

    def view(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values in use, unpacked: a copy, in `dtype` or that of the newest."""
        return self.pages.followed_by(self.new.view(dtype))

    def followed_by(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values in use, unpacked, and (B, H, T, *) new ones behind them; in the dtype of these."""
        return self.pages.followed_by(self.new.view(key.dtype), (key, value))

    def valid(self) -> Tensor:
        """(B, length) bool, False for empty slots, or (B, H, length) where heads keep unequal numbers."""
        new = self.new.valid()
        old = self.pages.valid(self.new.length if new is None else 0)
        if self.pages.even:
            old = old[:, 0]
        return old if new is None else joined(old, new)

    def widen(self, tokens: int) -> None:
        """Have slots and bits for evictions to come, so that these can do the same again and again.

        When unpacked, slots for a few more pages of a head; and in the bitmap a bit for each of so many tokens, if need
        be for twice as many as it has.
        """
        self.pages = self.pages.with_spare()
        missing = -(-tokens // 8) - self.bitmap.shape[2]
        if missing <= 0:
            return
        width = 1 << (self.bitmap.shape[2] + missing - 1).bit_length()
        self.bitmap = torch.nn.functional.pad(self.bitmap, (0, width - self.bitmap.shape[2]))
        if self.lease is not None:
            self.lease = self.lease.instead(self, (self.pages, self.bitmap))

    def has_room(self, kept: int, pages: int | None, recent: int) -> bool:
        """Whether `compact` could keep up to `kept` slots of each head, `pages` of a row if that is not None."""
        old, shape = kept - recent, self.pages.shape
        if old <= 0 or shape.even != (pages is None) or self.new.capacity < recent:
            return False
        shape = shape._replace(pages=shape.heads * -(-old // PAGE) if pages is None else pages)
        return shape.pages > 0 and self.pages.serves(shape, self.spec.rows)

    def compact(
        self, slots: Slots, index: Tensor, limits: Sequence[int] | Tensor, pages: int | None, recent: int
    ) -> None:
        """Write the slots `index` of what was unpacked where all of it lies, if it `has_room`; `cut` takes note of it.

        The arguments are those of `gather`. What the host knows is left as it was: this is work on the device alone.
        """
        key, value, positions = slots
        old = index[:, :, :-recent] if recent else index
        compact(slots, index[:, :, old.shape[2] :], self.new.buffers())
        Pages.gather(key, value, old, limits, recent, self.pages.bits, pages, lambda *_: self.pages)
        pack_positions(positions, old, self.bitmap)

    def cut(self, recent: int, padded: bool, asked: ReadBack | None = None) -> None:
        """Take note of what `compact` has written; fewer than `recent` slots of a head are newest ones if `padded`.

        For `asked` see `Pages.written_over`.
        """
        self.new.cut(recent, padded)
        self.pages = self.pages.written_over(asked)

    def append(self, key: Tensor, value: Tensor, positions: Tensor | int, room: int) -> None:
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
        bitmap = self.bitmap.index_select(0, index.to(self.bitmap.device))
        return PackedStorage(self.pages.rows(index), bitmap, self.new.rows(index))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lease"}  # a copy owns what it holds


def packed_bytes(
    spec: Spec, kept: int, bits: int, pages: int | None = None, *, recent: int, tokens: int, room: int
) -> int:
    """Bytes of a layer that holds `kept` of `tokens` tokens a row, as `PackedStorage.gather` stores them."""
    old = kept - recent
    if old <= 0:
        return spec.slot_bytes * (kept + room)
    page = key_bytes(spec.key_width, bits, spec.itemsize) + value_bytes(spec.value_width, bits, spec.itemsize)
    layout = spec.heads * (3 * 4 + -(-tokens // 8))
    count = spec.heads * -(-old // PAGE) if pages is None else pages
    return spec.slot_bytes * (recent + room) + spec.rows * (count * page + layout)
