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

    def sums(self, weights: Tensor) -> Tensor:
        """Products of each page's keys or values with vectors of its own, in float32.

        Args:
            weights: (N, G, D) float32 of keys, (N, G, 64) of values, for the first N of all B * P pages.

        Returns:
            (N, G, 64) of keys, (N, G, D) of values.
        """
        pages, groups, bag = weights.shape
        count = self.codes.shape[-2]
        each = weights if bag == count else weights.repeat(1, 1, count // bag)  # tokens, for all groups of channels
        index, offsets = _bags(pages, groups, count, bag)
        read = _BAGS[self.bits]
        assert read is not None
        found: Tensor = read(
            self._to_read(),
            index,
            offsets,
            per_sample_weights=each.flatten(),
            include_last_offset=True,
        )
        return found.view(pages, groups, count // bag * self.width)

    def _tail(self) -> Tensor:
        """(B, P, S, 2) float16 scales and zero points, where they lie."""
        return self.codes[..., -TAIL:].view(torch.float16)

    def _to_read(self) -> Tensor:
        """All strips as torch wants them: those of 8 bits with tails in float32."""
        if self.bits < 8:
            return self.codes.flatten(0, -2)
        return torch.cat([self.codes[..., :-TAIL], self._tail().float().view(torch.uint8)], -1).flatten(0, -2)


@lru_cache(maxsize=4)
def _bags(pages: int, groups: int, count: int, bag: int) -> tuple[Tensor, Tensor]:
    """Which strips are summed, and where each sum begins: `groups` times the `count` of a page, `bag` at a time."""
    index, offsets = _more_bags(1 << max(pages - 1, 0).bit_length(), groups, count, bag)
    strips = pages * groups * count
    return index[:strips], offsets[: strips // bag + 1]


@lru_cache(maxsize=4)
def _more_bags(pages: int, groups: int, count: int, bag: int) -> tuple[Tensor, Tensor]:
    """Those of fewer pages are the first of these: one serves the layers of a model."""
    index = torch.arange(pages * count, dtype=torch.int32).view(pages, 1, count).expand(-1, groups, -1).flatten()
    return index, torch.arange(0, len(index) + 1, bag, dtype=torch.int32)


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
