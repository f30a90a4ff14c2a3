"""A training step (forward, loss, backward, optimiser) of CALM-EM beside a CAM model's whose head averages first.

Three models of one backbone take the same images and labels in turn: CAM (mean over locations, then one linear layer:
the cheapest head there is), CALM-EM of this package, and CALM-EM as its formulas are written
(`benchmarks/straightforward.py`). Peak memory is that of a process of its own, above what it held before the model was
made: weights, gradients, momentum and activations. Where there is a GPU, the steps are also timed in bf16 with
channels last and a compiled backbone. Prints Markdown tables.

Run: python benchmarks/training_step.py [--backbone resnet50 --size 224 --batch 4 --classes 200 1000 --rounds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass

import measure
import torch
from straightforward import StraightforwardHead
from torch import Tensor, nn

from calm.images import Preprocessing
from calm.model import create_model

CAM, CALM, PLAIN = "CAM, mean first", "CALM-EM", "straightforward CALM-EM"
WAYS = (CAM, CALM, PLAIN)
TIME_LIMITS = {200: 1.05, 1000: 1.10}
MEMORY_LIMIT = 1.10
GPU_LIMIT = 1.05


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    backbone: str
    size: int
    batch: int
    classes: int
    fast: bool = False  # bf16, channels last, compiled backbone


def training_step(way: str, setting: Setting) -> Callable[[], None]:
    """A function that takes one step of training."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = Preprocessing(size=(setting.size, setting.size))
    method = "cam" if way == CAM else "calm-em"
    model = create_model(setting.backbone, setting.classes, method, preprocessing=prepared).to(device).train()
    backbone: nn.Module = model.backbone
    channels = model.head.conv_last.in_channels
    head = StraightforwardHead(channels, setting.classes).to(device)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, device=device)
    targets = torch.randint(setting.classes, (setting.batch,), device=device)
    if setting.fast:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        backbone.compile()

    def loss() -> Tensor:
        return head.loss(backbone(images), targets) if way == PLAIN else model.loss(images, targets)

    own_head = head if way == PLAIN else model.head
    weights = [*backbone.parameters(), *own_head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=setting.fast):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def steps(way: str, *setting: object) -> None:
    """Two steps: the first makes the momentum, the second has it."""
    step = training_step(way, Setting(*setting))
    step()
    step()


def compare(setting: Setting, rounds: int) -> tuple[list[list[object]], Callable[[], None] | None]:
    """Rows of the table, and CALM's step if it is over a target."""
    ways = {way: training_step(way, setting) for way in WAYS}
    times = measure.seconds(ways, rounds, warm=3 if setting.fast else 1)
    memory = {way: measure.peak_memory(steps, way, *astuple(setting)) for way in WAYS}
    limit = GPU_LIMIT if setting.fast else TIME_LIMITS.get(setting.classes)
    rows = []
    missed = False
    for way in WAYS:
        slower = measure.ratio(times[way], times[CAM])
        larger = memory[way] / memory[CAM]
        judged = ["", ""]
        if way == CALM and limit is not None:
            judged = [measure.verdict(slower, limit), measure.verdict(larger, MEMORY_LIMIT)]
            missed = measure.verdict(slower, limit) != "met" or measure.verdict(larger, MEMORY_LIMIT) != "met"
        time = measure.median(times[way])
        rows.append(
            [
                setting.classes,
                way,
                f"{1000 * time:.0f}",
                f"{setting.batch / time:.2f}",
                "" if way == CAM else measure.overhead(slower),
                judged[0],
                f"{memory[way]:.0f}",
                "" if way == CAM else measure.overhead(larger),
                judged[1],
            ]
        )
    return rows, ways[CALM] if missed else None


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 4)
    parser.add_argument("--classes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    header = [
        "classes",
        "way",
        "ms/step",
        "images/s",
        "time over CAM",
        "target",
        "peak MiB",
        "memory over CAM",
        "target",
    ]
    for fast in (False, True) if torch.cuda.is_available() else (False,):
        how = "bf16, channels last, compiled backbone" if fast else "fp32"
        print(f"{flags.backbone}, {flags.size}x{flags.size} pixels, batch {flags.batch}, {how}:\n")
        rows, missed = [], {}
        for classes in flags.classes:
            setting = Setting(flags.backbone, flags.size, flags.batch, classes, fast)
            some, step = compare(setting, flags.rounds)
            rows += some
            if step is not None:
                missed[classes] = step
        print(measure.table(header, rows) + "\n")
        for classes, step in missed.items():
            print(f"CALM-EM's step for {classes} classes, by operation:\n\n{measure.hottest(step)}\n")


if __name__ == "__main__":
    main()
