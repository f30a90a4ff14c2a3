"""Images per second of forward passes and training steps on this machine's GPU, or on its processor.

For each backbone four passes take turns (as created, `optimized_for_inference`, and both in bfloat16) and three steps
of SGD (as created, channels last, and that in bfloat16); the fastest of the rounds counts. Prints a Markdown table.

Run: python benchmarks/devices.py [--backbone tf_efficientnet_lite0 resnet50 --device cpu --threads 2 --rounds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch

from calm.images import Preprocessing
from calm.model import CalmModel, create_model

BATCHES = {  # on a processor and on a GPU
    "tf_efficientnet_lite0": (32, 256),
    "resnet50": (8, 64),
    "resnet18": (16, 256),
    "small_resnet": (64, 512),
}
OPTIONS = {"tf_efficientnet_lite0": {"output_stride": 16}, "resnet18": {"output_stride": 16}}


def forward(model: CalmModel, images: torch.Tensor, half: bool) -> Callable[[], None]:
    """Return a function that predicts the images."""

    def run() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            _ = model(images).probs

    return run


def step(model: CalmModel, images: torch.Tensor, targets: torch.Tensor, half: bool) -> Callable[[], None]:
    """Return a function that takes one step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            loss = model.loss(images, targets)
        loss.backward()
        optimizer.step()

    return run


def speeds(backbone: str, device: str, rounds: int) -> list[object]:
    """Return a row of the table."""
    batch = BATCHES.get(backbone, (16, 128))[device != "cpu"]
    size = 64 if backbone == "small_resnet" else 224

    def model() -> CalmModel:
        prepared = Preprocessing(size=(size, size))
        return create_model(backbone, 200, preprocessing=prepared, **OPTIONS.get(backbone, {})).to(device)

    plain, last = model().eval(), {"memory_format": torch.channels_last}
    fast, first, second = plain.optimized_for_inference(), model().train(), model().to(**last).train()
    images = torch.randn(batch, 3, size, size, device=device)
    targets, images_last = torch.randint(200, (batch,), device=device), images.contiguous(**last)
    ways = {
        "plain": forward(plain, images, False),
        "optimised": forward(fast, images_last, False),
        "plain, bf16": forward(plain, images, True),
        "optimised, bf16": forward(fast, images_last, True),
        "step": step(first, images, targets, False),
        "step, channels last": step(second, images_last, targets, False),
        "step, channels last, bf16": step(second, images_last, targets, True),
    }
    times = measure.seconds(ways, rounds)
    return [f"{backbone}, {size} pixels", batch, *(f"{batch / min(times[way]):,.1f}" for way in ways)]


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=list(BATCHES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    header = [
        "backbone",
        "batch",
        "forward",
        "optimised",
        "bf16",
        "optimised, bf16",
        "step",
        "channels last",
        "and bf16",
    ]
    print(measure.table(header, [speeds(name, flags.device, flags.rounds) for name in flags.backbone]))


if __name__ == "__main__":
    main()
