"""The small trained language models that ship with the package: loaded from its own files, with no hub and no GPU.

`neox-16m` is a GPT-NeoX of 15.8 million parameters with 4096 positions; its card, README.md in its folder, says what it
was trained on and what it can do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyramidkv.errors import ConfigError, DataError

if TYPE_CHECKING:  # importing this module, which the command line does for its help, loads neither
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NAMES", "load", "path"]

NAMES: tuple[str, ...] = ("neox-16m",)
"""The models there are."""


def path(name: str = "neox-16m") -> Path:
    """The folder of a shipped model, as `from_pretrained` takes it."""
    if name not in NAMES:
        raise ConfigError(f"name={name!r}: must be one of {', '.join(NAMES)}")
    folder = Path(__file__).parent / name
    if not (folder / "model.safetensors").is_file():
        raise DataError(
            f"{folder} holds no model.safetensors: the package was installed without its data; reinstall it"
        )
    return folder


def load(
    name: str = "neox-16m", dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model, in evaluation mode, and its tokenizer; about a second on a CPU, and no network is used.

    `dtype`: of the weights, torch.float32 unless told; they are stored as fp16. The attention implementation is "sdpa".
    """
    import torch
    from transformers import AutoTokenizer, GPTNeoXForCausalLM

    folder = path(name)
    model = GPTNeoXForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), tokenizer
