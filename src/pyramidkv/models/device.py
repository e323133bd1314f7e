"""Where a model goes and in which precision: "auto" and friends made into a device and a dtype, and what fits there."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from pyramidkv.config import unknown
from pyramidkv.errors import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str = "auto") -> torch.device:
    """The device of "auto", "cpu", "cuda", "cuda:N" or "mps". Raises `ConfigError` if it is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise ConfigError(f"device={device!r}: {unknown(device, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device='mps': this machine has no Metal device; use device='cpu'")
    if kind == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            why = "no GPU was found" if torch.version.cuda else f"this torch ({torch.__version__}) has no CUDA in it"
            raise ConfigError(f"device={device!r}: {why}; use device='cpu' or 'auto'")
        if int(number or 0) >= gpus:
            raise ConfigError(f"device={device!r}: this machine has {gpus} GPU(s), numbered from 0")
        return torch.device("cuda", int(number) if number else torch.cuda.current_device())
    return torch.device(kind)


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The dtype of a name in `DTYPES` or "auto": float32 on a CPU, elsewhere the checkpoint's own, else bfloat16."""
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(f"dtype={dtype!r}: {unknown(dtype, ('auto', *DTYPES))}")
    if device.type == "cpu":
        return torch.float32  # half precision is slow there, and rounds for nothing
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Memory of a device, free or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().total)
