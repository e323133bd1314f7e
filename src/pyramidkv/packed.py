"""Storage in fewer bits: the older slots as codes, the newest and all that is decoded as the model computes them.

The same slots in the same order as `Storage`, which holds the newest part; only the number of bits differs. Groups of
keys are counted from the newest packed slot backwards, so a row is packed the same way in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyramidkv.ops.bitmap import pack_positions, unpack_positions
from pyramidkv.ops.quantize import (
    GROUP,
    Codes,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
    value_group,
)
from pyramidkv.storage import Spec, Storage


class _Old(NamedTuple):
    """The packed slots of one layer, oldest first."""

    keys: Codes
    values: Codes
    bitmap: Tensor  # (B, H, tokens / 8) uint8: their positions
    empty: Tensor  # (B,) int32: empty slots at the front of each row
    slots: int


class PackedStorage:
    """A drop-in for `Storage` whose slots, but for the newest `recent` at the time of packing, take `bits` bits."""

    def __init__(self, old: _Old, new: Storage) -> None:
        self.old = old
        self.new = new

    @classmethod
    def pack(cls, full: Storage, *, bits: int, recent: int, tokens: int, room: int) -> PackedStorage | Storage:
        """Pack all but the newest `recent` slots of `full`; positions are below `tokens`.

        If that leaves nothing to pack, they are stored as they are.
        """
        count = full.length - recent
        key, value = full.view()
        positions = full.positions[:, :, : full.length]
        if count <= 0:
            plain = Storage.whole(key, value, positions, room)
            plain.padded = full.padded
            return plain
        front = -count % GROUP  # empty slots that make the first group whole
        old_key, old_value, old_positions = (t[:, :, :count] for t in (key, value, positions))
        shown = pad(old_positions, (front, 0), value=-1)
        old = _Old(
            quantize_keys(pad(old_key, (0, 0, front, 0)), bits, shown >= 0),
            quantize_values(pad(old_value, (0, 0, front, 0)), bits),
            pack_positions(old_positions, tokens),
            (shown[:, 0] < 0).sum(-1, dtype=torch.int32),
            front + count,
        )
        new = Storage.whole(key[:, :, count:], value[:, :, count:], positions[:, :, count:], room)
        new.padded = full.padded
        return cls(old, new)

    @property
    def length(self) -> int:
        """Slots in use, empty ones included."""
        return self.old.slots + self.new.length

    @property
    def padded(self) -> bool:
        """Some slot in use may be empty."""
        return True

    @property
    def positions(self) -> Tensor:
        """(B, H, length) int32; -1 for an empty slot."""
        old = unpack_positions(self.old.bitmap, self.old.slots)
        return torch.cat([old, self.new.positions[:, :, : self.new.length]], dim=2)

    @property
    def spec(self) -> Spec:
        return self.new.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: codes, scales, zero points, bitmap, and the newest slots."""
        tensors = (*self.old.keys.tensors(), *self.old.values.tensors(), self.old.bitmap, self.old.empty)
        return self.new.nbytes + sum(t.untyped_storage().nbytes() for t in tensors)

    def view(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values in use, unpacked: a copy, in `dtype` or that of the newest."""
        key, value = self.new.view(dtype)
        old_key = dequantize_keys(self.old.keys, key.dtype)
        old_value = dequantize_values(self.old.values, value.dtype)
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)

    def valid(self) -> Tensor:
        """(B, length) bool, False for empty slots."""
        old = torch.arange(self.old.slots, device=self.old.empty.device) >= self.old.empty[:, None]
        new = self.new.valid()
        if new is None:
            new = old.new_ones(old.shape[0], self.new.length)
        return torch.cat([old, new], dim=1)

    def append(self, key: Tensor, value: Tensor, positions: Tensor, room: int) -> None:
        """Put (B, H, T, *) behind the slots in use, unpacked."""
        self.new.append(key, value, positions, room)

    def hide_newest(self, rows: Tensor) -> None:
        """Make the newest slot empty in the rows where (B,) bool is True."""
        self.new.hide_newest(rows)

    def rows(self, index: Tensor) -> PackedStorage:
        """A copy with the rows `index` (N,), in that order."""
        old = self.old
        bitmap, empty = (t.index_select(0, index.to(t.device)) for t in (old.bitmap, old.empty))
        return PackedStorage(
            _Old(old.keys.rows(index), old.values.rows(index), bitmap, empty, old.slots), self.new.rows(index)
        )


def packed_bytes(spec: Spec, kept: int, *, bits: int, recent: int, tokens: int, room: int) -> int:
    """Bytes of a layer that holds `kept` of `tokens` tokens of each row, as `PackedStorage.pack` stores them."""
    count = kept - recent
    if bits == 16 or count <= 0:
        return spec.slot_bytes * (kept + room)
    slots = count + -count % GROUP
    codes = slots * (spec.key_width + spec.value_width) * bits // 8
    scales = 4 * (slots // GROUP * spec.key_width + slots * spec.value_width // value_group(spec.value_width))
    head = codes + scales + -(-tokens // 8)
    return spec.rows * (spec.heads * head + 4) + spec.slot_bytes * (recent + room)
