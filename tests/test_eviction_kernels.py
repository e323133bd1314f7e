"""Selection and compaction: plain definitions against loops, and Triton against those to the last bit.

Triton's tests are interpreted, where those of test_kernels.py are, or on a GPU. What a kernel leaves unwritten is
garbage here.
"""

import math

import pytest
import torch

from kernel_testing import interpreted, never_waiting, poisoned, same
from pyramidkv.ops import compact as compact_package
from pyramidkv.ops.compact import compact
from pyramidkv.ops.compact import naive as compact_naive
from pyramidkv.ops.heads import head_limits
from pyramidkv.ops.heads import naive as heads_naive
from pyramidkv.ops.pooling import naive as pooling_naive
from pyramidkv.ops.select import naive as select_naive
from pyramidkv.ops.select import select, why_naive

# rows, heads, slots
SELECT = [(1, 1, 1), (7, 1, 37), (1, 2, 300), (2, 1, 64)]
SCORES = ["normal", "ties", "equal", "marked", "signs"]
LIMITS = ["alike", "rows", "heads", "all"]
# rows, heads, slots, kept, head size, head size of the values
COMPACT = [
    (1, 2, 40, 17, 80, 80),
    (7, 1, 9, 9, 32, 64),
    (2, 3, 130, 70, 128, 80),
    (1, 1, 1, 1, 64, 64),
    (1, 1, 5, 3, 72, 8),
]
DTYPES = [
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
]  # fmt: skip
EXTREME = [math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 1e-45]


