"""Products of a few rows: Triton against float64, interpreted or on a GPU.

The interpreted tests are run by `test_kernels.test_triton_in_its_interpreter`.
"""

import pytest
import torch

from kernel_testing import distance, interpreted, poisoned, random
from pyramidkv.ops.linear import linear, naive, why_torch

DTYPES = [torch.float16, torch.bfloat16]
ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # one rounding
# rows, outputs, channels
SHAPES = [
    (1, 37, 80),
    (1, 14, 640),
    (1, 5, 1100),  # not a multiple of any tile
    (1, 9, 2560),
    (2, 130, 80),
    (3, 70, 640),
    (7, 67, 1100),
    (16, 64, 1536),
]


def case(shape, dtype, device="cpu"):
    """x and weight as parts of something wider, and a bias."""
    rows, outputs, channels = shape
    x = random(rows, channels + 8, dtype=dtype, device=device)[:, :channels]
    weight = random(outputs, channels + 16, seed=1, dtype=dtype, device=device)[:, :channels]
    return x, weight, random(outputs, seed=2, dtype=dtype, device=device)


def exact(x, weight, bias):
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def check(shape, dtype, blocks=None, device="cpu"):
    from pyramidkv.ops.linear import triton

    x, weight, bias = case(shape, dtype, device)
    for some in (None, bias):
        with poisoned():
            got = triton.linear(x, weight, some, blocks=blocks)
        assert got.shape == shape[:2]
        assert got.dtype == dtype
        assert distance(got, exact(x, weight, some)) < ERROR[dtype]
        if device == "cuda":  # runs agree to the last bit
            with poisoned():
                assert torch.equal(triton.linear(x, weight, some, blocks=blocks), got)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_naive_is_the_product(shape, dtype):
    x, weight, bias = case(shape, dtype)
    for some in (None, bias):
        assert distance(naive.linear(x, weight, some), exact(x, weight, some)) < ERROR.get(dtype, 1e-5)
        assert torch.equal(linear(x, weight, some), naive.linear(x, weight, some))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_linear(shape, dtype):
    if shape[0] > 1 and dtype == torch.bfloat16:
        pytest.skip("the interpreter's dot takes bfloat16 for integers")
    check(shape, dtype)


@interpreted
@pytest.mark.parametrize("options", [(4, 1), (8, 4)], ids=str)  # rows, warps
def test_interpreted_linear_of_one_row_in_other_tiles(options):
    from pyramidkv.ops.linear import triton

    check((1, 9, 1100), torch.float16, triton.Blocks(*options))


@interpreted
@pytest.mark.parametrize("options", [(64, 4, 3, 64, 3), (32, 4, 4, 128, 7), (64, 4, 3, 64), (16, 2, 2, 128)], ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 640), (7, 67, 1100), (9, 33, 512)])
def test_interpreted_linear_of_several_rows_in_other_tiles(shape, options):
    from pyramidkv.ops.linear import triton

    check(shape, torch.float16, triton.Blocks(*options))


@interpreted
@pytest.mark.parametrize("shared", [49152, 101376, 166912, 232448])  # at least, of RTX GPUs, A100, H100
def test_interpreted_tiles_fit_into_the_shared_memory_of_a_device(shared):
    from pyramidkv.ops.linear import triton

    for outputs in (8, 1024, 2560, 7680, 10240, 14336, 50304):
        for channels in (8, 128, 2560, 14336):
            blocks = triton.choose(8, outputs, channels, triton.Device(128, shared))
            assert blocks.ahead >= 1
            assert blocks.splits >= 1
            assert (blocks.ahead + 1) * (blocks.rows + 16) * blocks.wide * 2 <= shared


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2560, 10240), (8, 2560, 10240), (16, 4096, 14336), (5, 50304, 2560)])
def test_linear_on_a_gpu(shape, dtype):
    check(shape, dtype, device="cuda")
    x, weight, bias = case(shape, dtype, "cuda")
    assert (why_torch(x, weight, bias) is None) == (shape[2] % 8 == 0)  # rows begin on borders of 16 bytes
    assert why_torch(x[:, :-1], weight[:, 1:], bias) is not None


def test_what_is_left_to_torch():
    x, weight, bias = case((2, 8, 16), torch.float16)
    assert "cpu" in why_torch(x, weight, bias)
