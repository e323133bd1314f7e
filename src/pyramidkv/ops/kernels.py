"""Whether the Triton kernels can serve a call, and the sizes that they share."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

SMALLEST, LARGEST = 16, 256  # head sizes
READ = (torch.float16, torch.bfloat16, torch.float32)
_TRITON = importlib.util.find_spec("triton") is not None


def why_no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device; None if one can."""
    if os.environ.get("PYRAMIDKV_TRITON") == "0":
        return "PYRAMIDKV_TRITON=0"
    if device.type != "cuda":
        return f"the tensors are on {device.type}: the kernels are for CUDA"
    if torch.version.hip is not None:
        return "the kernels have not been tried on ROCm"
    if not _TRITON:
        return "triton is not installed"
    if _capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def why_naive(query: Tensor) -> str | None:
    """Why a call with this query, (B, Hq, Q, D), runs in plain torch; None if a Triton kernel can serve it."""
    if reason := why_no_triton(query.device):
        return reason
    if query.dtype not in READ:
        return f"the kernels do not read {str(query.dtype).removeprefix('torch.')}"
    if not SMALLEST <= query.shape[-1] <= LARGEST:
        return f"head size {query.shape[-1]} is not between {SMALLEST} and {LARGEST}"
    if torch.is_grad_enabled() and query.requires_grad:
        return "a gradient is asked for"
    return None


def parts(size: int) -> tuple[int, int]:
    """A head size as two powers of two that a tile can have, the second 0 if one will do: 80 is 64 + 16.

    Padded to 128, a dot over 80 channels would cost 1.6 times its arithmetic. The second part may reach past the size
    (72 is 64 + 16): its last channels are masked.
    """
    first = 1 << (size.bit_length() - 1)
    rest = size - first
    return first, 0 if rest == 0 else max(16, power_of_two(rest))


def tiles(n: int, size: int) -> int:
    """How many tiles of that size n takes."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one, where Triton launches; layers of one model may lie on several."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":  # the interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its channels do not lie side by side, which is all that the kernels ask of a layout."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
