"""A picture of the same few validation images with their maps, drawn after every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.heatmaps import Normalization
from calm.model import CalmModel
from calm.output import CalmOutput
from calm.render import Picture, Tile, overlay, panel

__all__ = ["choose_images", "draw"]

MAPS = {"calm": ("prior", "joint"), "cam": ("cam",)}
RIGHT, WRONG = (70, 160, 90), (200, 80, 70)


def choose_images(split: Split, count: int) -> list[int]:
    """Return indices of ``count`` images: the first of classes spread evenly over all, then the second, and so on."""
    members: dict[int, list[int]] = {}
    for index, record in enumerate(split.records):
        members.setdefault(record.label, []).append(index)
    labels = sorted(members)
    width = min(count, len(labels))
    spread = [labels[position * len(labels) // width] for position in range(width)]
    rounds = range(max(len(images) for images in members.values()))
    ordered = [members[label][turn] for turn in rounds for label in spread if turn < len(members[label])]
    return ordered[:count]


@torch.no_grad()
def draw(model: CalmModel, dataset: ImageDataset, indices: Sequence[int], *, title: str = "") -> Picture:
    """Draw a column per image, with the true class's maps below it; the frame is green where the prediction is right.

    Args:
        model: on any device and in any mode, in which it is left.
        dataset: with the model's preprocessing.
        indices: of the images in it.
        title: a line above.

    Returns:
        The picture, uint8 RGB (H, W, 3).
    """
    items = [dataset[index] for index in indices]
    images = torch.stack([image for image, _, _ in items]).to(model.device)
    labels = torch.tensor([label for _, label, _ in items], device=model.device)
    training = model.training
    model.eval()
    try:
        output = model(images)
        kinds = MAPS["calm" if isinstance(output, CalmOutput) else "cam"]
        maps = {kind: output.attribute(labels, kind).float().cpu() for kind in kinds}
        probs = output.probs.cpu()
    finally:
        model.train(training)
    levels = model.preprocessing.denormalize(images.float()).mul(255).round().byte()
    pixels = levels.permute(0, 2, 3, 1).cpu().numpy()
    how: Normalization = "minmax" if kinds == ("cam",) else "max"
    rows: list[Sequence[Tile]] = [
        [
            Tile(
                image, _caption(model.class_names, row, label), RIGHT if int(row.argmax()) == label else WRONG
            )
            for image, row, label in zip(pixels, probs, labels.tolist(), strict=True)
        ]
    ]
    for kind in kinds:
        overlays = [overlay(image, values, how=how) for image, values in zip(pixels, maps[kind], strict=True)]
        rows.append([Tile(image) for image in overlays])
    return panel(rows, title=title, labels=["", *kinds], cell=128)


def _caption(names: Sequence[str], probs: Tensor, label: int) -> str:
    guess = int(probs.argmax())
    truth = f"{names[label]}: {100 * float(probs[label]):.0f} %"
    return truth if guess == label else f"{truth}\n{names[guess]}: {100 * float(probs[guess]):.0f} %"
