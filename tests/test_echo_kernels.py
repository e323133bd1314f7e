"""What the scorer `echo` computes: plain definitions against loops, and Triton against those, as in test_kernels.py."""

import pytest
import torch

from attention_cases import scores_case
from kernel_testing import DTYPES, ERROR, distance, interpreted, never_waiting, random
from pyramidkv.ops import band_scores as band_package
from pyramidkv.ops import turn as turn_package
from pyramidkv.ops.band_scores import band_scores
from pyramidkv.ops.band_scores import naive as band_naive
from pyramidkv.ops.level import level
from pyramidkv.ops.level import naive as level_naive
from pyramidkv.ops.turn import naive as turn_naive
from pyramidkv.ops.turn import turn
from pyramidkv.ops.valid import by_head

# batch, query heads, KV heads, head size, tokens
BAND = [
    (1, 2, 2, 80, 150),
    (1, 1, 1, 32, 9),  # no key is sampled
    (2, 4, 2, 64, 133),
    (1, 8, 1, 128, 60),
    (7, 1, 1, 72, 23),
    (1, 1, 1, 256, 65),
    (2, 2, 1, 96, 48),
]
KINDS = ["none", "padding", "holes", "heads"]
# rows, heads, vectors, head size, rotated channels
TURN = [(1, 2, 70, 80, 20), (7, 1, 5, 128, 128), (2, 3, 65, 64, 32), (1, 1, 1, 96, 96), (3, 1, 4, 72, 0)]


def band_case(shape, dtype, kind, device="cpu"):
    """Queries and keys as views of one fused projection, NaN where no token is real, and which are."""
    query, key, valid = scores_case((*shape, shape[-1]), dtype, "padding" if kind == "heads" else kind, device)
    if kind != "heads":
        return query, key, valid
    _, heads, kv_heads, _, tokens = shape  # each head has lost some tokens of its own
    kept = torch.arange(tokens) % 5 > torch.arange(kv_heads)[:, None] % 3
    valid = valid[:, None] & kept.to(device)
    lost = ~valid[..., None]
    return (
        query.masked_fill(lost.repeat_interleave(heads // kv_heads, 1), float("nan")),
        key.masked_fill(lost, float("nan")),
        valid,
    )


def loops(query, key, scaling, valid):
    """The definition by loops over the tokens, float64."""
    batch, heads, keys, _ = query.shape
    kv_heads = key.shape[1]
    real = torch.ones(batch, keys, dtype=torch.bool) if valid is None else valid
    real = by_head(real).expand(batch, kv_heads, keys)
    total = torch.zeros(batch, kv_heads, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(keys):
                if not real[b, g, i]:
                    continue
                own = key[b, g].double() @ query[b, h, i].double() * scaling
                mass = torch.where(real[b, g], own.exp(), 0.0)
                z = mass[max(i - 16, 0) : i + 17].sum() + 16 * mass[keys % 16 :: 16].sum()
                span = slice(max(i - 4, 0), i + 5)
                total[b, g, span] += (mass[span] / z) ** 2
    return (total / (heads // kv_heads)).sqrt()


@pytest.mark.parametrize("shape", [*BAND, (1, 2, 1, 32, 300)])  # more than are looked at together
@pytest.mark.parametrize("kind", KINDS)
def test_band_scores_are_their_definition(shape, kind):
    query, key, valid = band_case(shape, torch.float32, kind)
    got = band_scores(query, key, 0.2, valid)
    assert got.dtype == torch.float32
    assert distance(got, loops(query, key, 0.2, valid)) < 1e-5


def angles_of(rows, half, device="cpu"):
    angle = 9 * torch.rand(rows, half, generator=torch.Generator().manual_seed(rows + half)).to(device)
    return angle.cos(), angle.sin()


def test_keys_are_turned_first():
    query, key, valid = band_case(BAND[2], torch.float32, "heads")
    angles = angles_of(2, 16)
    got = band_scores(query, key, 0.2, valid, angles)
    assert torch.equal(got, band_scores(query, turn_naive.turn(key, *angles), 0.2, valid))
    assert distance(got, band_scores(query, key, 0.2, valid)) > 0.01


def test_queries_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="query has 3 tokens, key 5"):
        band_scores(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 5, 16), 0.2)


def same_band(shape, kind, dtype=torch.float32, device="cpu", half=0, **options):
    """Relative distance of the kernel to the definition in float32; some queries are so large that they see one key."""
    from pyramidkv.ops.band_scores import triton

    query, key, valid = band_case(shape, dtype, kind, device)
    scaling = shape[3] ** -0.5
    query = query.clone()
    query[:, :, ::11] *= 30
    real = None if valid is None else by_head(valid).contiguous().view(torch.uint8)
    angles = angles_of(shape[0], half, device) if half else None
    lse = triton.sampled_log_sum_exp(query, key, scaling, real, angles)
    got = triton.near_scores(query, key, scaling, lse, real, angles, **options)
    expected = band_naive.band_scores(query.float(), key.float(), scaling, valid, angles)
    assert got.shape == expected.shape and got.dtype == torch.float32
    assert torch.equal(got == 0, expected == 0)
    return distance(got, expected)


@interpreted
@pytest.mark.parametrize(
    ("shape", "kind"), [*((shape, kind) for shape in BAND for kind in ("none", "heads")), (BAND[2], "padding")]
)
def test_interpreted_band_scores(shape, kind):
    assert same_band(shape, kind) < 1e-5


@interpreted
@pytest.mark.parametrize(
    ("shape", "half"), [(BAND[0], 10), (BAND[2], 32), (BAND[4], 36), (BAND[5], 128), (BAND[6], 40)]
)
def test_interpreted_band_scores_of_turned_keys(shape, half):
    assert same_band(shape, "heads" if shape[0] == 2 else "none", half=half) < 1e-5


@interpreted
@pytest.mark.parametrize("queries", [16, 64])
def test_interpreted_band_scores_in_other_tiles(queries):
    from pyramidkv.ops.band_scores.triton import Blocks

    assert same_band((1, 2, 1, 80, 201), "heads", blocks=Blocks(queries, 4)) < 1e-5
    assert same_band((1, 2, 1, 80, 201), "none", torch.float16, blocks=Blocks(queries, 4)) < ERROR[torch.float16]


@interpreted
def test_interpreted_band_scores_of_channels_apart():
    from pyramidkv.ops.band_scores import triton

    query, key, _ = band_case((1, 2, 2, 64, 40), torch.float32, "none")
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key)]
    torch.testing.assert_close(triton.band_scores(*apart, 0.2), triton.band_scores(query, key, 0.2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(32, 32, 80), (32, 8, 128), (8, 1, 128), (4, 1, 256), (8, 8, 96), (8, 4, 64)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 3001), (7, 403), (1, 15)])
