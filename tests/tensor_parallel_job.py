"""What every rank of tests/test_parallel.py runs: FOLDER/NAME are models; results go to FOLDER/NAME-RANK.pt."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import pyramidkv


def load(folder):
    """The model, its heads split over all ranks by transformers itself."""
    try:
        from transformers import DistributedConfig
    except ImportError:  # transformers before 5.17
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()


def run(model, ids, mask, options):
    """Greedy tokens, and what each layer holds."""
    with pyramidkv.compress(model, **options) as session:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
    layers = [layer for layer in out.past_key_values.layers if hasattr(layer, "storage")]
    return {
        "tokens": out.sequences,
        "positions": [layer.storage.positions[:, :, : layer.storage.length] for layer in layers],
        "report": session.report(),
    }


def main():
    kind, folder, *names = sys.argv[1:]
    folder = Path(folder)
    ids, mask = torch.load(folder / "batch.pt")
    rank = os.environ["RANK"]
    for name in names:
        model = load(folder / name)
        if kind == "heads":
            try:
                pyramidkv.compress(model, keep=0.4, window=4)
            except pyramidkv.ConfigError as error:
                print(f"rank {rank}: {error}", flush=True)
            continue
        if kind == "dies" and rank == "1":  # in the middle of a forward
            model.model.layers[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        cases = json.loads((folder / "cases.json").read_text())
        torch.save([run(model, ids, mask, case) for case in cases], folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


main()
