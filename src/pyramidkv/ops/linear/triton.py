"""The same as `naive.py`, bound by the reading of the weight alone.

One row of x: each program takes a few rows of the weight, whole, and its threads ask for all of them at once: enough is
under way on all multiprocessors to cover the latency of the memory. Every thread has the same channels of each row, so
that x is read once a program and sums cross the warps once, at the end.

More rows: the weight is the tall operand of the tensor cores, x padded to 16 rows the other. Where one program for each
64 rows of the weight would leave the device idle, the channels are split over several, whose sums a second kernel adds
in order.

A program asks for its first weights before it waits for the kernel that writes x (`overlap`, compute capability 9 and
later): weights do not depend on it.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,misc"
# ruff: noqa: N803, N806, RUF005

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyramidkv.ops.kernels import dense, power_of_two

LINE = 64  # numbers of 2 bytes in a cache line
AT_ONCE = 20  # loads of 16 bytes a thread


@dataclass(frozen=True)
class Blocks:
    """How a weight is cut up."""

    rows: int  # of the weight, a program
    warps: int
    ahead: int = 0  # steps under way, of several rows of x
    wide: int = 0  # channels a step, of several rows of x
    splits: int = 1  # programs over the channels
    overlap: bool = False  # start before the kernel in front has ended


@dataclass(frozen=True)
class Device:
    """What the tiles depend on; an H100's if nothing is said."""

    processors: int = 132
    shared: int = 232448  # bytes of shared memory that a program may have
    overlap: bool = False  # whether a kernel can start before the one in front has ended


@functools.cache
def device_of(device: torch.device) -> Device:
    """The facts about a device."""
    if device.type != "cuda":
        return Device()  # the interpreter's
    about = torch.cuda.get_device_properties(device)
    shared = getattr(about, "shared_memory_per_block_optin", 49152)  # what every device has
    return Device(about.multi_processor_count, shared, about.major >= 9)


