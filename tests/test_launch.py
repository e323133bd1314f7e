"""Launches that skip what Triton works out at every call: the same results, whatever the tensors.

Run by `test_kernels.test_triton_in_its_interpreter`, and on a GPU.
"""
# ruff: noqa: N803

import pytest
import torch

from kernel_testing import HAS_TRITON, interpreted
from pyramidkv.ops import kernels
from pyramidkv.ops.launch import Launch

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def scaled_kernel(x, out, count, factor, BLOCK: tl.constexpr, ADD: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        number = tl.load(x + place, mask=place < count, other=0.0) * factor + ADD
        tl.store(out + place, number.to(out.dtype.element_ty), mask=place < count)


def agrees(launch, x):
    out = torch.empty_like(x)
    with kernels.on(x.device):
        launch(x, out)
    return torch.equal(out, x * 0.5 + 3)


def launch_of(count):
    return Launch(scaled_kernel, (kernels.tiles(count, 128),), count, 0.5, BLOCK=128, ADD=3, num_warps=4)


@interpreted
@pytest.mark.parametrize("count", [1, 300])
def test_interpreted_launches(count):
    launch = launch_of(count)
    for _ in range(2):
        assert agrees(launch, torch.randint(-9, 9, (count,)).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_launches_at_any_address(dtype):
    launch = launch_of(4096)
    memory = torch.randint(-9, 9, (4097,), device="cuda").to(dtype)
    for first in (0, 0, 1, 1, 0):  # what is compiled for addresses that 16 divides can't read others
        assert agrees(launch, memory[first : first + 4096])


@pytest.mark.gpu
def test_gpu_launches_of_other_types():
    launch = launch_of(4096)
    for dtype in (torch.float16, torch.float32, torch.float16, torch.bfloat16):
        assert agrees(launch, torch.randint(-9, 9, (4096,), device="cuda").to(dtype))
