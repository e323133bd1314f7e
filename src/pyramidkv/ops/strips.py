"""Codes as a CPU reads them fastest: in strips that share a scale, which lies with the zero point at their end.

A strip is a channel of a page of keys, for its 64 tokens, or a token's group of channels of values. That is what
torch's quantized embedding bags sum, each strip times a weight, in float32 and straight from the codes. The product of
a page's keys with a query is a sum of its channels, weighted by the query; the page's share of the attention is a sum
of its tokens, weighted by their probabilities. So one call reads the keys of all pages, another their values, and no
number is ever written out.

These are the bytes of `Codes` in another order. Attention on a CPU reads this one; `plain` gives the other, which is
that of files and GPUs, and `put` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pyramidkv.ops import kernels
from pyramidkv.ops.quantize import PAGE, Codes, pack_codes, unpack_codes, value_group

TAIL = 4  # bytes: a scale and a zero point, float16

# Part of torch so that it can serve tables of embeddings in few bits. It promises them to nobody.
_BAGS = {
    bits: getattr(getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets", None), "default", None)
    for bits, name in ((8, "byte"), (4, "4bit"), (2, "2bit"))
}


def why_no_bags() -> str | None:
    """Why torch can't read strips; None if it can."""
    return f"torch {torch.__version__} has no quantized embedding bags" if None in _BAGS.values() else None


def why_not(sizes: tuple[int, int], bits: int, device: torch.device) -> str | None:
    """Why pages of keys and values of so many channels are no strips; None if they are."""
    if device.type != "cpu" or kernels.why_no_triton(device) is None:
        return f"the tensors are on {device.type}: strips are for CPUs"
    if bits == 16:
        return "numbers in 16 bits have no scales"
    if value_group(sizes[1]) * bits % 16:
        return f"{value_group(sizes[1])} channels of {bits} bits fill no whole pairs of bytes"
    return why_no_bags()


