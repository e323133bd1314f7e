"""Train the small GPT-NeoX that ships with the package (`pyramidkv.models.load("neox-16m")`).

The command that made it, on one H100 80GB, in about a quarter of an hour:

    python scripts/train_small_neox.py --data DIR --valid DIR --tokenizer src/pyramidkv/models/neox-16m/tokenizer.json \
        --out runs/neox-16m --steps 8800 --look-every 400 --save-every 400

`--data`: a folder of *.tar.xz archives of plain-text books; `--valid`: a folder of held-out *.txt books. A run that was
cut off goes on from its last checkpoint (`--out`/state.pt) when the same command is given again. `--out`/model is what
from_pretrained reads, `--out`/log.jsonl the loss curve. `--tiny` is a smoke test of everything on a CPU, in a minute.

What it does: 12 layers, hidden size 320, 4096 positions, about 16 million parameters. Muon for the matrices and AdamW
for the rest, bf16 autocast over fp32 weights, warm-up, constant rate, linear decay in the last part. The first part of
the run has rows of 1024 tokens with many short recall texts, so that copying from context is learnt soon; the rest has
rows of 4096 tokens, each of one book, and recall texts of all lengths up to it.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import small_neox_data as data
import small_neox_eval as evaluation
from muon import Muon

CONTEXT = 4096


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: rows a step of each kind, of `length` tokens, up to the share `until` of the run."""

    until: float
    length: int
    books: int
    docstrings: int
    recall: int
    recall_tokens: tuple[int, int]


# 131,072 tokens a step in both.
STAGES = (
    Stage(until=0.30, length=1024, books=92, docstrings=3, recall=33, recall_tokens=(96, 1024)),
    Stage(until=1.00, length=4096, books=26, docstrings=1, recall=5, recall_tokens=(256, 4096)),
)
TINY_STAGES = (
    Stage(until=0.50, length=128, books=4, docstrings=1, recall=2, recall_tokens=(96, 128)),
    Stage(until=1.00, length=512, books=2, docstrings=1, recall=1, recall_tokens=(128, 512)),
)


def new_model(tiny: bool) -> GPTNeoXForCausalLM:
    """The untrained network; `tiny` is two small layers for the smoke test."""
    config = GPTNeoXConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=64 if tiny else 320,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=1 if tiny else 5,
        intermediate_size=256 if tiny else 1280,
        hidden_act="gelu",
        max_position_embeddings=CONTEXT,
        use_parallel_residual=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    return GPTNeoXForCausalLM._from_config(config, attn_implementation="sdpa")


