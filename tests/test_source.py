"""Names to models: every kind of name, and every way in which it can be wrong."""

import importlib.util

import pytest
import torch
import transformers

from families import config as family_config
from pyramidkv.errors import ConfigError, DataError, UnsupportedError
from pyramidkv.models import device as device_module
from pyramidkv.models import source
from pyramidkv.models.device import pick_device, pick_dtype
from pyramidkv.models.shapes import SHAPES, Shape
from pyramidkv.models.source import DEFAULT_MODEL, count_parameters, load_config, load_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved model without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(family_config("llama-4-2-32")).save_pretrained(path)
    return path


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(source, "hub_problem", lambda: "https://huggingface.co does not answer (test)")


@pytest.fixture(params=["gpt_neox-2-2-32", "gemma3-4-2-32", "phi3-4-2-32"])
def tiny_shape(request, monkeypatch):
    """A built-in shape of toy size."""
    config = family_config(request.param).to_dict()
    sizes = {k: config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"pad_token_id": 0, **{k: config[k] for k in ("layer_types", "sliding_window") if k in config}}
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", "nobody/tiny", "float16", config["model_type"], sizes))


def test_folder(folder):
    loaded = load_model(str(folder), device="cpu")
    assert (loaded.name, loaded.weights_random, loaded.tokenizer) == (str(folder), False, None)
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training


def test_shipped_model():
    loaded = load_model(DEFAULT_MODEL, device="cpu")
    assert not loaded.weights_random
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("some text").input_ids) == "some text"


def test_config_needs_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_config(str(tmp_path)).model_type == "llama"
    with pytest.raises(DataError, match="no weights"):
        load_model(str(tmp_path), device="cpu")


def test_shape_names():
    assert load_config("pythia-70m").to_dict() == load_config("random:pythia-70m").to_dict()
    with pytest.raises(ConfigError, match=r"'random:pythia-70m' .* 'EleutherAI/pythia-70m'"):
        load_model("pythia-70m", device="cpu")
    with pytest.raises(ConfigError, match=r"did you mean 'pythia-70m'"):
        load_config("random:pythia-70")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random(tiny_shape, dtype):
    loaded = load_model("random:tiny", device="cpu", dtype=dtype)
    assert loaded.weights_random
    assert loaded.tokenizer is None
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    assert all(p.isfinite().all() for p in loaded.model.parameters())
    with torch.no_grad():
        logits = loaded.model(torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_random_is_the_same_each_time(tiny_shape):
    one, two = (load_model("random:tiny", device="cpu").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "missing.gguf"])
def test_no_such_path(name):
    with pytest.raises(DataError, match="no such file or folder"):
        load_config(name)


def test_empty_name():
    with pytest.raises(ConfigError, match="empty"):
        load_config("")


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        load_config(str(tmp_path))


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"not a \.gguf"):
        load_config(str(tmp_path / "model.safetensors"))


def test_broken_files(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="can't be read"):
        load_config(str(tmp_path))
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf")
    with pytest.raises((DataError, ConfigError), match=r"broken\.gguf"):
        load_config(str(tmp_path / "broken.gguf"))


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        load_config(str(tmp_path / "model.gguf"))


def test_hub_away(no_hub):
    with pytest.raises(DataError, match=r"does not answer \(test\).*'random:pythia-70m'"):
        load_config("EleutherAI/pythia-70m")
    with pytest.raises(DataError, match=r"Did you mean 'neox-16m'"):
        load_config("neox-16")


def test_hub_offline_is_honoured(monkeypatch):
    from pyramidkv.models.hub import hub_problem

    hub_problem.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem() == "HF_HUB_OFFLINE is set"
    hub_problem.cache_clear()


def test_architecture_that_is_not_supported(tmp_path):
    transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="gpt2"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_gpu(name, monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(source, "load_config", lambda name: pytest.fail("read something first"))
    with pytest.raises(ConfigError, match=rf"device='{name}'.*use device='cpu'"):
        load_model(str(folder), device=name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", ""])
def test_strange_devices(name):
    with pytest.raises(ConfigError, match=r"allowed: auto, cpu, cuda, cuda:N, mps"):
        pick_device(name)


def test_a_gpu_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"has 1 GPU"):
        pick_device("cuda:1")


def test_dtypes():
    config = load_config("pythia-70m")
    assert pick_dtype("auto", torch.device("cpu"), config) == torch.float32
    assert pick_dtype("auto", torch.device("cuda"), config) == torch.float16
    assert pick_dtype("auto", torch.device("cuda"), transformers.LlamaConfig()) == torch.bfloat16
    assert pick_dtype("bfloat16", torch.device("cpu"), config) == torch.bfloat16
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        pick_dtype("float6", torch.device("cpu"), config)


def test_too_large(monkeypatch):
    monkeypatch.setattr(source, "free_bytes", lambda device: 200_000_000)
    with pytest.raises(ConfigError, match=r"281,706,496 bytes in float32, and this machine has 200,000,000 .*bfloat16"):
        load_model("random:pythia-70m", device="cpu")
    with pytest.raises(ConfigError, match=r"free; take a smaller model$"):
        load_model("random:pythia-1b", device="cpu", dtype="float16")


def test_memory_of_this_machine():
    cpu = torch.device("cpu")
    assert 0 < device_module.free_bytes(cpu) <= device_module.total_bytes(cpu)


def test_counting_takes_no_memory(folder):
    assert count_parameters(load_config(str(folder))) == load_model(str(folder), device="cpu").parameters


@pytest.mark.gpu
def test_random_on_a_gpu():
    """Made there, in the published dtype: the host needs no memory for it."""
    loaded = load_model("random:pythia-410m", device="cuda")
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    assert loaded.model.dtype == torch.float16
    assert all(p.isfinite().all() for p in loaded.model.parameters())


@pytest.mark.gpu
def test_shipped_model_on_a_gpu():
    assert load_model(DEFAULT_MODEL).model.device.type == "cuda"
    with pytest.raises(ConfigError, match="numbered from 0"):
        load_model(DEFAULT_MODEL, device="cuda:99")


@pytest.mark.gpu
def test_memory_and_kernels_of_a_gpu():
    from pyramidkv.cli.environment import attention_kernels

    gpu = pick_device("cuda")
    assert 0 < device_module.free_bytes(gpu) <= device_module.total_bytes(gpu)
    assert attention_kernels(gpu)["prefill"] in {"flash", "cudnn", "efficient"}
