"""Keys and values in 8 or 4 bits, after KIVI (arXiv 2402.02750, section 3): asymmetric, rounded to nearest.

Keys are scaled per channel over groups of tokens, since a few channels are large for every token; values per token,
over groups of channels. Scales and zero points are float16. Two 4-bit codes share a byte: the first half of the
channels in the low bits, the second half in the high bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64  # tokens that share a key's scale, and at most so many channels that share a value's


@dataclass(frozen=True)
class Codes:
    """A quantised tensor (B, H, N, D): `codes` (B, H, N, D * bits / 8) uint8, `scale` and `zero` float16."""

    codes: Tensor
    scale: Tensor  # keys (B, H, N / GROUP, D); values (B, H, N, D / value_group(D))
    zero: Tensor
    bits: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scale, self.zero

    def rows(self, index: Tensor) -> Codes:
        """The rows `index` (N,) of the batch."""
        codes, scale, zero = (t.index_select(0, index.to(t.device)) for t in self.tensors())
        return Codes(codes, scale, zero, self.bits)


def value_group(channels: int) -> int:
    """Channels of a value that share a scale: all of them up to 96, else the largest divisor up to `GROUP`."""
    if channels <= 96:
        return channels
    return max(n for n in range(1, GROUP + 1) if channels % n == 0)


def quantize_keys(key: Tensor, bits: int, valid: Tensor | None = None) -> Codes:
    """Codes of (B, H, N, D) keys, N a multiple of `GROUP`; slots where `valid` (B, H, N) is False widen no range."""
    rows, heads, _, channels = key.shape
    grouped = key.reshape(rows, heads, -1, GROUP, channels)
    mask = None if valid is None else valid.reshape(rows, heads, -1, GROUP, 1)
    codes, scale, zero = _quantize(grouped, 3, bits, mask)
    return Codes(_pack(codes.flatten(2, 3), bits), scale.squeeze(3), zero.squeeze(3), bits)


def dequantize_keys(packed: Codes, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) keys."""
    rows, heads, groups, channels = packed.scale.shape
    codes = _unpack(packed.codes, packed.bits).reshape(rows, heads, groups, GROUP, channels).to(dtype)
    key: Tensor = codes * packed.scale.to(dtype).unsqueeze(3) + packed.zero.to(dtype).unsqueeze(3)
    return key.flatten(2, 3)


def quantize_values(value: Tensor, bits: int) -> Codes:
    """Codes of (B, H, N, D) values."""
    grouped = value.reshape(*value.shape[:3], -1, value_group(value.shape[3]))  # (B, H, N, D / group, group)
    codes, scale, zero = _quantize(grouped, 4, bits, None)
    return Codes(_pack(codes.flatten(3, 4), bits), scale.squeeze(4), zero.squeeze(4), bits)


def dequantize_values(packed: Codes, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) values."""
    codes = _unpack(packed.codes, packed.bits).reshape(*packed.scale.shape, -1).to(dtype)
    value: Tensor = codes * packed.scale.to(dtype).unsqueeze(4) + packed.zero.to(dtype).unsqueeze(4)
    return value.flatten(3, 4)


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
    scale = ((high - zero.float()) / levels).half().clamp(min=torch.finfo(torch.float16).tiny)
    codes = ((x - zero.float()) / scale.float()).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else torch.cat([codes & 15, codes >> 4], dim=-1)
