"""Attention over packed pages: the plain definition against loops in float64, and Triton against that.

The interpreted tests are run by `test_kernels.test_triton_in_its_interpreter`.
"""

from typing import NamedTuple

import pytest
import torch

from attention_cases import exact_decode, new_token, ring_for, slots_case
from kernel_testing import (
    DTYPES,
    ERROR,
    distance,
    follows_the_length,
    interpreted,
    poisoned,
    random,
    same,
    spoil_unused,
)
from pyramidkv.ops import strips
from pyramidkv.ops.packed_attention import naive, packed_attention
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import Codes, quantize_keys, quantize_values, room_for, value_group
from pyramidkv.ops.strips import Strips


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    size: int
    bits: int
    slots: int  # packed
    capacity: int  # of the newest
    ragged: bool = False  # every head keeps its own number of slots


CASES = [
    Case(1, 2, 2, 80, 4, 150, 37),
    Case(2, 4, 2, 64, 8, 130, 20),
    Case(2, 4, 2, 64, 2, 130, 20, True),
    Case(1, 4, 1, 128, 4, 200, 9),  # two scales a value
    Case(1, 1, 1, 256, 2, 100, 66),  # four
    Case(1, 3, 3, 96, 2, 130, 35, True),
    Case(1, 9, 1, 112, 8, 130, 20),  # 18 pairs of query head and scale; groups of 56 channels
    Case(1, 4, 2, 32, 16, 90, 33, True),
    Case(1, 9, 1, 112, 16, 70, 20),
]
SEVEN = Case(7, 4, 2, 64, 4, 90, 17, True)


def make(case, dtype=torch.float32, kind="each", device="cpu", scale=1.0, attended=0):
    """Query, pages, newest slots with their length and start, and the packed slots, (B, Hkv) lists of them.

    With `attended`, one packed token has a logit of about that much, the others about 0, and its value is 0.
    """
    batch, kv_heads = case.batch, case.kv_heads
    query = random(batch, case.heads, 1, case.size, seed=1, dtype=dtype, device=device)
    every, slots = case.slots + 30, case.slots
    key = (random(batch, kv_heads, every, case.size, seed=2) * 2 + 1).to(device, dtype)
    value = (random(batch, kv_heads, every, case.size, seed=3) * scale).to(device, dtype)
    order = torch.randperm(every, generator=torch.Generator().manual_seed(4))[:slots]
    if attended:
        value[:, :, order[0]] = 0
        alike = key[:, :1, order[:1]].float() - 1
        query = (alike * attended / (0.2 * alike.square().sum(-1, keepdim=True))).to(dtype).expand_as(query)
    index = order.sort().values.repeat(batch, kv_heads, 1).to(device)
    limits = torch.full((batch, kv_heads), slots)
    if case.ragged:  # some heads with none, some with whole pages
        limits = torch.arange(batch * kv_heads).reshape(batch, kv_heads) * 37 % (slots + 1)
        limits[-1, -1] = 64
        index = index.masked_fill(torch.arange(slots, device=device) < slots - limits.to(device)[..., None], -1)
    total = int(limits.sum(1).max()) if case.ragged else None
    pages = Pages.gather(key, value, index, limits.int().to(device) + 3, 3, case.bits, total)
    spoil_unused(pages)
    chosen = [[head[head >= 0] for head in row] for row in index]
    *newest, used = slots_case((batch, kv_heads, case.capacity, case.size), dtype, kind, device)
    return (query, pages, *newest), (key, value, chosen, used)


def rounded(x, dim, bits):
    """Numbers as codes of `bits` bits give them back, one scale along `dim`, by the definition."""
    if bits == 16:
        return x.double()
    zero = x.amin(dim, keepdim=True).half()
    step = ((x.amax(dim, keepdim=True) - zero.float()) / (2**bits - 1)).half().clamp(min=2.0**-14)
    code = ((x - zero.float()) / step.float()).round().clamp(0, 2**bits - 1)
    return zero.double() + step.double() * code.double()


