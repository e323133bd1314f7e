"""From a model's name to its config or to a loaded model: one place for every command that takes `--model`.

Whatever can be wrong (the name, the device, the memory) is found out before weights are read. Nothing is ever put in
the place of what was asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyramidkv.models as shipped
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, DataError
from pyramidkv.models.device import free_bytes, pick_device, pick_dtype
from pyramidkv.models.hub import hub_problem
from pyramidkv.models.shapes import DEFAULT_MODEL, RANDOM, SHAPES, shape_config
from pyramidkv.plan import plan_of
from pyramidkv.shape import cache_shape

__all__ = ["DEFAULT_MODEL", "RANDOM", "LoadedModel", "count_parameters", "load_config", "load_model", "load_tokenizer"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    model: Any  # a transformers causal language model, in eval mode
    tokenizer: Any | None  # None for random weights, and for a folder that has none
    name: str
    weights_random: bool
    parameters: int


def load_config(name: str) -> Any:
    """The `transformers` config of a model, without its weights.

    Args:
        name: "neox-16m" (shipped), a built-in shape ("pythia-2.8b" or "random:pythia-2.8b"), a local folder, a local
            `.gguf` file, or a Hugging Face hub id.

    Raises:
        ConfigError: the name can't be one of these.
        DataError: what it names can't be had or read.
    """
    if name.startswith(RANDOM):
        return shape_config(name.removeprefix(RANDOM), given=name)
    if name in SHAPES and not Path(name).exists():
        return shape_config(name)
    return _read("AutoConfig", name, _arguments(name))


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", settings: Sequence[CompressionConfig] = ()
) -> LoadedModel:
    """Load a model, or make one with random weights ("random:SHAPE"), in eval mode.

    Args:
        name: as for `load_config`, but a shape needs its "random:".
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (float32 on a CPU, elsewhere the checkpoint's own), "float32", "float16" or "bfloat16".
        settings: what it is to be compressed by.

    Raises:
        ConfigError: a name, a device or a dtype that is not there; a model that does not fit, or that `settings` do not
            go with.
        DataError: a model that can't be had or read.
        UnsupportedError: an architecture that can't be compressed.
    """
    place = pick_device(device)
    if name in SHAPES and not Path(name).exists():
        raise ConfigError(
            f"model={name!r}: a shape, which has no weights; give '{RANDOM}{name}' for random ones, "
            f"or {SHAPES[name].hub!r} for the trained ones from the hub"
        )
    config = load_config(name)
    shape = cache_shape(config)
    for setting in settings:
        plan_of(setting, shape)
    chosen = pick_dtype(dtype, place, config)
    parameters = count_parameters(config)
    random = name.startswith(RANDOM)
    _check_fits(name, config, parameters, chosen, place, through_host=not random)
    if random:
        model = _random_model(config, place, chosen)
        return LoadedModel(model, None, name, True, parameters)
    arguments = _arguments(name)
    model = _read("AutoModelForCausalLM", name, arguments | {"dtype": chosen})
    return LoadedModel(model.to(place).eval(), load_tokenizer(name), name, False, parameters)


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a model, without its weights; None for random weights, and for a folder that has none.

    `name` and errors: as for `load_config`.
    """
    if name.startswith(RANDOM):
        return None
    arguments = _arguments(name)
    return _read("AutoTokenizer", name, arguments) if _has_tokenizer(arguments) else None


def count_parameters(config: Any) -> int:
    """Parameters of the model of a config, tied ones once. No memory is taken."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _arguments(name: str) -> dict[str, Any]:
    """Where `from_pretrained` finds a model that is not a built-in shape."""
    if name in shipped.NAMES:
        return {"pretrained_model_name_or_path": str(shipped.path(name))}
    if not name:
        raise ConfigError("model='': empty; give a name, a folder, a .gguf file or a hub id")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"model={name!r}: reading a .gguf file needs gguf: pip install gguf")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_file():
        raise ConfigError(f"model={name!r}: a file, but not a .gguf; give the folder that holds config.json")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"model={name!r}: this folder has no config.json, so it is not a transformers model")
        return {"pretrained_model_name_or_path": str(path)}
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise DataError(f"model={name!r}: no such file or folder")
    # With the hub away, what was downloaded before is still good; asking for it at once spares the client's retries.
    return {"pretrained_model_name_or_path": name, "local_files_only": hub_problem() is not None}


def _read(reader: str, name: str, arguments: dict[str, Any]) -> Any:
    """Call `from_pretrained` of a `transformers` class; its many errors become a `DataError`."""
    import transformers

    if "local_files_only" not in arguments and reader == "AutoModelForCausalLM" and "gguf_file" not in arguments:
        folder = Path(arguments["pretrained_model_name_or_path"])
        if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
            raise DataError(f"model={name!r}: this folder has a config.json but no weights (*.safetensors)")
    try:
        return getattr(transformers, reader).from_pretrained(**arguments)
    except Exception as error:
        # Broad, because from_pretrained raises whatever the parser of a broken file raises. The cause is kept.
        raise DataError(f"model={name!r}: {_explain(name, arguments, error)}") from error


def _explain(name: str, arguments: dict[str, Any], error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if "local_files_only" not in arguments:
        return f"can't be read ({first})"
    if arguments["local_files_only"]:
        tried = f"not a file or folder here, not in the hub's local cache, and {hub_problem()}"
    else:
        tried = f"not a file or folder here, and the hub says: {first}"
    return f"{tried}. {_offline_advice(name)}"


def _offline_advice(name: str) -> str:
    """What works without the hub, the nearest first."""
    short = name.rsplit("/", 1)[-1].lower()
    if short in SHAPES:
        return f"Without a network: '{RANDOM}{short}' has its shape and random weights; {DEFAULT_MODEL!r} is trained"
    near = difflib.get_close_matches(name, [DEFAULT_MODEL, *(RANDOM + shape for shape in SHAPES)], n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Without a network: {DEFAULT_MODEL}, a folder, a .gguf file, or {RANDOM}SHAPE of {', '.join(SHAPES)}"


def _has_tokenizer(arguments: dict[str, Any]) -> bool:
    if "gguf_file" in arguments or "local_files_only" in arguments:
        return True
    folder = Path(arguments["pretrained_model_name_or_path"])
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _check_fits(
    name: str, config: Any, parameters: int, dtype: torch.dtype, place: torch.device, *, through_host: bool
) -> None:
    """Raise `ConfigError` if the weights are larger than what is free where they must go."""
    if getattr(config, "quantization_config", None) is not None:
        return  # stored in fewer bits than the dtype says, by a rule of the checkpoint's own
    need = parameters * dtype.itemsize
    for device in dict.fromkeys((place, torch.device("cpu")) if through_host else (place,)):
        free = free_bytes(device)
        if need > free:
            where = "this machine" if device.type == "cpu" else str(device)
            raise ConfigError(
                f"model={name!r}: its {parameters:,} parameters take {need:,} bytes in {str(dtype)[6:]}, and {where} "
                f"has {free:,} bytes free; take a smaller model"
                + (", or dtype='bfloat16'" if dtype.itemsize == 4 and need // 2 <= free else "")
            )


def _random_model(config: Any, place: torch.device, dtype: torch.dtype) -> Any:
    """A model made where it will run, each weight drawn once (transformers' own way draws them several times)."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    with torch.device(place), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.normal_(std=config.initializer_range)
            elif isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
    return model.eval()
