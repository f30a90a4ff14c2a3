"""The head alone, forward and backward: CALM-EM beside the cheapest loss of the same logits.

The limit is cross-entropy on the mean of conv_last's logits: three matrix products (logits, gradient of the features,
gradient of the weights) and little else. Time is of all ways in turn, peak memory of a process of its own, above
the features and weights. Prints Markdown.

Run: python benchmarks/head.py [--classes 200 1000] [--channels 2048 --grid 28 --batch 16] [--channels_last]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass

import measure
import torch
import torch.nn.functional as F
from straightforward import StraightforwardHead
from torch import Tensor

from calm.model import CalmHead

LIMIT, OURS, PLAIN = "cross-entropy of the mean", "CALM-EM", "straightforward CALM-EM"
WAYS = (LIMIT, OURS, PLAIN)
TARGET = 1.3
"""Target of CALM-EM's time over the limit's."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the head."""

    classes: int
    channels: int
    grid: int
    batch: int
    channels_last: bool = False


def step(way: str, setting: Setting) -> Callable[[], None]:
    """A function that runs the head forward and backward once, on features that need a gradient."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(setting.batch, setting.channels, setting.grid, setting.grid, device=device).relu_()
    if setting.channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    targets = torch.randint(setting.classes, (setting.batch,), device=device)
    plain = way == PLAIN
    made = StraightforwardHead if plain else CalmHead
    head = made(setting.channels, setting.classes).to(device)

    def loss() -> Tensor:
        if plain:
            return head.loss(features, targets)
        if way == LIMIT:
            return F.cross_entropy(head.conv_last(features).mean(dim=(2, 3)), targets)
        return head(features).loss(targets)

    def once() -> None:
        features.grad = None
        head.zero_grad()
        loss().backward()

    return once


def one_step(way: str, *setting: object) -> None:
    """For the process that measures memory."""
    step(way, Setting(*setting))()


def inputs_only(way: str, *setting: object) -> None:
    """Features and weights, and no step."""
    step(way, Setting(*setting))


def peak(way: str, setting: Setting) -> float:
    """MiB of a step, above features and weights."""
    words = (way, *astuple(setting))
    return measure.peak_memory(one_step, *words) - measure.peak_memory(inputs_only, *words)


def compare(setting: Setting, rounds: int) -> list[list[object]]:
    """Rows of the table."""
    times = measure.seconds({way: step(way, setting) for way in WAYS}, rounds)
    memory = {way: peak(way, setting) for way in WAYS}
    rows: list[list[object]] = []
    for way in WAYS:
        slower, larger = measure.ratio(times[way], times[LIMIT]), memory[way] / memory[LIMIT]
        rows.append(
            [
                setting.classes,
                way,
                f"{1000 * measure.median(times[way]):.0f}",
                f"{slower:.2f}",
                measure.verdict(slower, TARGET) if way == OURS else "",
                f"{measure.ratio(times[PLAIN], times[way]):.2f}",
                f"{memory[way]:.0f}",
                f"{larger:.2f}",
            ]
        )
    return rows


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--grid", type=int, default=28, help="locations of a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    form = "channels last" if flags.channels_last else "channels first"
    print(f"{flags.channels} channels, {flags.grid}x{flags.grid} locations, batch {flags.batch}, fp32, {form}:\n")
    settings = [
        Setting(classes, flags.channels, flags.grid, flags.batch, flags.channels_last) for classes in flags.classes
    ]
    rows = [row for setting in settings for row in compare(setting, flags.rounds)]
    header = ["classes", "way", "ms", "time over limit", f"target {TARGET}", "straightforward / this"]
    print(measure.table([*header, "peak MiB", "memory over limit"], rows) + "\n")
    print(f"What takes the time of {OURS} with {flags.classes[-1]} classes:\n")
    print(measure.hottest(step(OURS, settings[-1])))


if __name__ == "__main__":
    main()