@dataclass(frozen=True)
class Strips:
    """Pages of strips, of keys or of values; a byte has the codes of consecutive numbers, that of the first lowest."""

    codes: Tensor  # (B, P, S, width * bits / 8 + 4) uint8: S = D of keys, 64 * groups of values, group by group
    bits: int
    of_keys: bool

    @classmethod
    def room(cls, rows: int, pages: int, sizes: tuple[int, int], bits: int) -> tuple[Strips, Strips]:
        """Pages of keys and of values yet to be written."""
        group = value_group(sizes[1])
        shapes = (sizes[0], PAGE), (PAGE * (sizes[1] // group), group)
        key, value = (
            torch.empty(rows, pages, count, width * bits // 8 + TAIL, dtype=torch.uint8) for count, width in shapes
        )
        return cls(key, bits, True), cls(value, bits, False)

    @property
    def width(self) -> int:
        """Numbers in a strip: tokens of keys, channels of values."""
        return (self.codes.shape[-1] - TAIL) * 8 // self.bits

    @property
    def channels(self) -> int:
        """Of a key or a value."""
        count = self.codes.shape[-2]
        return count if self.of_keys else count // PAGE * self.width

    def tensors(self) -> dict[str, Tensor]:
        """The tensor there is, by name."""
        return {"codes": self.codes}

    def each(self, change: Callable[[Tensor], Tensor]) -> Strips:
        """The same with the tensor changed."""
        return replace(self, codes=change(self.codes))

    def rows(self, index: Tensor) -> Strips:
        """The rows `index` (N,) of the batch."""
        return self.each(lambda t: t.index_select(0, index.to(t.device)))

    def put(self, codes: Codes) -> None:
        """Write the same keys or values (B, P', ...) into the first P' pages."""
        assert codes.scale is not None and codes.zero is not None
        numbers = unpack_codes(codes.codes, self.bits, -2 if self.of_keys else -1).mT  # (*, D, 64) or (*, 64, D)
        tail = torch.stack([codes.scale, codes.zero], -1)
        if not self.of_keys:  # group by group
            numbers = torch.unflatten(numbers, -1, (-1, self.width)).transpose(-3, -2).flatten(-3, -2)
            tail = tail.transpose(-3, -2).flatten(-3, -2)
        into = self.codes[:, : numbers.shape[1]]
        into[..., :-TAIL] = _joined(numbers.contiguous(), self.bits)
        into[..., -TAIL:] = tail.view(torch.uint8)

    def plain(self) -> Codes:
        """A copy as `Codes`."""
        numbers = _apart(self.codes[..., :-TAIL], self.bits)
        scale, zero = self._tail().unbind(-1)
        if self.of_keys:
            return Codes(pack_codes(numbers.mT, self.bits), scale.contiguous(), zero.contiguous(), self.bits)
        numbers = torch.unflatten(numbers, -2, (-1, PAGE)).transpose(-3, -2).flatten(-2)  # (*, 64, D)
        scale, zero = (torch.unflatten(t, -1, (-1, PAGE)).mT.contiguous() for t in (scale, zero))
        return Codes(pack_codes(numbers, self.bits).mT.contiguous(), scale, zero, self.bits)

    def sums(self, weights: Tensor, bounds: Tensor) -> Tensor:
        """Sums over the first N of all B * P pages of keys, channel by channel, or of values, token by token.

        Args:
            weights: (G, N, D) float32 of keys; (G, parts, N, 64) of values, alike for their groups of channels.
            bounds: (M + 1,) int32: of all weights, the first that each sum is of, and at last their number.

        Returns:
            (M, 64) float32 of keys, (M, channels of a group) of values.
        """
        pages = weights.shape[-2]
        index = _index(pages, weights.shape[0], self.codes.shape[2], weights.shape[-1])
        codes, weights = self.codes.flatten(0, 2), weights.flatten()
        if self.bits < 8:
            return _read(self.bits, codes, index, bounds, weights)
        # Torch wants the scales of 8 bits in float32, and would want a copy of all codes with them. As codes of 4 bits,
        # low + 16 * high, they are read where they lie; only the zero point is then added 17 times.
        halves = _read(4, codes, index, bounds, weights)
        low, high = halves[:, ::2], halves[:, 1::2]
        zero = codes[:, -2:].view(torch.float16).float()
        once = torch.ops.aten._embedding_bag_forward_only(zero, index, bounds, False, 0, False, weights, True)[0]
        return torch.add(low, high - once, alpha=16)

    def _tail(self) -> Tensor:
        """(B, P, S, 2) float16 scales and zero points, where they lie."""
        return self.codes[..., -TAIL:].view(torch.float16)


def _read(bits: int, codes: Tensor, index: Tensor, bounds: Tensor, weights: Tensor) -> Tensor:
    """(M, width) float32: sums of strips `index`, each times its weight, from one of `bounds` to the next."""
    read = _BAGS[bits]
    assert read is not None
    found: Tensor = read(codes, index, bounds, per_sample_weights=weights, include_last_offset=True)
    return found


@lru_cache(maxsize=4)
def _index(pages: int, groups: int, count: int, bag: int) -> Tensor:
    """The strips of pages that have `count`, `bag` of one part together: of all (groups, parts, pages, bag), int32."""
    strips = _first(1 << (pages * count).bit_length())[: pages * count]
    return strips.view(pages, count // bag, bag).transpose(0, 1).expand(groups, -1, -1, -1).flatten()


@lru_cache(maxsize=1)
def _first(strips: int) -> Tensor:
    """Those of fewer pages are the first of these: one serves the layers of a model."""
    return torch.arange(strips, dtype=torch.int32)


def _joined(numbers: Tensor, bits: int) -> Tensor:
    """Bytes of consecutive codes, from a byte for each."""
    while bits < 8:
        pairs = numbers.view(torch.int16)  # the first of the two is the lower byte
        numbers = (pairs | pairs >> (8 - bits)).to(torch.uint8)
        bits *= 2
    return numbers


def _apart(codes: Tensor, bits: int) -> Tensor:
    """As before `_joined`."""
    width = 8
    while width > bits:
        width //= 2
        pairs = codes.to(torch.int16)
        codes = ((pairs | pairs << (8 - width)) & (0x101 * (2**width - 1))).view(torch.uint8)
    return codes
