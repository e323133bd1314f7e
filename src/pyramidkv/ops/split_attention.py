"""Causal attention of a chunk over kept and new keys, by cuDNN's kernel: the kept, then the new, then both as one.

cuDNN's attention is the fastest there is on an H100, but torch lets it mask no other way than from the upper left: the
causal mask of as many queries as keys. So the kept keys, which every new query sees, are attended to without a mask,
the new ones with that mask, and the two joined by their log-sum-exps.

cuDNN builds a plan for every new shape and stride, which costs the host tens of milliseconds, and torch never lets one
go. So few shapes are asked for: numbers of queries that are multiples of `STEP`, as chunks are (`chunks.even_sizes`),
and round numbers of kept keys, `PLANS` from each power of two to the next; those left over go to torch's flash kernel,
which plans nothing. Keys lie token by token (`ops/append`), and rows are attended to one by one, so that no stride
depends on how many keys or rows there are. Layers of a pyramid then share their plans, and so does the next prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from pyramidkv.ops.merge import Part, merge

LEAST = 1024  # queries: fewer are not worth several launches
STEP = 256  # queries
PLANS = 4  # numbers of kept keys between a power of two and the next that cuDNN is asked for; 0: none

# (query (1, Hq, Q, D), key (1, Hkv, K, D), value, scaling, causal from the upper left) to the part.
Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], Part]


def why_not(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """Why a call is not split; None if it can and should be."""
    if reason := shape_why_not(query, key, value, dropout):
        return reason
    if not query.is_cuda or torch.version.hip is not None:
        return "it is for CUDA"
    if not torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
        return "cuDNN attention is turned off"
    if reason := _why_not_on(query.device):
        return reason
    past = key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    params = torch.backends.cuda.SDPAParams(query, key[:, :, past:], value[:, :, past:], None, 0.0, True, grouped)
    if not torch.backends.cuda.can_use_cudnn_attention(params):
        return (
            "torch says that cuDNN attention can't be used: torch.backends.cuda.can_use_cudnn_attention has the reason"
        )
    return None


@lru_cache
def _why_not_on(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "cuDNN attention is not what torch prefers on this GPU"
    if (torch.backends.cudnn.version() or 0) <= 91500:  # type: ignore[no-untyped-call]
        return "torch does not trust cuDNN attention before cuDNN 9.15.1"
    return None


def wants_tokens(new: Tensor) -> bool:
    """Whether a chunk with these new keys, (B, Hkv, Q, D), may be split if its keys lie token by token."""
    return new.is_cuda and new.shape[2] >= LEAST and new.shape[2] % STEP == 0


def shape_why_not(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """Of that, what depends on shapes, strides and dtypes alone."""
    queries, size = query.shape[2], query.shape[-1]
    if queries < LEAST or queries % STEP or queries >= key.shape[2]:
        return f"{queries} queries of {key.shape[2]} tokens are not a multiple of {STEP} from {LEAST} on, over a past"
    if query.dtype not in (torch.float16, torch.bfloat16) or not query.dtype == key.dtype == value.dtype:
        return "the tensors are not all float16 or all bfloat16"
    if size % 8 or size > 128 or value.shape[-1] != size:
        return f"head size {size} is not a multiple of 8 up to 128"
    if any(t.stride(-1) != 1 or t.stride(1) > t.stride(2) for t in (key, value)):
        return "keys and values do not lie token by token: every length would need a plan of its own"
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        return "a gradient is asked for"
    return None


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    planned: Kernel | None = None,
    unplanned: Kernel | None = None,
) -> Tensor:
    """Causal attention; the queries are the last Q of the K tokens, Q < K.

    Args:
        query: (B, Hq, Q, D).
        key, value: (B, Hkv, K, D), Hq a multiple of Hkv.
        scaling: factor of the logits.
        planned, unplanned: the kernels for round numbers of keys and for any; None: cuDNN's and torch's flash kernel.

    Returns:
        (B, Hq, Q, D), which lies as (B, Q, Hq, D).
    """
    planned, unplanned = planned or _cudnn, unplanned or _flash
    rows, heads, queries, size = query.shape
    slots = key.shape[2]
    past = slots - queries
    some = round_number(past)
    out = query.new_empty(rows, queries, heads, size).transpose(1, 2)
    for row in range(rows):
        q = _of_one_row(query, row, 0, queries)
        parts = [
            kernel(q, _of_one_row(key, row, begin, end), _of_one_row(value, row, begin, end), scaling, end == slots)
            for kernel, begin, end in ((planned, 0, some), (unplanned, some, past), (planned, past, slots))
            if begin < end
        ]
        merge(parts, out[row : row + 1])
    return out


def round_number(keys: int) -> int:
    """The largest number of keys up to `keys` that has a plan: 0, or one of `PLANS` in every doubling, from 256 on."""
    if PLANS == 0 or keys < 256:
        return 0
    step = max((1 << (keys.bit_length() - 1)) // PLANS, 1)
    return keys - keys % step


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Part:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return out, lse.view(query.shape[:3])


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Part:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return out, lse


def _of_one_row(tensor: Tensor, row: int, begin: int, end: int) -> Tensor:
    """The tokens [begin, end) of a row as (1, H, N, D); its stride to the next row, which is not there, says N only."""
    _, heads, _, size = tensor.shape
    rows, *strides = tensor.stride()
    count = end - begin
    first = tensor.storage_offset() + row * rows + begin * strides[1]
    return tensor.as_strided((1, heads, count, size), (heads * count * size, *strides), first)
