"""What the tests of kernels share: where they run, numbers and memory for them, and how results are compared.

Without a GPU, Triton runs in its interpreter, which must be chosen before the kernels are imported:
`test_kernels.test_triton_in_its_interpreter` starts pytest again for all tests that are marked `interpreted`.
"""

import contextlib
import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="run by test_triton_in_its_interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # |out - reference| / |reference|


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def distance(out, reference):
    """Relative; NaN never passes."""
    reference = reference.double()
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-9)).item()


def same(some, others):
    """Whether tensors are equal to the last bit, NaN where the others are."""
    pairs = zip(some, others, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4)) for a, b in pairs)


@contextlib.contextmanager
def poisoned():
    """Uninitialised memory is NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def never_waiting():
    """Whatever waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def spoil_unused(pages):
    """The pages of no head are nobody's business: whoever reads them finds NaN."""
    for codes in (pages.keys, pages.values):
        for name, tensor in codes.tensors().items():
            for row, used in enumerate(pages.count.sum(1).tolist()):
                tensor[row, used:] = 255 if name == "codes" and codes.bits < 16 else float("nan")


def follows_the_length(attend, expected, lengths):
    """Whether what is captured in a graph once stays right for other lengths, in half precision."""
    length = torch.tensor(lengths[:1], dtype=torch.int32, device="cuda")
    attend(length)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(length)
    found = []
    for now in lengths:
        length.fill_(now)
        graph.replay()
        found.append(distance(out, expected(now)) < ERROR[torch.float16])
    return all(found)