def select_case(shape, kind, limits, seed=0, dtype=torch.float32):
    """Scores as a view with a stride between heads, what may be kept, the width, and which slots are valid."""
    rows, heads, slots = shape
    make = torch.Generator().manual_seed(seed + sum(shape))
    fused = torch.randn(rows, heads, slots + 3, generator=make)
    scores = fused[..., :slots]
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "equal":
        scores = torch.full_like(fused, -0.25)[..., :slots]
    elif kind == "signs":  # zeros are equal whatever their sign
        scores = torch.where(scores > 1.5, 1e-30, torch.where(scores > 0, 0.0, -0.0))
    elif kind == "marked":
        which = torch.randint(0, 2 * len(EXTREME), scores.shape, generator=make)
        for i, value in enumerate(EXTREME):
            scores = scores.masked_fill(which == i, value)
    valid = torch.rand(rows, slots, generator=make) < 0.8
    valid[:, : slots // 5] = False
    width = slots
    allowed = [slots] * rows
    if limits == "alike":
        width = max(1, slots // 4)
        allowed = [width] * rows
    elif limits == "rows":
        allowed = [(5 * row + seed) % (slots + 1) for row in range(rows)]
        width = max(*allowed, 1)
    elif limits == "heads":
        allowed = torch.randint(0, slots + 1, (rows, heads), generator=make, dtype=torch.int32)
        valid = torch.rand(rows, heads, slots, generator=make) < 0.8
    return scores.to(dtype), allowed, width, valid


def kept_slots(scores, limit, recent, valid, finite):
    """The definition for one row and head, in plain Python."""
    largest = torch.finfo(torch.float32).max
    marked = []
    for score in scores:
        score = -largest if math.isnan(score) else score
        marked.append(min(max(score, -largest), largest) if finite else score)
    real = [i for i, ok in enumerate(valid) if ok]
    for i in real[max(len(real) - recent, 0) :]:
        marked[i] = math.inf
    order = sorted((i for i in real if marked[i] > -math.inf), key=lambda i: (-marked[i], i))
    return sorted(order[:limit])


@pytest.mark.parametrize("shape", SELECT)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("recent", "finite", "padded"), [(0, False, False), (9, True, True), (400, False, True)])
def test_select_is_its_definition(shape, kind, limits, recent, finite, padded):
    scores, allowed, width, valid = select_case(shape, kind, limits)
    valid = valid if padded else None
    before = scores.clone()
    got = select(scores, allowed, width, recent=recent, valid=valid, finite=finite)
    assert got.dtype == torch.int64 and got.shape == (*shape[:2], width)
    assert torch.equal(scores.nan_to_num(), before.nan_to_num())
    for b in range(shape[0]):
        for h in range(shape[1]):
            limit = int(allowed[b, h]) if isinstance(allowed, torch.Tensor) else allowed[b]
            real = [True] * shape[2] if valid is None else (valid[b] if valid.ndim == 2 else valid[b, h]).tolist()
            expected = kept_slots(scores[b, h].tolist(), limit, recent, real, finite)
            assert got[b, h].tolist() == [-1] * (width - len(expected)) + expected


def test_the_reason_for_plain_torch_is_given_by_select(monkeypatch):
    assert "on cpu" in why_naive(torch.zeros(1, 1, 4))
    assert "float64" in why_naive(torch.zeros(1, 1, 4, dtype=torch.float64))
    monkeypatch.setenv("PYRAMIDKV_TRITON", "0")
    assert why_naive(torch.zeros(1, 1, 4)) == "PYRAMIDKV_TRITON=0"


def same_selection(shape, kind, limits, recent, finite, padded, dtype=torch.float32, device="cpu", **options):
    """Whether the kernel selects what plain torch does."""
    from pyramidkv.ops.select import triton

    scores, allowed, width, valid = select_case(shape, kind, limits, dtype=dtype)
    valid = valid if padded else None
    expected = select_naive.select(scores, allowed, width, recent=recent, valid=valid, finite=finite)
    if device != "cpu":
        scores = scores.to(device)
        allowed = allowed.to(device) if isinstance(allowed, torch.Tensor) else allowed
        valid = None if valid is None else valid.to(device)
    with poisoned():
        got = triton.select(scores, allowed, width, recent=recent, valid=valid, finite=finite, **options)
    return got.dtype == torch.int64 and torch.equal(got.cpu(), expected)


@interpreted
@pytest.mark.parametrize(
    ("shape", "kind", "limits", "recent", "finite", "padded"),
    [
        ((1, 1, 1), "normal", "all", 0, False, False),
        ((7, 1, 37), "marked", "rows", 3, True, True),
        ((1, 2, 300), "normal", "alike", 32, True, False),
        ((1, 2, 300), "marked", "heads", 0, False, True),
        ((1, 1, 300), "marked", "alike", 400, True, True),
        ((1, 1, 300), "equal", "alike", 9, False, False),
        ((2, 1, 64), "signs", "alike", 0, False, False),
        ((2, 1, 64), "ties", "all", 64, False, True),
    ],
)
def test_interpreted_select(shape, kind, limits, recent, finite, padded):
    assert same_selection(shape, kind, limits, recent, finite, padded)


@interpreted
@pytest.mark.parametrize("kind", ["ties", "marked"])
@pytest.mark.parametrize("padded", [True, False])
def test_interpreted_select_in_several_blocks(kind, padded):
    from pyramidkv.ops.select.triton import Blocks

    for blocks in (Blocks(128, 4), Blocks(512, 4, 128)):  # read again at each step, or kept and only written in parts
        assert same_selection((1, 1, 300), kind, "alike", 40, not padded, padded, blocks=blocks)


@interpreted
def test_interpreted_select_in_half_precision():
    assert same_selection((1, 1, 300), "normal", "alike", 8, True, False, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 3, 37), (2, 4, 1000), (1, 32, 6144), (7, 2, 8192), (1, 3, 16385), (1, 2, 32769)]
)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("recent", "finite", "padded"), [(0, False, False), (9, True, True), (4000, False, True)])
def test_gpu_select(shape, kind, limits, recent, finite, padded):
    assert same_selection(shape, kind, limits, recent, finite, padded, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_gpu_select_of_very_many(kind):
    assert same_selection((1, 1, 1_000_003), kind, "alike", 32, True, False, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_select_in_half_precision(warps, dtype):
    from pyramidkv.ops.select.triton import Blocks

    blocks = Blocks(4096, warps)
    assert same_selection((2, 3, 4001), "marked", "rows", 8, True, True, dtype=dtype, device="cuda", blocks=blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("limits", ["alike", "rows", "heads"])
def test_gpu_select_does_not_wait(limits):
    scores, allowed, width, valid = select_case((7, 2, 500), "normal", limits)
    scores, valid = scores.cuda(), valid.cuda()
    allowed = allowed.cuda() if isinstance(allowed, torch.Tensor) else allowed
    select(scores, allowed, width, recent=8, valid=valid, finite=True)  # compiled, and memory allocated
    with never_waiting():
        select(scores, allowed, width, recent=8, valid=valid, finite=True)


def heads_case(shape, kind, share, recent, seed=0, device="cpu"):
    """Scores, with great ones behind; shares and available slots of each row; which slots are valid."""
    rows, heads, slots = shape
    make = torch.Generator().manual_seed(seed + sum(shape))
    fused = torch.rand(rows, heads, slots + 3, generator=make) ** 4 * torch.arange(1, heads + 1)[:, None] - 0.3
    fused[..., slots:] = 1e30
    scores = fused[..., :slots]
    if kind == "ties":
        scores.copy_((scores * 4).round() / 4)
    elif kind == "equal":  # zeros are equal whatever their sign
        scores.fill_(0.0)
        scores[:, 0] = -0.0
    elif kind == "extreme":
        which = torch.randint(0, 12, scores.shape, generator=make)
        for i, value in enumerate(EXTREME):
            scores.masked_fill_(which == i, value)
    available = [max(slots - 41 * row, min(slots, recent + 1)) for row in range(rows)]
    valid = None
    if rows > 1 or kind == "holes":
        valid = torch.arange(slots) >= slots - torch.tensor(available)[:, None]
    if kind == "holes":  # heads that hold unequal numbers
        valid = valid[:, None].repeat(1, heads, 1)
        valid[:, 0, : slots // 3] = False
        valid[:, -1, slots - 2 :] = False
    shares = [max(1, int(most * share)) for most in available]
    return scores.to(device), shares, available, recent, None if valid is None else valid.to(device)


def same_limits(shape, kind, share, recent, device="cpu"):
    """Whether the kernels give each head what plain torch does."""
    from pyramidkv.ops.heads import triton

    expected = heads_naive.head_limits(*heads_case(shape, kind, share, recent))
    with poisoned():
        got = triton.head_limits(*heads_case(shape, kind, share, recent, device=device))
    return got.dtype == torch.int32 and torch.equal(got.cpu(), expected)


@interpreted
@pytest.mark.parametrize(
    ("shape", "kind", "share", "recent"),
    [
        ((1, 1, 1), "normal", 0.5, 0),
        ((1, 3, 128), "normal", 0.7, 5),
        ((1, 3, 128), "ties", 0.6, 0),
        ((1, 2, 128), "equal", 0.7, 32),
        ((1, 3, 100), "extreme", 0.9, 3),
        ((1, 2, 400), "holes", 0.9, 5),
        ((1, 3, 1300), "normal", 0.3, 0),  # several blocks
        ((2, 3, 300), "holes", 0.6, 40),
        ((7, 1, 70), "normal", 1.0, 9),
    ],
)
def test_interpreted_head_limits(shape, kind, share, recent):
    assert same_limits(shape, kind, share, recent)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 130), (7, 3, 1000), (1, 32, 6144), (8, 32, 6144), (3, 40, 9000)])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "extreme", "holes"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("recent", [0, 32])
def test_gpu_head_limits(shape, kind, share, recent):
    assert same_limits(shape, kind, share, recent, "cuda")


@pytest.mark.gpu
def test_gpu_head_limits_does_not_wait():
    case = heads_case((7, 2, 500), "normal", 0.5, 8, device="cuda")
    head_limits(*case)  # compiled, and memory allocated
    with never_waiting():
        head_limits(*case)


def compact_case(shape, dtype, stored, seed=0, device="cpu"):
    """Slots as views of one fused projection, NaN where none is kept; which to keep; buffers full of garbage."""
    rows, heads, slots, kept, size, value_size = shape
    make = torch.Generator().manual_seed(seed + sum(shape))
    fused = torch.randn(rows, slots, heads, size + value_size + 16, generator=make).transpose(1, 2).to(dtype)
    index = torch.rand(rows, heads, slots, generator=make).argsort(-1)[..., :kept].sort(-1).values
    index[torch.rand(rows, heads, kept, generator=make).sort(-1).values < 0.2] = -1
    used = torch.zeros(rows, heads, slots + 1, dtype=torch.bool).scatter_(2, index.where(index >= 0, slots), True)
    fused = fused.masked_fill(~used[..., :slots, None], float("nan"))
    positions = (torch.arange(slots, dtype=torch.int32) * 3)[None, None].expand(rows, heads, slots)
    targets = (
        torch.full((rows, heads, kept + 5, size), float("nan"), dtype=stored),
        torch.full((rows, heads, kept + 5, value_size), float("nan"), dtype=stored),
        torch.full((rows, heads, kept + 5), 77, dtype=torch.int32),
    )
    fused, index, positions = (t.to(device) for t in (fused, index, positions))
    sources = fused[..., :size], fused[..., size : size + value_size], positions
    return sources, index, tuple(t.to(device) for t in targets)


@pytest.mark.parametrize("shape", COMPACT)
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_compact_is_its_definition(shape, dtype, stored):
    sources, index, targets = compact_case(shape, dtype, stored)
    expected = [t.clone() for t in targets]
    for b in range(shape[0]):
        for h in range(shape[1]):
            for n, slot in enumerate(index[b, h].tolist()):
                for source, target, empty in zip(sources, expected, (0, 0, -1), strict=True):
                    target[b, h, n] = empty if slot < 0 else source[b, h, slot]
    compact(sources, index, targets)
    assert same(targets, expected)


def test_the_reason_for_plain_torch_is_given_by_compact():
    def reason(dtype, size=8):
        sources, _, targets = compact_case((1, 1, 2, 1, size, size), dtype, dtype)
        return compact_package.why_naive(sources, targets)

    assert "on cpu" in reason(torch.float32)
    assert "float64" in reason(torch.float64)
    assert "512" in reason(torch.float32, 512)


def same_compaction(shape, dtype, stored, device="cpu", **options):
    """Whether the kernel writes what plain torch does, and nothing else."""
    from pyramidkv.ops.compact import triton

    sources, index, targets = compact_case(shape, dtype, stored, device=device)
    expected = tuple(t.clone() for t in targets)
    compact_naive.compact(sources, index, expected)
    with poisoned():
        triton.compact(sources, index, targets, **options)
    return same(targets, expected)


@interpreted
@pytest.mark.parametrize("shape", COMPACT)
@pytest.mark.parametrize(("dtype", "stored"), [*DTYPES[:2], DTYPES[3]])
def test_interpreted_compact(shape, dtype, stored):
    assert same_compaction(shape, dtype, stored)


@interpreted
@pytest.mark.parametrize("halves", [True, False])
def test_interpreted_compact_in_smaller_blocks(halves):
    from pyramidkv.ops.compact.triton import Blocks

    assert same_compaction(COMPACT[0], torch.float16, torch.float16, blocks=Blocks(16, 1, halves))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [*COMPACT, (1, 32, 6144, 1536, 80, 80), (7, 8, 1001, 333, 128, 128), (2, 4, 99, 50, 256, 256)]
)
@pytest.mark.parametrize(("dtype", "stored"), DTYPES)
def test_gpu_compact(shape, dtype, stored):
    assert same_compaction(shape, dtype, stored, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("warps", [2, 4, 8])
@pytest.mark.parametrize("halves", [True, False])
def test_gpu_compact_in_all_its_variants(rows, warps, halves):
    from pyramidkv.ops.compact.triton import Blocks

    assert same_compaction(
        (2, 3, 500, 201, 80, 80), torch.float16, torch.float16, "cuda", blocks=Blocks(rows, warps, halves)
    )


def pools_alike(shape, kernel, kind, valid, old, device="cpu"):
    """Whether the kernel pools valid scores as plain torch does; what is left out is NaN."""
    from pyramidkv.ops.pooling import triton

    rows, heads, slots = shape
    scores = torch.rand(rows, heads, slots + 3, device=device)[..., :slots]
    real = None
    if valid != "all":
        real = torch.rand(rows, heads if valid == "heads" else 1, slots, device=device) < 0.7
        scores = scores.masked_fill(~real, math.nan)
    with poisoned():
        got = triton.pool(scores, kernel, kind, real, old)
    expected = pooling_naive.pool(scores, kernel, kind, real, old)
    if real is not None:
        got, expected = (x.masked_fill(~real, 0) for x in (got, expected))
    return torch.allclose(got, expected, rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("valid", ["all", "rows", "heads"])
@pytest.mark.parametrize(
    ("shape", "kernel", "old"), [((1, 1, 1), 3, None), ((7, 2, 37), 5, 30), ((2, 3, 1100), 7, 1060)]
)
def test_interpreted_pooling(shape, kernel, old, kind, valid):
    assert pools_alike(shape, kernel, kind, valid, old)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("valid", ["all", "rows", "heads"])
@pytest.mark.parametrize(("shape", "kernel"), [((1, 32, 6144), 5), ((7, 8, 2049), 7), ((1, 1, 1), 3), ((2, 3, 40), 63)])
@pytest.mark.parametrize("newest", [0, 32, 100_000])
def test_gpu_pooling(shape, kernel, kind, valid, newest):
    assert pools_alike(shape, kernel, kind, valid, max(shape[2] - newest, 0), "cuda")
