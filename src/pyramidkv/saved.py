"""A cache as a file: a safetensors file whose metadata say what it is, of which model, in which format.

Only the slots in use are written. A file is complete or not there at all; an existing one is left alone unless the
caller says otherwise. What has changed since it was written is found by checksums, of each tensor and of the metadata.
Nothing here knows what a method keeps or why.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyramidkv import checksums
from pyramidkv.config import CompressionConfig
from pyramidkv.errors import ConfigError, DataError
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.quantize import Codes
from pyramidkv.packed import PackedStorage
from pyramidkv.ring import QueryRing
from pyramidkv.shape import CacheShape, cache_shape
from pyramidkv.sliding import SlidingLayer
from pyramidkv.storage import Storage

KIND = "pyramidkv cache"
FORMAT = 3  # of the file; another number is another layout, which this code can't read

Tensors = dict[str, Tensor]
Facts = dict[str, Any]  # what is no tensor, as JSON

_LAYER_FIELDS = ("seen", "settled", "counts", "held", "prompts", "scaling")

# What a key depends on beside the weights. Another model of the very same shape can't be told apart.
_MODEL_FIELDS = ("hidden_size", "num_attention_heads", "vocab_size", "rope_parameters", "rope_scaling", "rope_theta")


def write(path: str | Path, layers: Any, config: CompressionConfig, model_config: Any, *, overwrite: bool) -> None:
    """Save the layers of a cache; see `PyramidKVCache.save`."""
    path = _path(path)
    _check_place(path, overwrite)
    tensors: Tensors = {}
    facts = []
    for index, layer in enumerate(layers):
        held, about = _dump_sliding(layer) if isinstance(layer, SlidingLayer) else _dump_layer(layer)
        tensors |= {f"{index}.{name}": tensor.contiguous().cpu() for name, tensor in held.items()}
        facts.append(about)
    metadata = {
        "kind": KIND,
        "format": str(FORMAT),
        "library": _library(),
        "config": json.dumps(dataclasses.asdict(config)),
        "model": json.dumps(fingerprint(model_config)),
        "layers": json.dumps(facts),
    }
    _write(path, tensors, summed(tensors, metadata), overwrite)


def read(path: str | Path, model_config: Any, device: Any) -> tuple[CompressionConfig, Callable[[Any], None]]:
    """The config of a saved cache, and a function that fills the layers of a fresh one; see `PyramidKVCache.load`."""
    shown = repr(str(path))
    if not _path(path).is_file():
        raise DataError(f"path={shown}: no such file")
    own = fingerprint(model_config)
    _check_device(device)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sums = _check_metadata(shown, metadata)
            _check_model(shown, json.loads(metadata["model"]), own)
            _check_names(shown, sums, file.keys())
            tensors = {name: _checked(shown, name, file.get_tensor(name), sums[name]).to(device) for name in sums}
        config = CompressionConfig.make(**json.loads(metadata["config"]))
        facts = json.loads(metadata["layers"])
    except SafetensorError as error:
        raise DataError(f"path={shown}: is truncated, or no safetensors file ({error})") from error
    except OSError as error:
        raise DataError(f"path={shown}: can't be read ({error})") from error
    except ConfigError as error:
        raise DataError(f"path={shown}: holds a config that this installation does not know: {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"path={shown}: its metadata are damaged ({error!r})") from error

    def fill(layers: Any) -> None:
        index = 0
        try:
            for index, (layer, about) in enumerate(zip(layers, facts, strict=True)):
                own = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{index}.")}
                _check_shape(own, cache_shape(model_config), index)
                (_fill_sliding if isinstance(layer, SlidingLayer) else _fill_layer)(layer, own, about)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"path={shown}: is damaged: layer {index} ({error!r})") from error

    return config, fill


def summed(tensors: Tensors, metadata: dict[str, str]) -> dict[str, str]:
    """The metadata, with the checksums of the tensors and, last, that of all the rest of the metadata."""
    new = metadata | {"tensors": json.dumps({name: checksums.of_tensor(tensor) for name, tensor in tensors.items()})}
    return new | {"checksum": checksums.of_texts(new)}


def fingerprint(model_config: Any) -> Facts:
    """What a cache depends on of a model's config, as JSON gives it back."""
    shape: CacheShape = cache_shape(model_config)
    text = model_config.get_text_config(decoder=True)
    found: Facts = {"model_type": shape.model_type, "layers": [dataclasses.astuple(layer) for layer in shape.layers]}
    found |= {name: getattr(text, name, None) for name in _MODEL_FIELDS}
    facts: Facts = json.loads(json.dumps(found, default=str))
    return facts


def _dump_layer(layer: Any) -> tuple[Tensors, Facts]:
    facts: Facts = {name: getattr(layer, name) for name in _LAYER_FIELDS}
    tensors: Tensors = {} if layer.offset is None else {"offset": layer.offset.clone()}  # layers may share it
    if layer.ring is not None:
        tensors["queries"] = layer.ring.queries
        facts["queries"] = layer.ring.count
    if isinstance(layer.storage, PackedStorage):
        pages = layer.storage.pages
        facts["pages"] = {"bits": pages.bits, "even": pages.even, "least": pages.least}
        tensors |= {f"pages.{name}": tensor for name, tensor in pages.plain().tensors().items()}
        tensors["bitmap"] = layer.storage.bitmap
    new = layer.storage.newest
    used = slice(new.length)
    tensors |= {"keys": new.keys[:, :, used], "values": new.values[:, :, used], "positions": new.positions[:, :, used]}
    tensors |= {} if new.start is None else {"start": new.start}
    return tensors, facts | {"free": new.capacity - new.length, "padded": new.padded, "holes": new.holes}


