"""The cost of a pooling exponent below 1: CALM's loss with its gradient, and prediction, of the head's outputs alone.

The exponents take turns; the table has each one's time over that of exponent 1, which is the published CALM. Prints
Markdown.

Run: python benchmarks/pooling.py [--sizes 32x200x28 32x1000x14 64x27x14] [--exponents 0.3 0.05 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch

from calm.output import CalmOutput


def train(exponent: float, images: int, classes: int, grid: int) -> Callable[[], None]:
    """A function that computes CALM-EM's loss and its gradient once."""
    torch.manual_seed(0)
    logits = torch.randn(images, classes, grid, grid).requires_grad_()
    scores = torch.randn(images, 1, grid, grid).requires_grad_()
    targets = torch.randint(classes, (images,))

    def once() -> None:
        logits.grad = scores.grad = None
        CalmOutput(logits, scores, "exp", pooling_exponent=exponent).loss(targets).backward()

    return once


def predict(exponent: float, images: int, classes: int, grid: int) -> Callable[[], None]:
    """A function that computes the probabilities once."""
    torch.manual_seed(0)
    output = CalmOutput(
        torch.randn(images, classes, grid, grid), torch.randn(images, 1, grid, grid), "exp", pooling_exponent=exponent
    )

    def once() -> None:
        with torch.no_grad():
            _ = output.log_probs

    return once


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["32x200x28", "32x1000x14", "64x27x14"])
    parser.add_argument("--exponents", nargs="+", type=float, default=[0.3, 0.05, 0.0])
    parser.add_argument("--rounds", type=int, default=7)
    words = parser.parse_args()
    rows = []
    for size in words.sizes:
        images, classes, grid = map(int, size.split("x"))
        row: list[object] = [f"{images} x {classes} x {grid}x{grid}"]
        for make in (train, predict):
            ways = {str(a): make(a, images, classes, grid) for a in (1.0, *words.exponents)}
            times = measure.seconds(ways, words.rounds)
            row.append(f"{1000 * measure.median(times['1.0']):.3g}")
            row += [f"{measure.ratio(times[str(a)], times['1.0']):.2f}" for a in words.exponents]
        rows.append(row)
    exponents = [f"{a:g}" for a in words.exponents]
    header = ["images x classes x grid", "loss, ms", *exponents, "prediction, ms", *exponents]
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