def by_hand(case, inputs, known, extra=()):
    """Every head's slots cut into pages from the newest backwards, rounded, and attended to in float64."""
    query, _, new_keys, new_values, *_ = inputs
    key, value, chosen, used = known
    out = torch.zeros(case.batch, case.heads, 1, case.size, dtype=torch.float64)
    groups = case.heads // case.kv_heads
    for b in range(case.batch):
        for h in range(case.kv_heads):
            keys = [new_keys[b, h, used[b, h]].double(), *(t[b, h].double() for t in extra[:1])]
            values = [new_values[b, h, used[b, h]].double(), *(t[b, h].double() for t in extra[1:])]
            slots = chosen[b][h]
            for end in range(len(slots), 0, -64):
                page = slots[max(0, end - 64) : end]
                keys.append(rounded(key[b, h, page], 0, case.bits))
                grouped = value[b, h, page].reshape(len(page), -1, value_group(case.size))
                values.append(rounded(grouped, 2, case.bits).flatten(1))
            all_keys, all_values = torch.cat(keys)[None, None], torch.cat(values)[None, None]
            heads = query[b : b + 1, h * groups : (h + 1) * groups]
            there = torch.ones(1, 1, all_keys.shape[2], dtype=torch.bool)
            out[b, h * groups : (h + 1) * groups] = exact_decode(heads, all_keys, all_values, there, 0.2)[0]
    return out


@pytest.mark.parametrize("case", [*CASES, SEVEN], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_packed_attention_is_its_definition(case, fresh):
    inputs, known = make(case)
    new = new_token(inputs[2]) if fresh else None
    got = packed_attention(*inputs, 0.2, new)
    assert got.shape == inputs[0].shape
    # A number half way between two codes may go to either in float32, which moves one of thousands by a step.
    assert distance(got, by_hand(case, inputs, known, new or ())) < 1e-3


ON_A_CPU = [
    Case(1, 6, 2, 64, 8, 200, 33, True),
    Case(7, 2, 1, 128, 2, 130, 5),
    Case(2, 4, 4, 256, 8, 150, 12, True),  # four scales a value
    Case(3, 6, 3, 60, 4, 130, 7, True),  # 30 bytes a value
    Case(1, 2, 1, 62, 4, 100, 7),  # 31: no strips
]


@pytest.mark.parametrize("case", [*CASES, SEVEN, *ON_A_CPU], ids=str)
@pytest.mark.parametrize("kind", ["number", "none", "started"])
def test_packed_attention_on_a_cpu(case, kind, monkeypatch):
    (query, pages, keys, values, length, start), _ = make(case, kind="none" if kind == "none" else "number")
    assert isinstance(pages.keys, Strips) == (case.bits < 16 and case.size != 62)
    if kind == "started":
        start = torch.arange(case.batch * case.kv_heads, dtype=torch.int32).view(case.batch, -1) * 5 % length
        start[-1, -1] = length
        unused = torch.arange(case.capacity) < start[..., None]
        keys, values = (t.masked_fill(unused[..., None], float("nan")) for t in (keys, values))
    expected = naive.packed_attention(query, pages, keys, values, length, start, 0.2)
    monkeypatch.setattr(naive, "packed_attention", None)  # that it is not asked again
    got = packed_attention(query, pages, keys, values, length, start, 0.2)
    assert got.dtype == query.dtype and got.shape == query.shape
    # Codes of 8 bits are read as two halves, of which the upper is rounded 16 times as coarsely.
    assert distance(got, expected) < (1e-4 if case.bits == 8 else 1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], SEVEN], ids=str)
def test_packed_attention_on_a_cpu_whose_torch_has_no_embedding_bags(case, monkeypatch):
    (_, rows, *_), _ = make(case)
    monkeypatch.setattr(strips, "_BAGS", dict.fromkeys(strips._BAGS))
    (query, pages, keys, values, length, start), _ = make(case, kind="number")
    assert "has no quantized embedding bags" in strips.why_no_bags()
    assert isinstance(pages.keys, Codes) and isinstance(rows.keys, Strips)
    assert same(rows.plain().tensors().values(), pages.tensors().values())  # so are they in files
    assert same(rows.plain().for_device().tensors().values(), pages.tensors().values())
    assert pages.for_device() is pages
    got = packed_attention(query, pages, keys, values, length, start, 0.2)
    assert distance(got, naive.packed_attention(query, rows, keys, values, length, start, 0.2)) < 1e-5


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("new", [0, 9])
def test_rows_of_a_padded_batch_have_empty_pages_on_a_cpu(size, new):
    key, value = (random(3, 2, 200, size, seed=seed) for seed in (1, 2))
    limits = torch.tensor([200, 70, 0], dtype=torch.int32)[:, None].expand(3, 2)
    index = torch.arange(200).expand(3, 2, 200).masked_fill(torch.arange(200) < 200 - limits[..., None], -1)
    pages = Pages.gather(key, value, index, limits, 0, 4)
    assert pages.even and pages.count.unique().tolist() == [4]
    query, newest = random(3, 4, 1, size, seed=3), random(3, 2, 9, size, seed=4)
    inputs = query, pages, newest, newest, new, None, 0.2
    got = packed_attention(*inputs)
    assert distance(got, naive.packed_attention(*inputs)) < 1e-5
    assert new or not got[2].any()