def _fill_layer(layer: Any, tensors: Tensors, facts: Facts) -> None:
    new = Storage.whole(tensors["keys"], tensors["values"], tensors["positions"], facts["free"])
    new.padded, new.holes, new.start = facts["padded"], facts["holes"], tensors.get("start")
    layer.start(len(facts["counts"]))
    for name in _LAYER_FIELDS:
        setattr(layer, name, facts[name])
    layer.offset = tensors.get("offset")
    if "queries" in tensors:
        layer.ring = QueryRing(tensors["queries"], facts["queries"])
    layer.storage = PackedStorage(_pages(tensors, facts["pages"]), tensors["bitmap"], new) if "pages" in facts else new


def _pages(tensors: Tensors, facts: Facts) -> Pages:
    keys, values = (
        Codes(tensors[f"{kind}.codes"], tensors.get(f"{kind}.scale"), tensors.get(f"{kind}.zero"), facts["bits"])
        for kind in ("pages.keys", "pages.values")
    )
    return Pages(keys, values, tensors["pages.layout"], facts["even"], least=facts.get("least", 0)).for_device()


def _dump_sliding(layer: SlidingLayer) -> tuple[Tensors, Facts]:
    return {"keys": layer.keys, "values": layer.values}, {"seen": layer.cumulative_length}


def _fill_sliding(layer: SlidingLayer, tensors: Tensors, facts: Facts) -> None:
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values, layer.cumulative_length = tensors["keys"], tensors["values"], facts["seen"]


def _library() -> str:
    from pyramidkv import __version__

    return __version__


def _check_metadata(shown: str, metadata: dict[str, str]) -> dict[str, str]:
    """The checksums of the tensors."""
    if metadata.get("kind") != KIND:
        raise DataError(f"path={shown}: is a safetensors file, but no saved pyramidkv cache")
    if metadata.get("format") != str(FORMAT):
        raise DataError(
            f"path={shown}: has format {metadata.get('format')}, written by pyramidkv {metadata.get('library')}; this "
            f"is pyramidkv {_library()}, which reads format {FORMAT}: compress the context again"
        )
    if checksums.of_texts({k: v for k, v in metadata.items() if k != "checksum"}) != metadata.get("checksum"):
        raise DataError(_damaged(shown, "its metadata are"))
    sums: dict[str, str] = json.loads(metadata["tensors"])
    return sums


def _check_names(shown: str, sums: dict[str, str], names: Iterable[str]) -> None:
    for name in sorted(set(sums) ^ set(names)):
        raise DataError(f"path={shown}: is damaged: tensor {name!r} is {'missing' if name in sums else 'unknown'}")


def _checked(shown: str, name: str, tensor: Tensor, checksum: str) -> Tensor:
    if checksums.of_tensor(tensor) != checksum:
        raise DataError(_damaged(shown, f"tensor {name!r} is"))
    return tensor


def _damaged(shown: str, what: str) -> str:
    return f"path={shown}: is damaged: {what} not what was written (another checksum); take another copy of the file"


def _check_model(shown: str, saved: Facts, own: Facts) -> None:
    for name, value in own.items():
        if saved.get(name) != value:
            there, here = (_layers(x) if name == "layers" else x for x in (saved.get(name), value))
            raise DataError(f"path={shown}: was saved from another model: {name} is {there} there, and {here} here")


def _layers(found: Any) -> str:
    """Layers as many and as they are: "12 x [5, 64, None, 5]", KV heads, head size, sliding window, query heads."""
    groups = [f"{len(list(alike))} x {layer}" for layer, alike in itertools.groupby(found or ())]
    return ", ".join(groups)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises all three for devices that are not there
        raise ConfigError(f"device={str(device)!r}: nothing can be put there ({str(error).splitlines()[0]})") from error


def _check_shape(tensors: Tensors, shape: CacheShape, index: int) -> None:
    layer = shape.layers[index]
    for name in ("keys", "values"):
        found = tensors[name].shape  # under tensor parallelism, of the heads of one rank
        if len(found) != 4 or layer.kv_heads % max(found[1], 1) or found[3] != layer.head_dim:
            raise ValueError(f"{name} of shape {tuple(found)}")


def _path(path: Any) -> Path:
    try:
        found = Path(path)
        found.is_file()  # some names the system refuses to look for
    except (TypeError, OSError) as error:
        raise ConfigError(f"path={path!r}: can't be the name of a file ({error})") from error
    return found


def _check_place(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise DataError(f"path={str(path)!r}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise DataError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and not overwrite:
        raise DataError(f"path={str(path)!r}: is there already; give another name, or overwrite=True")


def _write(path: Path, tensors: Tensors, metadata: dict[str, str], overwrite: bool) -> None:
    """Under another name first, then renamed: whoever looks sees a whole file or none."""
    part = None
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        save_file(tensors, part, metadata)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        _check_place(path, overwrite)  # it may have come into being in the meantime
        os.replace(part, path)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a null byte in the name
        raise DataError(f"path={str(path)!r}: can't be written ({error})") from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)
