"""Keys and values in 8, 4 or 2 bits, after KIVI (arXiv 2402.02750, section 3): asymmetric, rounded to nearest.

Everything comes in pages of 64 tokens. Keys are scaled per channel over the tokens of a page, since a few channels are
large for every token; values per token, over groups of channels. Scales and zero points are float16.

The codes of a page lie in planes: of `n` = 64 * bits / 8 bytes, byte r holds in its lowest bits the code of token r,
then those of tokens r + n, r + 2 n, ... A kernel that loads all bytes of a page has its tokens after a shift and a
mask, in 8 / bits parts of consecutive tokens, with no exchange between threads. The channels of keys lie side by side,
as the product with a query wants them, and so do the tokens of values, as the product with probabilities wants those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 64  # tokens that share a key's scale
GROUP = 64  # at most so many channels share a value's


@dataclass(frozen=True)
class Codes:
    """Pages of numbers: `codes` uint8 and their float16 scales; or the numbers, in 16 bits."""

    codes: Tensor  # keys (*, 64 * bits / 8, D), values (*, Dv, 64 * bits / 8); 16 bits: (*, 64, D) as computed
    scale: Tensor | None  # keys (*, D), values (*, 64, D / value_group(D)); None in 16 bits
    zero: Tensor | None  # of the same shape
    bits: int

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by name."""
        named = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return {name: t for name, t in named.items() if t is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every tensor changed."""
        changed = {name: change(t) for name, t in self.tensors().items()}
        return Codes(changed["codes"], changed.get("scale"), changed.get("zero"), self.bits)

    def rows(self, index: Tensor) -> Codes:
        """The rows `index` (N,) of the batch."""
        return self.each(lambda t: t.index_select(0, index.to(t.device)))

    @property
    def channels(self) -> int:
        """Of a key or a value."""
        values = self.scale is not None and self.scale.ndim == self.codes.ndim
        return self.codes.shape[-2 if values else -1]

    def put(self, codes: Codes) -> None:
        """Write keys or values (B, P, ...) into the first P pages."""
        for name, tensor in self.tensors().items():
            source = codes.tensors()[name]
            tensor[:, : source.shape[1]] = source

    def plain(self) -> Codes:
        """What it is."""
        return self


# Pages of keys (B, P, ...) and of values (B, P, ...), and (3, B, H) int32: where those of each head lie.
Paged = tuple[Codes, Codes, Tensor]


def room_for(
    rows: int, pages: int, heads: int, sizes: tuple[int, int], bits: int, dtype: torch.dtype, device: torch.device
) -> Paged:
    """Pages yet to be written, for keys and values of so many channels; `dtype` is theirs in 16 bits."""
    keys, values = sizes
    lead = rows, pages
    layout = torch.empty(3, rows, heads, dtype=torch.int32, device=device)
    if bits == 16:
        made = (torch.empty(*lead, PAGE, size, dtype=dtype, device=device) for size in sizes)
        return Codes(next(made), None, None, bits), Codes(next(made), None, None, bits), layout
    each = lead[0], lead[1], PAGE, values // value_group(values)
    return (
        Codes(
            torch.empty(*lead, 8 * bits, keys, dtype=torch.uint8, device=device),
            torch.empty(*lead, keys, dtype=torch.float16, device=device),
            torch.empty(*lead, keys, dtype=torch.float16, device=device),
            bits,
        ),
        Codes(
            torch.empty(*lead, values, 8 * bits, dtype=torch.uint8, device=device),
            torch.empty(each, dtype=torch.float16, device=device),
            torch.empty(each, dtype=torch.float16, device=device),
            bits,
        ),
        layout,
    )


def value_group(channels: int) -> int:
    """Channels of a value that share a scale: all of them up to 96, else the largest divisor up to `GROUP`."""
    if channels <= 96:
        return channels
    return max(n for n in range(1, GROUP + 1) if channels % n == 0)


def key_bytes(channels: int, bits: int, itemsize: int) -> int:
    """Bytes of a page of keys; `itemsize` counts in 16 bits, where the numbers are stored as they are."""
    return PAGE * channels * itemsize if bits == 16 else PAGE * channels * bits // 8 + 4 * channels


def value_bytes(channels: int, bits: int, itemsize: int) -> int:
    """Bytes of a page of values."""
    if bits == 16:
        return PAGE * channels * itemsize
    return PAGE * channels * bits // 8 + 4 * PAGE * (channels // value_group(channels))


def quantize_keys(key: Tensor, bits: int, valid: Tensor | None = None) -> Codes:
    """Codes of pages (*, 64, D) of keys; tokens where `valid` (*, 64) is False widen no range."""
    if bits == 16:
        return Codes(key, None, None, bits)
    codes, scale, zero = _quantize(key, -2, bits, None if valid is None else valid[..., None])
    return Codes(pack_codes(codes, bits), scale.squeeze(-2), zero.squeeze(-2), bits)


def dequantize_keys(packed: Codes, dtype: torch.dtype) -> Tensor:
    """(*, 64, D) keys, computed in float32."""
    if packed.scale is None or packed.zero is None:
        return packed.codes.to(dtype)
    codes = unpack_codes(packed.codes, packed.bits).float()
    return codes.mul_(packed.scale.unsqueeze(-2)).add_(packed.zero.unsqueeze(-2)).to(dtype)


def quantize_values(value: Tensor, bits: int) -> Codes:
    """Codes of pages (*, 64, D) of values."""
    if bits == 16:
        return Codes(value, None, None, bits)
    grouped = value.reshape(*value.shape[:-1], -1, value_group(value.shape[-1]))  # (*, 64, D / group, group)
    codes, scale, zero = _quantize(grouped, -1, bits, None)
    return Codes(pack_codes(codes.flatten(-2), bits).mT.contiguous(), scale.squeeze(-1), zero.squeeze(-1), bits)


def dequantize_values(packed: Codes, dtype: torch.dtype) -> Tensor:
    """(*, 64, D) values, computed in float32."""
    if packed.scale is None or packed.zero is None:
        return packed.codes.to(dtype)
    group = packed.codes.shape[-2] // packed.scale.shape[-1]
    codes = unpack_codes(packed.codes.mT, packed.bits).reshape(*packed.scale.shape, group).float()
    return codes.mul_(packed.scale.unsqueeze(-1)).add_(packed.zero.unsqueeze(-1)).to(dtype).flatten(-2)


def _quantize(x: Tensor, dim: int, bits: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, 0 to 2**bits - 1) of `x`, and the scale and zero point of each group along `dim`."""
    x = x.float()
    inside = x if valid is None else x.masked_fill(~valid, float("inf"))
    low = inside.amin(dim, keepdim=True)
    high = (x if valid is None else x.masked_fill(~valid, float("-inf"))).amax(dim, keepdim=True)
    if valid is not None:  # a group of empty slots alone
        low, high = (t.masked_fill(~t.isfinite(), 0.0) for t in (low, high))
    levels = 2**bits - 1
    # Rounded to what is stored before the codes are computed, so that these make up for it.
    zero = low.half()
    # By a tensor: CUDA divides by a number of Python as it multiplies by its inverse, which is not quite the same.
    scale = ((high - zero.float()) / high.new_full((), levels)).half().clamp(min=torch.finfo(torch.float16).tiny)
    codes = (x - zero.float()).mul_(scale.float().reciprocal()).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(*, 64, D) codes, each in a byte, as (*, 64 * bits / 8, D)."""
    first, *others = codes.chunk(8 // bits, dim=-2)
    packed = first if others else first.clone()
    for plane, more in enumerate(others, 1):
        packed = packed | (more << (plane * bits))
    return packed.contiguous()


def unpack_codes(packed: Tensor, bits: int, dim: int = -2) -> Tensor:
    """The codes of pages, each in a byte: `dim` has 64 * bits / 8 bytes of each page, and then its 64 tokens."""
    if bits == 8:
        return packed
    *others, last = range(0, 8, bits)
    planes = [(packed >> shift if shift else packed) & (2**bits - 1) for shift in others]
    return torch.cat([*planes, packed >> last], dim=dim)