def test_packed_attention_of_half_precision_on_a_cpu():
    (query, pages, keys, values, length, _), _ = make(CASES[3], torch.bfloat16, "none")
    got = packed_attention(query, pages, keys, values, length, None, 0.2)
    expected = naive.packed_attention(query.float(), pages, keys, values, length, None, 0.2)
    assert got.dtype == torch.bfloat16 and distance(got, expected.bfloat16()) < 1e-3
    assert distance(got, expected) < ERROR[torch.bfloat16]


def test_a_gradient_goes_through_pages_on_a_cpu():
    (query, pages, keys, values, length, _), _ = make(CASES[0], kind="none")
    query.requires_grad_()
    newest = keys[:, :, :length].nan_to_num(), values[:, :, :length].nan_to_num()
    packed_attention(query, pages, *newest, length, None, 0.2).sum().backward()
    assert query.grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("sizes", [(64, 64), (80, 128), (112, 256), (5, 40)], ids=str)
def test_strips_are_the_same_codes(bits, sizes):
    key, value = (random(2, 3, 200, size, seed=size) * 3 + 1 for size in sizes)
    codes = quantize_keys(key[:, :, :64], bits), quantize_values(value[:, :, :64], bits)
    room = Strips.room(2, 4, sizes, bits)
    for mine, held in zip(codes, room, strict=True):
        held.codes.fill_(7)
        held.put(mine)
        back = held.each(lambda t: t[:, :3]).plain()
        assert same(back.tensors().values(), mine.tensors().values())
        assert all(t.is_contiguous() for t in back.tensors().values())
        assert (held.codes[:, 3] == 7).all() and held.bits == bits
        assert held.codes[:, :3].nbytes == sum(t.nbytes for t in mine.tensors().values())
    assert tuple(s.channels for s in room) == sizes


@pytest.mark.parametrize("limits", [[[190, 40], [64, 0]], [[0, 0], [0, 0]]], ids=str)
def test_pages_that_no_head_has_are_not_read_on_a_cpu(limits):
    """Buffers may have room for more pages, and what an earlier prompt left in it."""
    key, value = (random(2, 2, 200, 32, seed=seed) for seed in (1, 2))
    limits = torch.tensor(limits, dtype=torch.int32)
    index = torch.arange(200).expand(2, 2, 200).masked_fill(torch.arange(200) < 200 - limits[..., None], -1)

    def found(shape, rows):
        made = shape._replace(pages=9).room(rows)
        for codes in (made.keys.codes, made.values.codes):
            codes.fill_(255)  # scales and zero points are NaN
        return made

    query, newest = random(2, 4, 1, 32, seed=3), random(2, 2, 5, 32, seed=4)
    pages = Pages.gather(key, value, index, limits, 0, 4, 4, found)
    assert pages.row_pages == 9
    got = packed_attention(query, pages, newest, newest, 5, None, 0.2)
    expected = packed_attention(query, Pages.gather(key, value, index, limits, 0, 4, 4), newest, newest, 5, None, 0.2)
    assert torch.equal(got, expected) and not got.isnan().any()


