"""Checksums by which a damaged file is told from a whole one (CRC-32, which finds every single changed byte).

They are no seal against somebody who changes a file on purpose, and the checksums with it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def of_tensor(tensor: Tensor) -> str:
    """Of the type, the shape and the bytes of a tensor on the CPU."""
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return _hex(tensor.contiguous().view(-1).view(torch.uint8).numpy(), zlib.crc32(head))


def of_texts(texts: Mapping[str, str]) -> str:
    """Of texts and their names, in any order."""
    return _hex(json.dumps(dict(texts), sort_keys=True).encode())


def _hex(data: Any, start: int = 0) -> str:
    return f"{zlib.crc32(data, start):08x}"