def hidden_states(model: GPTNeoXForCausalLM, ids: Tensor, layer: Callable[..., Tensor]) -> Tensor:
    """(B, T) -> (B, T, C): the model's own modules, without masks and cache, so that the causal flash kernel is taken.

    `layer(module, h, rotary)` runs one layer. The residual stream is bf16 under autocast, the rotary tables stay fp32.
    """
    base = model.gpt_neox
    h = base.embed_in(ids)
    rotary = base.rotary_emb(h, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    if torch.is_autocast_enabled(ids.device.type):
        h = h.bfloat16()
    for module in base.layers:
        h = layer(module, h, rotary)
    return base.final_layer_norm(h)


def run_layer(module: torch.nn.Module, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One GPT-NeoX layer, (B, T, C) -> (B, T, C)."""
    return module(h, attention_mask=None, position_embeddings=rotary)


def token_losses(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """(B, T, C), (V, C), (B, T) -> (B, T) cross-entropy in nats, in fp32."""
    logits = torch.nn.functional.linear(h, head).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """The share of the peak learning rate: warm-up, plateau, then linear decay over the last part `decay`."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (decay * steps)))


def optimizers(
    model: GPTNeoXForCausalLM, peaks: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    heads = model.config.num_attention_heads
    fused = {layer.attention.query_key_value.weight: (heads, 3) for layer in model.gpt_neox.layers}
    cuda = next(model.parameters()).is_cuda
    return [
        Muon(matrices, lr=peaks[0], weight_decay=weight_decay, parts=fused),
        torch.optim.AdamW(rest, lr=peaks[1], betas=(0.9, 0.95), weight_decay=0.0, fused=cuda),
    ]


def export(model: GPTNeoXForCausalLM, tokenizer_file: Path, folder: Path) -> None:
    """Write what from_pretrained reads: fp16 weights without the tied head, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    half = GPTNeoXForCausalLM._from_config(model.config, dtype=torch.float16)
    half.load_state_dict({name: value.half() for name, value in model.state_dict().items()})
    half.tie_weights()
    assert all(p.isfinite().all() for p in half.parameters()), "a weight overflows fp16"
    half.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    half.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=data.END,
        eos_token=data.END,
        pad_token=data.END,
        unk_token=data.END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def load_corpus(arguments: argparse.Namespace, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """Windows of books and docstrings on the device, sentences of books as filler; kept in files for a restart."""
    kept, kept_filler = arguments.out / "tokens.npz", arguments.out / "filler.json"
    if not kept_filler.exists():
        if arguments.tiny:
            texts = [data.synthetic_page(i, 400) for i in range(20)]
            filler, docs = [data.sentences(data.synthetic_page(0, 500))], data.synthetic_page(1, 500)
        else:
            texts, filler, docs = data.read_all(arguments.data)
        tokens, starts = data.encode(tokenizer, texts)
        # Cut where a paragraph ends, so that the pieces can be encoded in parallel.
        doc_tokens, _ = data.encode(tokenizer, [part + "\n\n" for part in docs.split("\n\n")])
        np.savez(kept, tokens=tokens, starts=starts, docs=doc_tokens)
        kept_filler.write_text(json.dumps(filler), encoding="utf-8")
    stored = np.load(kept)
    tokens, starts, docs = stored["tokens"], stored["starts"], stored["docs"]
    print(f"{len(tokens):,} tokens of {len(starts) - 1} books, {len(docs):,} of docstrings", flush=True)
    return {
        "books": data.Windows(tokens, starts, device),
        "docs": data.Windows(docs, np.array([0, len(docs)]), device),
        "filler": json.loads(kept_filler.read_text(encoding="utf-8")),
    }


def recall_batches(arguments: argparse.Namespace, stage: int, filler: list[list[str]], step: int) -> Iterator[Any]:
    """Batches of recall rows for one stage, from worker processes; `step` = how many batches this stage already had."""
    plan = arguments.stages[stage]
    # Batches come from the workers in turn, each stepping over the others' rows.
    rows = data.RecallRows(
        arguments.tokenizer, filler, plan.length + 1, plan.recall_tokens, first=step * plan.recall, salt=stage
    )
    return iter(
        DataLoader(
            rows,
            batch_size=plan.recall,
            num_workers=arguments.workers,
            prefetch_factor=6 if arguments.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )


def step_batch(
    plan: Stage, corpus: dict[str, Any], recall: Iterator[Any], seed: int, step: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(rows, length + 1) tokens and the weight of each as a target: books first, then docstrings, then recall texts."""
    rng = np.random.default_rng([seed, step])
    books = corpus["books"].draw(rng, plan.books, plan.length + 1)
    docs = corpus["docs"].draw(rng, plan.docstrings, plan.length + 1)
    texts, weights = (part.to(device, non_blocking=True) for part in next(recall))
    ids = torch.cat([books, docs, texts])
    ones = torch.ones(plan.books + plan.docstrings, plan.length + 1, device=device)
    return ids, torch.cat([ones, weights])


def look(model: GPTNeoXForCausalLM, held_out: dict[str, Any], length: int, autocast: Any) -> dict[str, float]:
    """Loss on held-out books at `length`, and recall at it and below, in bf16."""

    def logits(ids: Tensor, keep: int) -> Tensor:
        with autocast():
            h = hidden_states(model, ids, run_layer)[:, -keep:]
            return torch.nn.functional.linear(h, model.gpt_neox.embed_in.weight)

    device = next(model.parameters()).device
    found: dict[str, float] = {}
    with torch.no_grad():
        if held_out["windows"] is not None:
            ids = held_out["windows"][:, : length + 1]
            out = [logits(part[:, :-1], length).float().transpose(1, 2) for part in ids.split(8)]
            loss = [
                torch.nn.functional.cross_entropy(o, part[:, 1:]) for o, part in zip(out, ids.split(8), strict=True)
            ]
            found["valid_loss_nats"] = torch.stack(loss).mean().item()
    for (task, tokens), rows in held_out["recall"].items():
        if tokens <= length:
            found[f"{task}_{tokens}"] = evaluation.recall(logits, rows, device)
    return found


def load_held_out(arguments: argparse.Namespace, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """64 windows of the held-out books, and 64 recall examples for each task and length."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    windows = None
    if arguments.valid is not None:
        files = sorted(arguments.valid.glob("*.txt"))
        books = [encode(file.read_text(encoding="utf-8")) for file in files]
        places = [(b, p) for b, book in enumerate(books) for p in range(0, len(book) - CONTEXT - 1, CONTEXT)]
        chosen = random.Random(0).sample(places, 64)
        windows = torch.tensor([books[b][p : p + CONTEXT + 1] for b, p in chosen], device=device)
    lengths = (256,) if arguments.tiny else (512, 1024, 2048, 4096)
    n = 4 if arguments.tiny else 64
    rows = {
        (task, tokens): evaluation.recall_rows(encode, task, tokens, n) for task in data.TASKS for tokens in lengths
    }
    return {"windows": windows, "recall": rows}


def main() -> None:
    """Train, checkpoint, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of *.tar.xz archives of texts")
    parser.add_argument("--valid", type=Path, help="folder of held-out *.txt texts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json, from small_neox_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and model")
    parser.add_argument("--steps", type=int, default=8800)
    parser.add_argument("--stop-after", type=int, help="stop here, with a checkpoint; the plan stays")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak rate of Muon, in units of an AdamW step")
    parser.add_argument("--lr-rest", type=float, default=3e-3, help="peak rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.25, help="the last share of the steps, with a falling rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 2) - 4))
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--look-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--compile", choices=["layer", "whole", "none"], default="layer")
    parser.add_argument("--attention", choices=["any", "flash", "cudnn"], default="any", help="SDPA kernel on a GPU")
    parser.add_argument("--tiny", action="store_true", help="smoke test: two small layers, made-up text, no --data")
    arguments = parser.parse_args()
    arguments.stages = TINY_STAGES if arguments.tiny else STAGES
    arguments.out.mkdir(parents=True, exist_ok=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.enable_flash_sdp(arguments.attention != "cudnn")
    torch.backends.cuda.enable_cudnn_sdp(arguments.attention != "flash")

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    began = time.time()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    corpus = load_corpus(arguments, tokenizer, device)
    held_out = load_held_out(arguments, tokenizer, device)
    print(f"data ready after {time.time() - began:.1f} s", flush=True)

    model = new_model(arguments.tiny).to(device)
    peaks = (arguments.lr, arguments.lr_rest)
    both = optimizers(model, peaks, arguments.weight_decay)
    state_file = arguments.out / "state.pt"
    step, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, stored in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        step, seconds = state["step"], state["seconds"]
        print(f"resumed at step {step}", flush=True)

    # Layer by layer: all twelve share one compiled graph, so that compiling takes seconds.
    layer = torch.compile(run_layer, dynamic=False) if arguments.compile == "layer" else run_layer
    losses_of = torch.compile(token_losses, dynamic=False) if arguments.compile == "layer" else token_losses

    def losses(ids: Tensor) -> Tensor:
        with autocast():
            h = hidden_states(model, ids[:, :-1], layer)
            return losses_of(h, model.gpt_neox.embed_in.weight, ids[:, 1:])

    if arguments.compile == "whole":
        losses = torch.compile(losses, dynamic=False)

    def save() -> None:
        partial = state_file.with_suffix(".partial")
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in both],
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, partial)
        partial.replace(state_file)
        fresh = arguments.out / "model.new"
        export(model, arguments.tokenizer, fresh)
        shutil.rmtree(arguments.out / "model", ignore_errors=True)
        fresh.rename(arguments.out / "model")

    log = (arguments.out / "log.jsonl").open("a", encoding="utf-8")
    stage, recall = -1, iter(())
    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    tick, since, seen = time.time(), step, {"books": [], "answers": []}
    while step < last:
        now = next(i for i, plan in enumerate(arguments.stages) if step < plan.until * arguments.steps)
        plan = arguments.stages[now]
        if now != stage:
            stage = now
            before = round(arguments.stages[stage - 1].until * arguments.steps) if stage else 0
            recall = recall_batches(arguments, stage, corpus["filler"], step - before)
        ids, weights = step_batch(plan, corpus, recall, arguments.seed, step, device)
        per_token = losses(ids)
        targets = weights[:, 1:]
        loss = (per_token * targets).sum() / targets.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = rate(step, arguments.steps, arguments.warmup, arguments.decay)
        for optimizer, peak in zip(both, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            answers = targets == data.ANSWER_WEIGHT
            seen["books"].append(per_token[: plan.books].mean())
            seen["answers"].append((per_token * answers).sum() / answers.sum())
        step += 1
        looking = step % arguments.look_every == 0 or step == last
        if step % arguments.log_every == 0 or looking:
            record: dict[str, Any] = {"step": step, "length": plan.length}
            record |= {f"{kind}_loss_nats": torch.stack(part).mean().item() for kind, part in seen.items()}
            took = time.time() - tick
            seconds += took
            tokens = (step - since) * plan.length * (plan.books + plan.docstrings + plan.recall)
            record |= {"lr": arguments.lr * share, "tokens_per_second": tokens / took, "seconds": seconds}
            if looking:
                tick = time.time()
                record |= look(model, held_out, plan.length, autocast)
                seconds += time.time() - tick
            line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            tick, since, seen = time.time(), step, {"books": [], "answers": []}
        if step % arguments.save_every == 0 or step == last:
            tick = time.time()
            save()
            seconds += time.time() - tick
            tick = time.time()
    print("done", flush=True)


if __name__ == "__main__":
    main()
