"""One small random model of each supported family, with MHA and GQA and head sizes 32, 64, 80 and 128."""

import torch
import transformers as t

_BASE = {"vocab_size": 101, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 512}


def _config(kind, heads, kv_heads, head_dim, **more):
    sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, **_BASE, **more}
    if kind is not t.GPTNeoXConfig:
        sizes["num_key_value_heads"] = kv_heads
    if kind in (t.LlamaConfig, t.MistralConfig, t.Qwen3Config, t.Gemma3TextConfig):
        sizes["head_dim"] = head_dim
    return kind(**sizes)


def config(name):
    """The config of one of `NAMES`."""
    family, heads, kv_heads, head_dim = name.split("-")
    heads, kv_heads, head_dim = int(heads), int(kv_heads), int(head_dim)
    match family:
        case "gpt_neox":
            return _config(t.GPTNeoXConfig, heads, heads, head_dim, rotary_pct=0.25)
        case "llama":
            return _config(t.LlamaConfig, heads, kv_heads, head_dim)
        case "mistral":
            return _config(t.MistralConfig, heads, kv_heads, head_dim, sliding_window=None)
        case "qwen2":
            return _config(t.Qwen2Config, heads, kv_heads, head_dim)
        case "qwen3":
            return _config(t.Qwen3Config, heads, kv_heads, head_dim)
        case "phi3":
            return _config(t.Phi3Config, heads, kv_heads, head_dim, pad_token_id=0)
        case "gemma3":
            kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
            more = {"sliding_window": 16, "layer_types": kinds, "num_hidden_layers": 4}
            return _config(t.Gemma3TextConfig, heads, kv_heads, head_dim, query_pre_attn_scalar=head_dim, **more)
    raise AssertionError(name)


NAMES = (
    "gpt_neox-2-2-32", "gpt_neox-2-2-80", "llama-2-2-64", "llama-4-2-32", "mistral-4-1-128", "mistral-2-2-32",
    "qwen2-4-2-64", "qwen2-2-2-32", "qwen3-4-2-32", "qwen3-2-2-64", "phi3-4-2-32", "phi3-2-2-80",
    "gemma3-4-2-32", "gemma3-2-2-64",
)  # fmt: skip


def model(name, seed=0, vocab=101):
    """A random float32 model, with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    chosen = config(name)
    chosen.vocab_size = vocab
    made = t.AutoModelForCausalLM.from_config(chosen, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return made


def padded_batch(lengths, vocab=101, seed=1):
    """Left-padded ids, mask and position ids of rows with the given numbers of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, vocab, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)
