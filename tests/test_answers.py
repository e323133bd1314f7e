"""What the shipped model reads in a compressed cache when it decodes: answers, token by token, on a CPU and on a GPU.

Recall is measured by feeding several tokens at once, which attend to unpacked pages; decoding reads the codes.
"""

import functools

import pytest
import torch

import pyramidkv
from pyramidkv import models
from pyramidkv.evaluate import tasks

WAYS = [
    {"method": "auto", "share": 0.25},
    {"method": "auto", "keep": 1.0, "bits": 8},
    {"method": "auto", "keep": 0.5, "bits": 16},
    {"method": "rms", "keep": 1.0, "bits": 4},
]


@functools.cache
def trained():
    return models.load()


def ids(text):
    return torch.tensor([trained()[1](text, add_special_tokens=False)["input_ids"]])


def asked(device, dtype, count, tokens=1500):
    """The model on a device; and of some contexts their tokens, and the tokens of questions and answers."""
    examples = tasks.make_examples("kv", n=count, tokens=tokens, count_tokens=lambda text: ids(text).shape[1], seed=77)
    found = []
    for example in examples:
        probes = [(ids(probe.question).to(device), ids(probe.answer)[0].tolist()) for probe in example.probes]
        found.append((ids(example.context).to(device), probes))
    return trained()[0].to(device, dtype), found


@torch.no_grad()
def share_answered(device, dtype, options, *contexts):
    """Each question is fed, and its answer decoded, one token after another."""
    model, contexts = asked(device, dtype, *contexts)
    right, before = [], model.config._attn_implementation
    model.set_attn_implementation("pyramidkv")
    for context, probes in contexts:
        cache = pyramidkv.PyramidKVCache(model.config, **options)
        model(context, past_key_values=cache, logits_to_keep=1)
        for question, answer in probes:
            branch, told = cache.fork(), []
            for token in question[0]:
                logits = model(token.view(1, 1), past_key_values=branch).logits
            while len(told) < len(answer):
                told.append(int(logits[0, -1].argmax()))
                logits = model(torch.tensor([[told[-1]]], device=device), past_key_values=branch).logits
            right.append(told == answer)
    model.set_attn_implementation(before)
    return sum(right) / len(right)


def test_answers_from_codes():
    assert share_answered("cpu", torch.float32, WAYS[0], 1, 800) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_answers_on_a_gpu(options, dtype):
    assert share_answered("cuda", dtype, options, 3) >= 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["eager", "graph"])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_generated_answers_on_a_gpu(options, decode):
    model, contexts = asked("cuda", torch.float16, 3)
    right = []
    with pyramidkv.compress(model, decode=decode, **options):
        for context, probes in contexts:
            for question, answer in probes:
                prompt = torch.cat([context, question], dim=1)
                out = model.generate(prompt, max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
                right.append(out[0, prompt.shape[1] :].tolist() == answer)
    assert sum(right) >= 0.9 * len(right)
