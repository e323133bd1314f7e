"""What the interpreter runs, the compiler may refuse: kernels compiled for a GPU that need not be there."""

import itertools

import pytest
import torch

import pyramidkv
from families import model, padded_batch
from kernel_testing import HAS_TRITON, INTERPRETED
from pyramidkv.ops import kernels
from pyramidkv.ops.append import append
from pyramidkv.ops.bitmap import unpack_positions
from pyramidkv.ops.decode_attention import decode_attention
from pyramidkv.ops.level import level
from pyramidkv.ops.merge import merge
from pyramidkv.ops.packed_attention import packed_attention
from pyramidkv.ops.pages import Pages
from pyramidkv.ops.window_scores import window_scores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs triton, not interpreted"),
]
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8",
}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile for compute capability 9.0 and run nothing; the names of the kernels, each as often as it has
    been compiled for other types, constants or options."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    found = {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | {
            n: kwargs.pop(n) for n in self.arg_names if n in kwargs
        }
        constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
        types = {
            name: "constexpr" if name in constants else _type(value)
            for name, value in ((name, given[name]) for name in self.arg_names)
        }
        key = (
            self.fn.__module__,
            self.fn.__name__,
            tuple(types.items()),
            *map(repr, (constants, sorted(kwargs.items()))),
        )
        if key not in found:
            where = {(self.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(self, types, where, {})
            found[key] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    return found


def _type(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@torch.no_grad()
def test_a_prefill_and_a_step_compile(compiled):
    plain = model("gpt_neox-2-2-80").half()
    plain.set_attn_implementation("pyramidkv")
    for method, lengths in itertools.product(("auto", "pyramidkv"), ((300,), (300, 170))):
        cache = pyramidkv.PyramidKVCache(plain.config, method=method, keep=0.5)
        ids, mask, positions = padded_batch(lengths)
        plain(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        plain(ids[:, :1], past_key_values=cache)
    key = torch.zeros(2, 2, 40, 64, dtype=torch.float16)
    new, length, ring = (key[:, :, :1],) * 2, torch.tensor([7], dtype=torch.int32), key[:, :, :9]
    decode_attention(key[:, :, :1], key, key, length, None, 0.1, new)
    decode_attention(key[:, :, :1], key, key, length, None, 0.1, new, ring)
    pages = Pages.gather(key, key, torch.arange(30).expand(2, 2, 30), [33, 33], 3, 4)
    packed_attention(key[:, :, :1], pages, key, key, length, None, 0.1, new, ring)
    pages.followed_by((key, key))
    unpack_positions(torch.zeros(2, 2, 5, dtype=torch.uint8), 64)
    cache = pyramidkv.PyramidKVCache(plain.config, method="pyramidkv", budget=60, slack=8)
    ids, _, _ = padded_batch((300,))
    for tokens in (ids, *ids[:, :5, None].unbind(1)):
        plain(tokens, past_key_values=cache)
    for layer in cache.layers:
        layer.evict_decoded([40])
    for valid in (None, torch.ones(2, 2, 50, dtype=torch.bool)):
        level(torch.ones(2, 2, 40), torch.ones(2, 2, 10), valid)
        window_scores(key[:, :, :10], key, 0.1, None if valid is None else valid[..., :40], power=2, per_visible=True)
    names = {name for _, name, *_ in compiled}
    assert {"band_kernel", "count_kernel", "select_kernel", "pack_kernel", "split_kernel", "join_kernel"} <= names
    assert {"unpack_kernel", "positions_kernel", "level_kernel", "sum_kernel"} <= names


@pytest.mark.parametrize("bits", [16, 8, 2])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(28, 4, 128), (4, 1, 256), (9, 1, 112)])
def test_packed_attention_takes_no_warp_group_products(compiled, heads, kv_heads, size, bits):
    """On an H100 those of 64 slots with a few queries read past their memory (Triton 3.6)."""
    key = torch.zeros(1, kv_heads, 70, size, dtype=torch.float16)
    pages = Pages.gather(key, key, torch.arange(66).expand(1, kv_heads, 66), [67], 1, bits)
    packed_attention(key[:, :, :1].repeat(1, heads // kv_heads, 1, 1), pages, key, key, 7, None, 0.1)
    (kernel,) = [kernel for (_, name, *_), kernel in compiled.items() if name == "split_kernel"]
    assert "mma.sync" in kernel.asm["ptx"]
    assert "wgmma" not in kernel.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_compile(compiled, dtype):
    from pyramidkv.ops.linear import triton

    bias = torch.zeros(70, dtype=dtype)
    for rows, channels, overlap in itertools.product((1, 8, 16), (1100, 2560), (False, True)):
        x, weight = torch.zeros(rows, channels, dtype=dtype), torch.zeros(70, channels, dtype=dtype)
        chosen = triton.choose(rows, 70, channels, triton.Device(overlap=overlap))
        for some in (None, bias):
            triton.linear(x, weight, some, blocks=chosen)
            if rows > 1:
                triton.linear(x, weight, some, blocks=triton.Blocks(64, 4, 4, 128, 2, overlap=overlap))
    assert {name for _, name, *_ in compiled} == {"vector_kernel", "dot_kernel", "join_kernel"}


@pytest.mark.parametrize("size", [64, 80, 128])
def test_what_a_chunk_needs_compiles(compiled, size):
    key = torch.zeros(2, 2, 40, size, dtype=torch.float16)
    lse = torch.zeros(2, 2, 40)
    for by_token in (False, True):
        append((key, key), (key, key), by_token=by_token)
    for number in (2, 3):
        merge([(key, lse)] * number, torch.empty_like(key))
    assert {name for _, name, *_ in compiled} == {"append_kernel", "merge_kernel"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rotation_compiles(compiled, dtype):
    from pyramidkv.ops.rotate import triton

    for heads, kv_heads, size, rotated in ((4, 4, 80, 20), (4, 2, 128, 128), (3, 1, 96, 96)):
        query, key = (torch.zeros(2, n, 40, size, dtype=dtype) for n in (heads, kv_heads))
        angle = torch.zeros(1, 40, rotated, dtype=dtype)
        triton.rotate(query, key, angle, angle)
    assert {name for _, name, *_ in compiled} == {"rotate_kernel"}
