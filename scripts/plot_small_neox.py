"""The loss curve of a training run: its log as a small CSV, and as a picture.

    python scripts/plot_small_neox.py --log runs/neox-16m/log.jsonl \
        --csv docs/images/neox-16m-loss.csv --png docs/images/neox-16m-loss.png
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = (
    "step", "length", "seconds", "lr", "books_loss_nats", "answers_loss_nats", "valid_loss_nats",
    "kv_1024", "needle_1024", "tracking_1024", "kv_4096", "needle_4096", "tracking_4096",
)  # fmt: skip


def draw(records: list[dict[str, Any]], png: Path) -> None:
    """Losses above, recall below, over the steps."""
    figure, (losses, recall) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2))
    steps = [r["step"] for r in records]
    losses.plot(steps, [r["books_loss_nats"] for r in records], lw=1, label="training books")
    held_out = [r for r in records if "valid_loss_nats" in r]
    valid = [r["valid_loss_nats"] for r in held_out]
    losses.plot([r["step"] for r in held_out], valid, "o-", ms=3, label="held-out PG-19")
    losses.set_ylim(2.4, 4.5)
    losses.set_ylabel("loss (nats per token)")
    change = next((r["step"] for r in records if r["length"] != records[0]["length"]), None)
    for axes in (losses, recall):
        if change is not None:
            axes.axvline(change, color="0.6", ls=":", lw=1)
        axes.grid(alpha=0.3)
    for task, colour in (("kv", "C2"), ("needle", "C3"), ("tracking", "C4")):
        for length, style in ((1024, "--"), (4096, "-")):
            known = [r for r in held_out if f"{task}_{length}" in r]
            accuracy = [r[f"{task}_{length}"] for r in known]
            recall.plot([r["step"] for r in known], accuracy, style, color=colour, lw=1.2, label=f"{task}, {length}")
    recall.set_ylabel("recall, full cache")
    recall.set_xlabel("step of 131,072 tokens (dotted: rows of 1024 tokens before, of 4096 after)")
    losses.legend()
    recall.legend(ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    """Read the log, write both."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of train_small_neox.py")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--png", type=Path, required=True)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines()]
    arguments.png.parent.mkdir(parents=True, exist_ok=True)
    draw(records, arguments.png)
    with arguments.csv.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(r for r in records if r["step"] % 100 == 0)


if __name__ == "__main__":
    main()