def choose(rows: int, outputs: int, channels: int, device: Device) -> Blocks:
    """Tiles for `rows` of x and a weight of (outputs, channels)."""
    if rows == 1:
        warps = 1
        while warps < 8 and channels > 5 * 256 * warps:
            warps *= 2
        steps = triton.cdiv(channels, 256 * warps)
        each = 4
        while each > 1 and each * steps > AT_ONCE:
            each //= 2
        return Blocks(each, warps, overlap=device.overlap)
    tiles, steps = triton.cdiv(outputs, 64), triton.cdiv(channels, 128)
    ahead = min(6, steps, device.shared // ((64 + 16) * 128 * 2) - 1)
    if device.processors < tiles <= 1.5 * device.processors:  # a second wave would leave most of the device idle
        return Blocks(64, 4, min(2, ahead), 128, 2, device.overlap)
    splits = max(1, min(device.processors // tiles, steps // 4, 8))
    return Blocks(64, 4, ahead, 128, splits, device.overlap)


@triton.jit
def _weights(w, at, channel, FIRST: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """WIDE channels from FIRST on; what is past K is zero."""
    if FIRST + WIDE <= K:
        return tl.load(w + at + FIRST, eviction_policy="evict_first")
    inside = (FIRST + channel < K)[None, :]
    return tl.load(w + at + FIRST, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, channel, FIRST: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """As `_weights`, of the one row of x."""
    if FIRST + WIDE <= K:
        return tl.load(x + FIRST + channel)
    return tl.load(x + FIRST + channel, mask=FIRST + channel < K, other=0.0)


@triton.jit
def vector_kernel(
    x, w, bias, out, N, swn,
    K: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(N / ROWS,) programs: the product of one row of x with ROWS rows of the weight."""
    STEPS: tl.constexpr = (K + WIDE - 1) // WIDE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    at = tl.minimum(row, N - 1).to(tl.int64)[:, None] * swn + channel[None, :]
    weights = ()
    for i in tl.static_range(STEPS):
        weights = weights + (_weights(w, at, channel, i * WIDE, K, WIDE),)
    if HAS_BIAS:
        shift = tl.load(bias + row, mask=row < N, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: who comes next may count on all but this kernel
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    for i in tl.static_range(STEPS):
        part = _inputs(x, channel, i * WIDE, K, WIDE)
        sums += weights[i].to(tl.float32) * part.to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    if HAS_BIAS:
        total += shift.to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def _fetch(w, row, swn, first, LINES: tl.constexpr, LINE: tl.constexpr):
    """Have LINES cache lines of each row of the weight brought to the L2 cache."""
    line = w + row.to(tl.int64)[:, None] * swn + (first + tl.arange(0, LINES) * LINE)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["M"])
def dot_kernel(
    x, w, bias, out, part, M, N, sxm, swn,
    K: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr, PAD: tl.constexpr,
    SPLITS: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
    HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """(N / ROWS, SPLITS) programs: the product of up to PAD rows of x with a tile of the weight."""
    STEPS: tl.constexpr = (K + WIDE - 1) // WIDE
    EACH: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS * WIDE
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    low = split * EACH
    high = tl.minimum(low + EACH, K)
    channel = tl.arange(0, WIDE)
    rank = tl.arange(0, PAD)
    real = rank < M
    there = tl.minimum(row, N - 1)
    if HAS_BIAS:
        shift = tl.load(bias + there)
    if OVERLAP:
        if LINES * LINE <= K:
            _fetch(w, there, swn, tl.minimum(low, K - LINES * LINE), LINES, LINE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    weights = w + there.to(tl.int64)[:, None] * swn + channel[None, :]
    inputs = x + rank[None, :] * sxm + channel[:, None]
    sums = tl.zeros([ROWS, PAD], tl.float32)
    for k in tl.range(low, high, WIDE, num_stages=AHEAD + 1):
        if K % WIDE == 0:
            weight = tl.load(weights + k, eviction_policy="evict_first")
            some = tl.load(inputs + k, mask=real[None, :], other=0.0)
        else:
            inside = k + channel < K
            weight = tl.load(weights + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            some = tl.load(inputs + k, mask=inside[:, None] & real[None, :], other=0.0)
        sums = tl.dot(weight, some, sums)
    keep = real[:, None] & (row < N)[None, :]
    place = rank[:, None] * N + row[None, :]
    sums = tl.trans(sums)
    if SPLITS > 1:
        tl.store(part + split * M * N + place, sums, mask=keep)
    else:
        if HAS_BIAS:
            sums += shift.to(tl.float32)[None, :]
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=keep)


@triton.jit
def join_kernel(
    part, bias, out, N, SPLITS: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr
):
    """(N / WIDE, M) programs: the sums of the splits, in order."""
    row = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    place = tl.program_id(1) * N + row
    keep = row < N
    total = tl.zeros([WIDE], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=keep, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: who comes next may count on all but this kernel
    for i in tl.static_range(SPLITS):
        total += tl.load(part + i * tl.num_programs(1) * N + place, mask=keep, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, blocks: Blocks | None = None) -> Tensor:
    """As `naive.linear`: up to 16 rows, (M, K), with (N, K) and (N,); (M, N).

    Any strides do for x and weight, as long as the channels lie side by side.
    """
    rows, channels = x.shape
    outputs = weight.shape[0]
    x = dense(x)
    if blocks is None:
        blocks = choose(rows, outputs, channels, device_of(x.device))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    given = out if bias is None else bias
    early = {"launch_pdl": True} if blocks.overlap else {}
    if rows == 1:
        vector_kernel[(triton.cdiv(outputs, blocks.rows),)](
            x, weight, given, out, outputs, weight.stride(0),
            K=channels, ROWS=blocks.rows, WIDE=256 * blocks.warps,
            HAS_BIAS=bias is not None, OVERLAP=blocks.overlap, num_warps=blocks.warps, **early,
        )  # fmt: skip
        return out
    steps = triton.cdiv(channels, blocks.wide)
    splits = triton.cdiv(steps, triton.cdiv(steps, blocks.splits))  # none without channels
    part = out
    if splits > 1:
        part = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    dot_kernel[(triton.cdiv(outputs, blocks.rows), splits)](
        x, weight, given, out, part, rows, outputs, x.stride(0), weight.stride(0),
        K=channels, ROWS=blocks.rows, WIDE=blocks.wide, AHEAD=blocks.ahead, PAD=16,
        SPLITS=splits, LINES=power_of_two(blocks.ahead * blocks.wide // LINE + 1) // 2, LINE=LINE,
        HAS_BIAS=bias is not None, OVERLAP=blocks.overlap, num_warps=blocks.warps, **early,
    )  # fmt: skip
    if splits > 1:
        join_kernel[(triton.cdiv(outputs, 256), rows)](
            part, given, out, outputs,
            SPLITS=splits, WIDE=256, HAS_BIAS=bias is not None, OVERLAP=blocks.overlap, num_warps=2, **early,
        )  # fmt: skip
    return out