def compare(inputs, new, blocks=None):
    """Distance of the kernel's result to the definition's; what they write is the same."""
    from pyramidkv.ops.packed_attention import triton

    query, pages, keys, values, *rest = inputs
    before = keys.clone(), values.clone()
    rings = [None if new is None else ring_for(query, 13) for _ in range(2)]
    with poisoned():
        got = triton.packed_attention(query, pages, keys, values, *rest, 0.2, new, rings[0], blocks=blocks)
    wide = [t.float() for t in before]
    wide_new = None if new is None else tuple(t.float() for t in new)
    expected = naive.packed_attention(query.float(), pages, *wide, *rest, 0.2, wide_new, rings[1])
    assert new is None or torch.equal(*rings)
    assert same((keys.float(), values.float()), wide)
    return distance(got, expected)


@interpreted
@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "each") for case in CASES), (CASES[0], "number"), (CASES[1], "one")], ids=str
)
def test_interpreted_packed_attention(case, kind):
    inputs, _ = make(case, kind=kind)
    assert compare(inputs, new_token(inputs[2]) if kind != "number" else None) < 1e-5


@interpreted
@pytest.mark.parametrize(("case", "pages"), [(CASES[0], 1), (CASES[0], 3), (SEVEN, 1)], ids=str)
def test_interpreted_packed_attention_in_pieces(case, pages):
    from pyramidkv.ops.packed_attention import triton

    inputs, _ = make(case)
    assert compare(inputs, None, triton.Blocks(pages, 32, 1, 1)) < 1e-5


@interpreted
@pytest.mark.parametrize(("bits", "attended"), [(4, 0), (4, 9), (2, 9)])
def test_interpreted_packed_attention_in_half_precision(bits, attended):
    """Small values beside a token of e^9 times their attention: shares of them must not vanish in float16."""
    case = Case(1, 1, 1, 128, bits, 250, 2)
    inputs, _ = make(case, torch.float16, "number", scale=1e-2, attended=attended)
    inputs[3][:] *= 1e-2
    assert compare(inputs, None) < 2 * ERROR[torch.float16]


def same_pages(dtype, bits, sizes, ragged, device="cpu", rows=2, heads=3, slots=150):
    """Whether the kernel packs what plain torch does, to the last bit; what no head keeps is NaN."""
    from pyramidkv.ops.packing import naive as packing_naive
    from pyramidkv.ops.packing import triton

    fused = random(rows, slots, heads, sum(sizes) + 16, dtype=dtype, device=device).transpose(1, 2)
    key, value = fused[..., : sizes[0]] * 3 + 1, fused[..., sizes[0] : sum(sizes)]
    key[:, 0], value[:, 0, :, 3] = key[:, 0] * 1e-3, 7.0  # ranges far from 0, and few steps wide
    index = torch.arange(1, slots, 2, device=device).repeat(rows, heads, 1)
    width = index.shape[2] - 1
    used = torch.arange(rows * heads, device=device).reshape(rows, heads) * 31 % (width + 1)
    used[-1, 0] = min(64, width)
    index = index[..., :width].masked_fill(torch.arange(width, device=device) < width - used[..., None], -1)
    kept = torch.zeros(rows, heads, slots + 1, dtype=torch.bool, device=device)
    kept = kept.scatter_(2, index.where(index >= 0, slots), True)[..., :slots, None]
    key, value = (t.masked_fill(~kept, float("nan")) for t in (key, value))
    pages = int(((used + 63) // 64).sum(1).max()) + 1 if ragged else heads * -(-width // 64)
    rest = index, (used + 9).int(), 9, pages, bits, not ragged  # 9 slots of each head go elsewhere
    expected = packing_naive.pack(key, value, *rest)
    with poisoned():
        if ragged:
            got = among_others(lambda into: triton.pack(key, value, *rest, into), rows, pages, heads, sizes, bits, key)
        else:
            got = triton.pack(key, value, *rest)
    return torch.equal(got[2], expected[2]) and all(
        a.isfinite().all() and torch.equal(a, b)
        for mine, theirs in zip(got[:2], expected[:2], strict=True)
        for a, b in zip(mine.tensors().values(), theirs.tensors().values(), strict=True)
    )


def among_others(pack, rows, pages, heads, sizes, bits, like):
    """What is packed between two other rows, where each has room for more pages; nothing else may be written."""
    keys, values, layout = room_for(rows + 2, pages + 3, heads, sizes, bits, like.dtype, like.device)
    codes = [*keys.tensors().values(), *values.tensors().values()]
    before = [t.clone() for t in codes]
    pack((keys.each(lambda t: t[1:-1]), values.each(lambda t: t[1:-1]), layout[:, 1:-1]))
    for now, old in zip(codes, before, strict=True):
        others = torch.ones(now.shape[:2], dtype=torch.bool)
        others[1:-1, :pages] = False
        assert torch.equal(now[others].view(torch.uint8), old[others].view(torch.uint8))
    return *(c.each(lambda t: t[1:-1, :pages]) for c in (keys, values)), layout[:, 1:-1]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "bits", "sizes", "ragged", "rows"),
    [
        (torch.float16, 8, (80, 80), False, 2),
        (torch.float32, 4, (128, 128), True, 1),
        (torch.float32, 2, (80, 80), True, 2),
        (torch.bfloat16, 2, (32, 32), True, 7),
        (torch.float16, 4, (64, 112), False, 1),
        (torch.float16, 8, (72, 96), True, 2),
        (torch.bfloat16, 16, (80, 64), True, 2),
    ],
    ids=str,
)
def test_interpreted_packing(dtype, bits, sizes, ragged, rows):
    assert same_pages(dtype, bits, sizes, ragged, rows=rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2, 16])