def test_gpu_band_scores(dtype, kind, heads, batch, tokens):
    assert same_band((batch, *heads, tokens), kind, dtype, "cuda") < ERROR[dtype]
    assert same_band((batch, *heads, tokens), kind, dtype, "cuda", heads[2] // 8) < ERROR[dtype]


@pytest.mark.gpu
def test_gpu_band_scores_are_the_same_each_time_and_do_not_wait():
    query, key, valid = band_case((2, 8, 4, 80, 1500), torch.float16, "heads", "cuda")
    assert band_package.why_naive(query) is None
    first = band_scores(query, key, 0.1, valid)
    with never_waiting():
        again = [band_scores(query, key, 0.1, valid) for _ in range(3)]
    assert all(torch.equal(first, other) for other in again)


def turn_case(shape, dtype, device="cpu"):
    """Vectors as views of one fused projection, cosines and sines."""
    rows, heads, count, size, rotated = shape
    fused = random(rows, count, 2 * heads, size, dtype=dtype).transpose(1, 2)
    angle = random(rows, rotated // 2, seed=1, dtype=torch.float64) * 1000
    return fused.to(device)[:, heads:], angle.cos().to(device), angle.sin().to(device)


@pytest.mark.parametrize("shape", TURN)
def test_turning_is_a_rotation_of_pairs(shape):
    vectors, cos, sin = turn_case(shape, torch.float32)
    half = shape[-1] // 2
    one, two, rest = vectors.double().split([half, half, shape[3] - 2 * half], -1)
    turned = torch.complex(one, two) * torch.complex(cos, sin)[:, None, None]
    expected = torch.cat([turned.real, turned.imag, rest], -1)
    got = turn(vectors, cos, sin)
    assert got.is_contiguous() and got.dtype == torch.float32
    assert distance(got, expected) < 1e-6
    assert torch.equal(got[..., 2 * half :], vectors[..., 2 * half :])


def test_the_reason_for_plain_torch_is_given_by_echo(monkeypatch):
    vectors = torch.zeros(1, 2, 3, 64)
    assert "on cpu" in turn_package.why_naive(vectors) and "on cpu" in band_package.why_naive(vectors)
    monkeypatch.setenv("PYRAMIDKV_TRITON", "0")
    assert turn_package.why_naive(vectors) == "PYRAMIDKV_TRITON=0"


def same_turn(shape, dtype, device="cpu"):
    """Whether the kernel gives what plain torch does, to the last bit."""
    from pyramidkv.ops.turn import triton

    case = turn_case(shape, dtype, device)
    got = triton.turn(*case)
    return got.is_contiguous() and got.dtype == dtype and torch.equal(got, turn_naive.turn(*case))


@interpreted
@pytest.mark.parametrize("shape", TURN)
@pytest.mark.parametrize("dtype", DTYPES[:2])  # the interpreter cuts numbers off for bfloat16
def test_interpreted_turn(shape, dtype):
    assert same_turn(shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*TURN, (1, 32, 6144, 80, 20), (7, 8, 1001, 128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_turn(shape, dtype):
    assert same_turn(shape, dtype, "cuda")


# rows, heads, older keys, new ones
LEVEL = [(1, 2, 70, 9), (3, 1, 5000, 1030), (2, 3, 1, 1), (7, 5, 64, 128)]


def level_case(shape, kind, device="cpu"):
    """Scores as parts of larger tensors, NaN where they do not count, and which do."""
    rows, heads, past, count = shape
    older = random(rows, heads, past + 3).abs()[..., :past]
    new = 50 * random(rows, heads, count + 5).abs()[..., 5:]
    if kind == "none":
        return older.to(device), new.to(device), None
    valid = torch.rand(rows, heads, past + count, generator=torch.Generator().manual_seed(past)) < 0.7
    valid[0, 0] = False  # no score at all
    valid = valid if kind == "heads" else valid[:, 0]
    lost = ~by_head(valid)
    older = older.masked_fill(lost[..., :past], float("nan"))
    return older.to(device), new.masked_fill(lost[..., past:], float("nan")).to(device), valid.to(device)


@pytest.mark.parametrize("shape", LEVEL)
@pytest.mark.parametrize("kind", ["none", "heads", "rows"])
def test_older_scores_come_to_the_level_of_new_ones(shape, kind):
    older, new, valid = level_case(shape, kind)
    got, past = level(older, new, valid), shape[2]
    assert torch.equal(got[..., past:].nan_to_num(-1), new.nan_to_num(-1))
    counts = torch.ones_like(got, dtype=torch.bool) if valid is None else by_head(valid).expand(got.shape)
    for mine, was, real in zip(got.flatten(0, 1).double(), older.flatten(0, 1), counts.flatten(0, 1), strict=True):
        old, mean = mine[:past][real[:past]], mine[past:][real[past:]].mean()
        if len(old) and mean > 0:
            assert abs(old.mean() / mean - 1) < 1e-5
            factor = old / was[real[:past]]
            assert factor.max() / factor.min() < 1 + 1e-5


def same_level(shape, kind, device="cpu"):
    from pyramidkv.ops.level import triton

    older, new, valid = level_case(shape, kind, device)
    got, expected = triton.level(older, new, valid), level_naive.level(older, new, valid)
    assert torch.equal(got.isnan(), expected.isnan())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("shape", LEVEL)
@pytest.mark.parametrize("kind", ["none", "heads", "rows"])
def test_interpreted_level(shape, kind):
    same_level(shape, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*LEVEL, (1, 32, 4096, 128), (8, 8, 40000, 1024)])
@pytest.mark.parametrize("kind", ["none", "heads", "rows"])
def test_gpu_level(shape, kind):
    same_level(shape, kind, "cuda")
