"""Launches of Triton kernels that have been worked out once: what all layers of one shape do again and again.

To launch a kernel, Triton looks at every argument (its type, whether 16 divides it) to find what it has compiled for
such ones; and an op works out tiles, grids and strides before. Together they take the host longer than most of these
kernels take the device. All of it follows from shapes, strides and settings, so each op keeps a `Launch` for those that
it has met, in an `lru_cache`, and gives it nothing but tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

KNOWN = 1024  # launches that an op keeps; a prefill in chunks meets some for every layer and chunk


class Launch:
    """A kernel with a grid and all of its arguments but the tensors, which come first.

    Args:
        kernel: decorated by `triton.jit`.
        grid: one to three numbers of programs.
        numbers: the arguments that follow the tensors, in order.
        named: those that are `tl.constexpr`, which come last, and Triton's options, such as `num_warps`.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **named: Any) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = numbers
        self._named = named
        self._rest = (*numbers, *(named[name] for name in kernel.arg_names if name in named))
        self._compiled: dict[Any, Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch it on the current device, on which the tensors must be."""
        # Numbers apart, a compiled kernel depends on nothing else.
        kind = tensors[0].device, *[(t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled(*tensors, *self._rest)
            return
        found = self._kernel[self._grid](*tensors, *self._numbers, **self._named)
        if found is not None:  # by the interpreter
            self._compiled[kind] = found[self._grid]


class Shapes(NamedTuple):
    """What a launch over queries (B, Hq, Q, D) and keys (B, Hkv, K, D) follows from."""

    query: tuple[int, ...]
    query_strides: tuple[int, ...]
    key: tuple[int, ...]
    key_strides: tuple[int, ...]
    itemsize: int  # bytes of a number of the keys
    mask_strides: tuple[int, int] | None  # from row to row and from head to head of which keys are real; None: no mask

    @classmethod
    def of(cls, query: Tensor, key: Tensor, real: Tensor | None) -> Shapes:
        """`real` is (B, 1 or Hkv, K)."""
        strides = None if real is None else (real.stride(0), real.stride(1) if real.shape[1] > 1 else 0)
        return cls(query.shape, query.stride(), key.shape, key.stride(), key.itemsize, strides)

    @property
    def strides(self) -> tuple[int, ...]:
        """Those that a kernel is given: three of queries, three of keys, two of the mask."""
        return *self.query_strides[:3], *self.key_strides[:3], *(self.mask_strides or (0, 0))
