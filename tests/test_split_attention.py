"""Attention of a chunk in parts: joined, they are the whole; few shapes are planned for; Triton against plain torch."""

import pytest
import torch

import pyramidkv
import pyramidkv.ops.attention
import pyramidkv.storage
from families import model, padded_batch
from kernel_testing import DTYPES, ERROR, distance, interpreted, random
from pyramidkv import PyramidKVCache
from pyramidkv.ops import kernels, split_attention
from pyramidkv.ops.append import append
from pyramidkv.ops.append import naive as append_naive
from pyramidkv.ops.attention import attention
from pyramidkv.ops.merge import merge
from pyramidkv.ops.merge.naive import part

# batch, query heads, KV heads, head size, queries, kept keys
SHAPES = [
    (1, 2, 2, 80, 6, 1),
    (7, 4, 2, 64, 5, 19),
    (1, 6, 2, 128, 13, 300),
    (2, 3, 1, 32, 37, 257),
    (7, 2, 2, 80, 2, 516),
    (1, 1, 1, 80, 1, 256),
]


def case(shape, dtype=torch.float32, device="cpu"):
    """Queries, and kept and new keys and values as a layer has them: views of buffers with room, and of a product."""
    batch, heads, kv_heads, size, queries, past = shape
    query = random(batch, heads, queries, size, seed=1, dtype=dtype, device=device)
    fused = random(batch, queries, kv_heads, 2 * size, seed=2, dtype=dtype, device=device).transpose(1, 2)
    old = tuple(
        random(batch, kv_heads, past + 3, size, seed=n, dtype=dtype, device=device)[:, :, :past] for n in (3, 4)
    )
    return query, old, (fused[..., :size], fused[..., size:])


def by_definition(query, key, value, scaling):
    """Causal attention by one loop over the queries, float64."""
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for i in range(queries):
        seen = keys - queries + i + 1
        logit = torch.einsum("bhd,bhkd->bhk", query[:, :, i].double(), key[:, :, :seen]) * scaling
        out[:, :, i] = torch.einsum("bhk,bhkd->bhd", logit.softmax(-1), value[:, :, :seen])
    return out


@pytest.mark.parametrize("plans", [0, 1, 8])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_joined_are_causal_attention(shape, by_token, plans, monkeypatch):
    monkeypatch.setattr(split_attention, "PLANS", plans)
    query, old, new = case(shape)
    key, value = append(old, new, by_token=by_token)
    got = split_attention.split_attention(query, key, value, 0.3, part, part)
    assert distance(got, by_definition(query, key, value, 0.3)) < 1e-6
    assert got.transpose(1, 2).is_contiguous()  # what a model wants of it is no copy


def test_few_shapes_and_strides_are_planned_for():
    planned = set()

    def watched(query, key, value, scaling, causal):
        assert all(t.data_ptr() % 16 == 0 for t in (query, key, value))  # a kernel reads that much at once
        planned.add((causal, *((t.shape, t.stride()) for t in (query, key, value))))
        return part(query, key, value, scaling, causal)

    lengths = [1, 255, *range(256, 1024, 7), 1023]
    for past in lengths:
        for batch in (1, 3) if past % 2 else (1,):
            query, old, new = case((batch, 2, 1, 8, 4, past), torch.float16)
            key, value = append(old, new, by_token=True)
            split_attention.split_attention(query, key, value, 0.3, watched, part)
    assert sum(causal for causal, *_ in planned) == 1  # whatever was kept, and by how many rows
    assert len(planned) == 1 + 2 * split_attention.PLANS


def test_a_round_number_leaves_little_over(monkeypatch):
    rounded = [split_attention.round_number(n) for n in range(40000)]
    assert rounded[:256] == [0] * 256
    assert all(0 <= n - r < max(n / split_attention.PLANS, 1) for n, r in enumerate(rounded) if n >= 256)
    assert len(set(rounded)) <= 1 + 8 * split_attention.PLANS
    monkeypatch.setattr(split_attention, "PLANS", 0)
    assert split_attention.round_number(5000) == 0


REFUSED = [
    ({"queries": 768}, "768 queries of 1068 tokens"),
    ({"queries": 1025}, "1025 queries of 1325 tokens"),
    ({"past": 0}, "1024 queries of 1024 tokens"),
    ({"dtype": torch.float32}, "not all float16"),
    ({"size": 36}, "head size 36"),
    ({"size": 136}, "head size 136"),
    ({"by_token": False}, "do not lie token by token"),
    ({"dropout": 0.1}, "gradient"),
    ({"grad": True}, "gradient"),
]


@pytest.mark.parametrize(("changed", "why"), REFUSED, ids=str)
def test_what_is_not_split(changed, why):
    given = {"queries": 1024, "past": 300, "size": 80, "dtype": torch.float16, "by_token": True, "dropout": 0.0}
    given["grad"] = False

    def asked(queries, past, size, dtype, by_token, dropout, grad):
        query, old, new = case((1, 2, 1, size, queries, past), dtype)
        key, value = append_naive.append(old, new, by_token=by_token)
        return split_attention.shape_why_not(query.requires_grad_(grad), key, value, dropout)

    assert asked(**given) is None
    assert why in asked(**given | changed)
    query, old, new = case((1, 2, 1, 80, 1024, 300), torch.float16)
    assert split_attention.why_not(query, *append(old, new, by_token=True), 0.0) == "it is for CUDA"


