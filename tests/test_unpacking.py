"""Pages written back as keys and values: the plain definition against loops, and Triton against that.

The interpreted tests are run by `test_kernels.test_triton_in_its_interpreter`.
"""

import contextlib
import copy
import itertools

import pytest
import torch

from kernel_testing import DTYPES, interpreted, never_waiting, poisoned, random, spoil_unused
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import value_group
from pyramidkv.ops.read_back import ReadBack
from pyramidkv.ops.unpacking import naive

# dtype, bits, head sizes of keys and values, every head with its own number of pages, rows
CASES = [
    (torch.float32, 4, (80, 80), True, 2),
    (torch.float16, 8, (32, 32), True, 7),
    (torch.float16, 2, (64, 128), True, 1),  # two scales a value
    (torch.float32, 4, (128, 112), False, 1),
    (torch.float16, 2, (80, 72), False, 2),
    (torch.bfloat16, 16, (80, 64), True, 2),
]


def packed(dtype, bits, sizes, ragged, rows, device="cpu", heads=2, slots=150, **options):
    """Pages of some heads, some of which have none, and the slots in use of each; pages of no head are NaN."""
    key, value = (random(rows, heads, slots, size, seed=size, dtype=dtype, device=device) * 3 + 1 for size in sizes)
    used = torch.full((rows, heads), slots - 9)
    if ragged:
        used = torch.arange(rows * heads).reshape(rows, heads) * 31 % (slots - 8)
        used[-1, -1] = min(64, slots - 9)
    index = torch.arange(slots - 9).repeat(rows, heads, 1)
    index = index.masked_fill(torch.arange(slots - 9) < slots - 9 - used[..., None], -1).to(device)
    pages = int(((used + 63) // 64).sum(1).max()) + 1 if ragged else None
    made = Pages.gather(key, value, index, (used + 9).int().to(device), 9, bits, pages, **options)
    spoil_unused(made)
    return made, used


def targets_of(pages, sizes, dtype, more=5):
    """Parts of larger tensors of NaN, and those."""
    _, rows, heads = pages.layout.shape
    shape = rows, heads, 64 * pages.most + more
    whole = [torch.full((*shape, n), float("nan"), dtype=dtype, device=pages.layout.device) for n in sizes]
    return tuple(t[:, :, : 64 * pages.most] for t in whole), whole


def by_hand(codes, row, page, slot, width, keys):
    """A number for each channel, from its bits, its scale and its zero point, in float64 rounded to float32."""
    if codes.bits == 16:
        return codes.codes[row, page, slot].tolist()
    step = 8 * codes.bits
    found = []
    for channel in range(width):
        place = (slot % step, channel) if keys else (channel, slot % step)
        code = int(codes.codes[row, page][place]) >> (slot // step * codes.bits) & (2**codes.bits - 1)
        which = channel if keys else (slot, channel // value_group(width))
        found.append(code * codes.scale[row, page][which].double() + codes.zero[row, page][which].double())
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacking_is_its_definition(case):
    _, _, sizes, _, rows = case
    pages, used = packed(*case)
    targets, whole = targets_of(pages, sizes, torch.float32)
    naive.unpack(pages.keys, pages.values, pages.layout, targets)
    plain = pages.keys.plain(), pages.values.plain()
    assert all(t[:, :, 64 * pages.most :].isnan().all() for t in whole)
    for b, h in itertools.product(range(rows), range(2)):
        tokens = int(used[b, h])
        last = int(pages.first[b, h] + pages.count[b, h]) - 1
        for target in targets:
            assert not target[b, h, : target.shape[2] - tokens].any()
        for back in {0, 1, tokens // 2, 64, tokens - 1} & set(range(tokens)):  # from the newest backwards
            where = b, last - back // 64, 63 - back % 64
            for codes, target, keys in ((plain[0], targets[0], True), (plain[1], targets[1], False)):
                expected = torch.tensor(by_hand(codes, *where, target.shape[-1], keys), dtype=torch.float32)
                assert torch.equal(target[b, h, -1 - back], expected)


def same_slots(dtype, bits, sizes, ragged, rows, device="cpu", **more):
    """Whether the kernel writes what plain torch does, to the last bit, and nothing else."""
    from pyramidkv.ops.unpacking import triton

    pages, _ = packed(dtype, bits, sizes, ragged, rows, device, **more)
    expected, _ = targets_of(pages, sizes, dtype)
    naive.unpack(pages.keys, pages.values, pages.layout, expected)
    got, whole = targets_of(pages, sizes, dtype)
    triton.unpack(pages.keys.plain(), pages.values.plain(), pages.layout, got)
    return all(t[:, :, 64 * pages.most :].isnan().all() for t in whole) and all(map(torch.equal, got, expected))


@interpreted  # where bfloat16 is cut off, not rounded
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_unpacking(case):
    assert same_slots(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2, 16])
@pytest.mark.parametrize("size", [32, 64, 72, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_gpu_unpacking(dtype, bits, size, ragged, rows):
    assert same_slots(dtype, bits, (size, size), ragged, rows, "cuda", heads=8, slots=1000)


@pytest.mark.gpu
def test_gpu_unpacking_of_a_long_prompt():
    assert same_slots(torch.float16, 4, (80, 80), True, 1, "cuda", heads=32, slots=26000)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_page_of_the_same_tokens_comes_out_as_it_went_in(bits):
    def again(key, value):
        """Packed, all but the newest 9 slots, and unpacked."""
        slots = key.shape[2]
        pages = Pages.gather(key, value, torch.arange(slots - 9).expand(2, 3, -1), [slots, slots], 9, bits)
        whole = pages.followed_by((key[:, :, -9:], value[:, :, -9:]))
        return [t[:, :, -slots:] for t in whole]

    def more(old, new):
        return [torch.cat([a, random(2, 3, new, a.shape[3], seed=new)], 2) for a in old]

    once = again(random(2, 3, 200, 80, seed=1), random(2, 3, 200, 32, seed=2))
    for old, kept in zip(once, again(*more(once, 64)), strict=True):
        assert torch.equal(kept[:, :, :191], old[:, :, :191])  # without the 9, which were packed for the first time
    assert not torch.equal(again(*more(once, 63))[0][:, :, :191], once[0][:, :, :191])


def test_what_was_asked_for_ahead_is_the_same():
    now, _ = packed(*CASES[0])
    ahead, _ = packed(*CASES[0], ask=True)
    assert ahead.asked is not None and copy.deepcopy(ahead).most == ahead.most == now.most > 0


def test_what_is_asked_for_together_comes_apart_again():
    one, other = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([[7]], dtype=torch.int32)
    found = ReadBack.together([None, one, None, other])
    one += 10  # what is written afterwards does not come
    assert [None if x is None else x.get().tolist() for x in found] == [None, [[0, 1, 2], [3, 4, 5]], None, [[7]]]
    assert ReadBack.together([None]) == [None] and ReadBack.together([]) == []


@pytest.mark.gpu
def test_gpu_packing_and_unpacking_do_not_wait():
    key, value = (random(2, 4, 700, 80, seed=s, dtype=torch.float16, device="cuda") for s in (1, 2))
    limits = (torch.arange(8, dtype=torch.int32, device="cuda") * 80 + 30).view(2, 4)
    index = torch.arange(691, device="cuda").repeat(2, 4, 1)
    index = index.masked_fill(index < 700 - limits[..., None], -1)
    for way in (contextlib.nullcontext, never_waiting):  # first compiled, and memory allocated
        with way():
            pages = Pages.gather(key, value, index, limits, 9, 4, 60, ask=True)
            pages.followed_by((key, value), (key, value))
            pages.valid()


def same_positions(rows, heads, tokens, slots, share, device="cpu"):
    """Whether the kernel finds the positions that plain torch does, of heads with more and fewer of them."""
    from pyramidkv.ops.bitmap import naive as bitmap_naive
    from pyramidkv.ops.bitmap import triton

    make = torch.Generator().manual_seed(tokens)
    each = torch.rand(rows, heads, 1, generator=make) * share
    bits = torch.rand(rows, heads, -(-tokens // 8) * 8, generator=make) < each
    bits[..., tokens:] = False
    bits[0, 0] = False
    weight = 2 ** torch.arange(8)
    bitmap = (bits.unflatten(2, (-1, 8)) * weight).sum(-1).to(torch.uint8).to(device)
    with poisoned():
        got = triton.unpack_positions(bitmap, slots)
    return got.dtype == torch.int32 and torch.equal(got, bitmap_naive.unpack_positions(bitmap, slots))


BITMAPS = [(2, 1, 1, 64, 2.0), (7, 2, 20, 128, 1.5), (1, 3, 1100, 1152, 2.0), (2, 2, 9000, 320, 0.05)]


@interpreted
@pytest.mark.parametrize("shape", [*BITMAPS, (1, 2, 2500, 1024, 1.0)], ids=str)  # the last: more bits than slots
def test_interpreted_positions(shape):
    assert same_positions(*shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*BITMAPS, (1, 32, 32768, 30016, 1.0), (7, 8, 20011, 2944, 0.1)], ids=str)
def test_gpu_positions(shape):
    assert same_positions(*shape, "cuda")
