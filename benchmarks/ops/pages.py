"""Random codes in pages, as the layers of a model hold them."""

from __future__ import annotations

import torch

from ops.shapes import Model
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import PAGE, Codes, key_bytes, value_bytes, value_group


def page_bytes(model: Model, bits: int) -> int:
    """Keys and values of one page."""
    return key_bytes(model.size, bits, 2) + value_bytes(model.size, bits, 2)


def random_pages(model: Model, rows: int, slots: int, bits: int, ragged: bool = False) -> Pages:
    """Pages for `slots` slots a head; `ragged`: as many in all, up to half as many again in a head."""
    heads, size, each = model.kv_heads, model.size, slots // PAGE
    count = torch.full((rows, heads), each, dtype=torch.int32, device=model.device)
    if ragged:
        count[:, ::2] += model.below(each // 2, rows, heads // 2)
        count[:, 1::2] = 2 * each - count[:, ::2]
    layout = torch.stack([(count.cumsum(1) - count).int(), count, model.below(PAGE, rows, heads)])

    def codes(shape: tuple[int, ...], scales: tuple[int, ...]) -> Codes:
        numbers = torch.randint(0, 256, (rows, heads * each, *shape), device=model.device, dtype=torch.uint8)
        scale = torch.rand(rows, heads * each, *scales, device=model.device).half() * (3 / 2**bits) + 0.01
        return Codes(numbers, scale, -scale * 2 ** (bits - 1), bits)

    keys = codes((8 * bits, size), (size,))
    values = codes((size, 8 * bits), (PAGE, size // value_group(size)))
    return Pages(keys, values, layout, not ragged)