@torch.no_grad()
@pytest.mark.parametrize("method", ["pyramidkv", "echo", "full"])
def test_chunks_read_in_parts_are_chunks_read_at_once(method, monkeypatch):
    plain = model("llama-4-2-32")
    plain.set_attn_implementation("pyramidkv")
    ids, _, _ = padded_batch((390, 390))
    found, calls = [], []
    for split in (False, True):
        if split:
            monkeypatch.setattr(pyramidkv.storage, "wants_tokens", lambda new: True)
            monkeypatch.setattr(split_attention, "_cudnn", lambda *a: (calls.append(a[4]), part(*a))[1])
            monkeypatch.setattr(split_attention, "_flash", part)
            monkeypatch.setattr(
                pyramidkv.ops.attention, "why_not_split",
                lambda q, k, v, dropout: None if 1 < q.shape[2] < k.shape[2] and k.stride(1) < k.stride(2) else "no",
            )  # fmt: skip
        amount = {} if method == "full" else {"budget": 280, "window": 8}
        cache = PyramidKVCache(plain.config, method=method, room=4, **amount)
        logits = pyramidkv.prefill(plain, ids, cache, chunk=100)
        found.append((logits, [layer.storage.positions for layer in cache.layers]))
    # Two rows, three chunks behind the first; of two of them nobody reads the last layer.
    assert calls.count(True) == 2 * (3 * len(cache.layers) - 2)
    assert calls.count(False) > 0  # a layer has kept enough for a round number
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def parts_of(shape, dtype, number, device="cpu"):
    """Parts as kernels give them, of several layouts; in some, queries that see nothing."""
    batch, heads, _, size, queries, _ = shape
    given = []
    for n in range(number):
        over = random(batch, heads, queries, size, seed=n, dtype=dtype, device=device)
        if n % 2:
            over = over.transpose(1, 2).contiguous().transpose(1, 2)
        lse = 3 * random(batch, heads, queries, seed=9 + n, device=device)
        lse[..., 1::3] = (float("inf"), float("-inf"))[n % 2]
        if n:
            lse[..., 1::2] = random(batch, heads, queries, seed=30 + n, device=device)[..., 1::2]
        given.append((over, lse))
    return given


def check_merge(shape, dtype, number, device="cpu"):
    given = parts_of(shape, dtype, number, device)
    batch, heads, _, size, queries, _ = shape
    out = torch.full((batch, queries, heads, size), float("nan"), dtype=dtype, device=device).transpose(1, 2)
    merge(given, out)
    weights = torch.stack([lse.double().masked_fill(lse.isinf(), float("-inf")) for _, lse in given]).softmax(0)
    weights = weights.nan_to_num()  # nothing seen in any part
    expected = sum(part.double() * weight[..., None] for (part, _), weight in zip(given, weights, strict=True))
    assert distance(out, expected) < ERROR[dtype]


def check_append(shape, dtype, by_token, device="cpu", front=0):
    _, old, new = case(shape, dtype, device)
    if shape[3] == 64:  # values of another head size
        old, new = (old[0], old[1][..., :40]), (new[0], new[1][..., :40])
    got = append(old, new, by_token=by_token, front=front)
    for tensor, a, b in zip(got, old, new, strict=True):
        assert torch.equal(tensor[:, :, front:], torch.cat([a, b], 2))
        assert (tensor.transpose(1, 2) if by_token else tensor).is_contiguous()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_is_a_mean_by_log_sum_exps(dtype, number):
    for shape in SHAPES:
        check_merge(shape, dtype, number)


@pytest.mark.parametrize("by_token", [False, True])
def test_new_tokens_come_behind_old_ones(by_token):
    for shape in SHAPES:
        check_append(shape, torch.float16, by_token)
        check_append(shape, torch.float16, by_token, front=7)


@interpreted
@pytest.mark.parametrize("shape", [(1, 2, 2, 80, 6, 1), (2, 4, 2, 64, 5, 39), (1, 3, 1, 128, 40, 33)], ids=str)
def test_the_kernels_interpreted(shape, monkeypatch):
    monkeypatch.setattr(kernels, "why_no_triton", lambda device: None)
    for number, dtype in ((2, torch.float32), (3, torch.bfloat16)):
        check_merge(shape, dtype, number)
    for by_token, front in ((False, 0), (True, 0), (False, 3)):
        check_append(shape, torch.float16, by_token, front=front)


class TestOnTheGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 32, 8, 128, 1000, 3001), (1, 32, 32, 80, 1024, 2050)], ids=str)
    def test_the_kernels(self, shape, dtype):
        for number in (2, 3):
            check_merge(shape, dtype, number, "cuda")
        for by_token, front in ((False, 0), (True, 0), (False, 64), (True, 3)):
            check_append(shape, dtype, by_token, "cuda", front)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("past", [1, 255, 300, 2048, 5003])
    @pytest.mark.parametrize("heads", [(1, 4, 4, 80), (2, 8, 2, 128), (1, 6, 3, 64), (3, 2, 1, 32)], ids=str)
    def test_a_chunk(self, heads, past, dtype):
        query, old, new = case((*heads, 1024, past), dtype, "cuda")
        key, value = append(old, new, by_token=split_attention.wants_tokens(new[0]))
        assert split_attention.why_not(query, key, value, 0.0) is None
        got = attention(query, key, value, 0.1)
        expected = attention(query.float(), key.float(), value.float(), 0.1)  # by the path for all dtypes
        assert got.isfinite().all()
        assert distance(got, expected) < ERROR[dtype]

    def test_what_is_turned_off_is_not_used(self):
        query, old, new = case((1, 4, 4, 80, 1024, 300), torch.float16, "cuda")
        given = (query, *append(old, new, by_token=True), 0.0)
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            assert split_attention.why_not(*given) == "cuDNN attention is turned off"
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
        assert split_attention.why_not(*given) is None
