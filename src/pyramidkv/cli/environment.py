"""What is installed on this machine and what it can run: the facts behind `pyramidkv doctor`. Prints nothing."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from pyramidkv.errors import PyramidKVError
from pyramidkv.models.device import free_bytes, pick_device, total_bytes
from pyramidkv.models.hub import hub_problem
from pyramidkv.models.shapes import DEFAULT_MODEL


@dataclass(frozen=True)
class Package:
    """A package that this one needs, or can use."""

    name: str
    installed: str | None
    wanted: str  # such as ">=5.10,<6"
    extra: str  # the `pip install pyramidkv[extra]` that brings it; "" for a hard requirement

    @property
    def ok(self) -> bool:
        return self.installed is not None and Requirement(self.name + self.wanted).specifier.contains(
            self.installed.split("+")[0], prereleases=True
        )


def packages() -> list[Package]:
    """The requirements in this package's own metadata, then what transformers uses of its own accord."""
    found = []
    for line in metadata.requires("pyramidkv") or []:
        requirement = Requirement(line)
        extra = next((e for e in ("report", "hub") if _only_with(requirement, e)), "")
        if requirement.marker is None or extra:
            wanted = ",".join(sorted(map(str, requirement.specifier), key=lambda bound: bound.startswith("<")))
            found.append(Package(requirement.name, _version(requirement.name), wanted, extra))
    return found + [Package(name, _version(name), "", name) for name in ("gguf", "triton")]


def devices() -> list[dict[str, Any]]:
    """The CPU and every GPU, with their memory."""
    names = [("cpu", f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores")]
    names += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append(("mps", "Metal"))
    places = [(torch.device(device), name) for device, name in names]
    return [
        {"device": str(place), "name": name, "memory_bytes": total_bytes(place), "free_bytes": free_bytes(place)}
        for place, name in places
    ]


def attention_kernels(device: torch.device) -> dict[str, str]:
    """The kernel that SDPA chooses there: for a whole prompt, for a continuation, and for one new token."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    cases = {"prefill": (1024, 1024, True), "decode": (1, 1024, False)}
    return {case: _kernel(device, dtype, *sizes) for case, sizes in cases.items()}


def default_device() -> torch.device:
    """Where commands run if not told otherwise."""
    return pick_device("auto")


def model_problem() -> str | None:
    """Why the model that ships with the package can't be used; None if it can."""
    from pyramidkv.models.source import load_config

    try:
        load_config(DEFAULT_MODEL)
    except PyramidKVError as error:
        return str(error)
    return None


def corpora_problem() -> str | None:
    """Why the corpora on the hub can't be used; None if they can."""
    if _version("datasets") is None:
        return "datasets is not installed: pip install 'pyramidkv[hub]'"
    return hub_problem()


def _only_with(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernel(device: torch.device, dtype: torch.dtype, queries: int, keys: int, causal: bool) -> str:
    query = torch.empty(1, 8, queries, 64, device=device, dtype=dtype)
    key = torch.empty(1, 8, keys, 64, device=device, dtype=dtype)
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "unknown"
    chosen = torch.nn.attention.SDPBackend(choose(query, key, key, None, 0.0, causal))
    return str(chosen.name).lower().removesuffix("_attention")