@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_gpu_packing(dtype, bits, size, ragged, rows):
    assert same_pages(dtype, bits, (size, size), ragged, "cuda", rows, 8, 1000)


@pytest.mark.gpu
def test_gpu_packing_of_a_long_prompt():
    assert same_pages(torch.float16, 4, (80, 80), True, "cuda", 1, 32, 6144)
    assert same_pages(torch.bfloat16, 2, (64, 128), False, "cuda", 2, 5, 20000)


def same_bitmap(rows, heads, slots, tokens, kept, device="cpu"):
    """Whether the kernel sets the bits that plain torch does, at dense and at rare positions."""
    from pyramidkv.ops.bitmap import naive as bitmap_naive
    from pyramidkv.ops.bitmap import triton

    make = torch.Generator().manual_seed(slots)
    fused = torch.rand(rows, tokens, heads, generator=make).argsort(1)[:, :slots].sort(1).values.int().transpose(1, 2)
    index = torch.arange(slots).repeat(rows, heads, 1)[..., slots - kept :]
    index = index.masked_fill(torch.rand(rows, heads, kept, generator=make).sort(-1).values < 0.2, -1)
    fused, index = fused.to(device), index.to(device)
    got, expected = (torch.full((rows, heads, -(-tokens // 8)), 255, dtype=torch.uint8, device=device) for _ in "ab")
    triton.pack_positions(fused, index, got)
    bitmap_naive.pack_positions(fused, index, expected)
    return torch.equal(got, expected)


BITMAPS = [(1, 1, 1, 1, 1), (7, 2, 20, 20, 17), (2, 3, 1100, 1103, 1090), (1, 2, 90, 1501, 90)]


@interpreted
@pytest.mark.parametrize("shape", BITMAPS)
def test_interpreted_bitmap(shape):
    assert same_bitmap(*shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*BITMAPS, (1, 32, 6144, 6144, 6112), (7, 8, 3000, 20011, 2900)])
def test_gpu_bitmap(shape):
    assert same_bitmap(*shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 2, 16])
@pytest.mark.parametrize("heads", [(32, 32, 80), (32, 8, 128), (28, 4, 128), (4, 1, 256), (8, 8, 96), (9, 1, 112)])
def test_gpu_packed_attention(dtype, fresh, ragged, bits, heads):
    inputs, _ = make(Case(3, *heads, bits, 700, 150, ragged), dtype, device="cuda")
    assert compare(inputs, new_token(inputs[2]) if fresh else None) < ERROR[dtype]


@pytest.mark.gpu
def test_a_graph_over_pages_stays_right_as_the_length_grows():
    (query, pages, keys, values, _, _), _ = make(Case(2, 32, 32, 80, 4, 700, 150), torch.float16, device="cuda")
    keys, values = keys.nan_to_num(), values.nan_to_num()
    exact = (query.float(), pages, keys.float(), values.float())
    assert follows_the_length(
        lambda length: packed_attention(query, pages, keys, values, length, None, 0.1),
        lambda length: naive.packed_attention(*exact, length, None, 0.1),
        (20, 21, 64, 149, 1, 0),
    )
