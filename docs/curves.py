"""Draw the training curves of runs side by side: python docs/curves.py OUT.png RUN RUN ..."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "val_accuracy": "validation accuracy",
    "train_nll": "training -log p(y | x), nats",
    "val_nll": "validation -log p(y | x), nats",
    "prior_entropy_relative": "entropy of the prior / log N",
}


def main(out: str, *runs: str) -> None:
    """One panel per measure, one line per run."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.2), layout="constrained")
    for number, run in enumerate(map(Path, runs)):
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
            points = [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                axis.plot(*zip(*points, strict=True), label=run.name, marker=".", color=f"C{number}")
            axis.set(title=title, xlabel="epoch")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
