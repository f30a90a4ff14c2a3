"""The same few validation images with their maps, after every epoch: watch the model learn where to look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.files import atomic_path
from calm.heatmaps import Normalization
from calm.model import CalmModel
from calm.output import CalmOutput
from calm.render import Picture, Tile, overlay, panel
from calm.train.journal import TensorBoard
from calm.train.module import TrainingModule

__all__ = ["Panel", "choose_images", "draw"]

MAPS = {"calm": ("prior", "joint"), "cam": ("cam",)}
RIGHT, WRONG = (70, 160, 90), (200, 80, 70)


class Panel(pl.Callback):
    """Draws ``panels/epoch_NNN.png`` and the TensorBoard image ``panel``.

    Args:
        folder: of the pictures.
        dataset: the validation images, with the model's preprocessing.
        count: how many images to draw.
        board: where the picture goes, too.
    """

    def __init__(self, folder: Path, dataset: ImageDataset, count: int, board: TensorBoard) -> None:
        self.folder, self.dataset, self.board = folder, dataset, board
        self.indices = choose_images(dataset.split, count)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw with the model that is evaluated."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TrainingModule)
        items = [self.dataset[index] for index in self.indices]
        images = torch.stack([image for image, _, _ in items]).to(pl_module.device)
        labels = torch.tensor([label for _, label, _ in items], device=pl_module.device)
        epoch = trainer.current_epoch + 1
        picture = draw(pl_module.evaluated, images, labels, title=f"epoch {epoch}")
        with atomic_path(self.folder / f"epoch_{epoch:03d}.png") as temporary:
            Image.fromarray(picture).save(temporary)
        self.board.image("panel", torch.from_numpy(picture), trainer.global_step - 1)


def choose_images(split: Split, count: int) -> list[int]:
    """Indices of ``count`` images: the first of classes spread evenly over all, then the second, and so on."""
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
def draw(model: CalmModel, images: Tensor, labels: Tensor, *, title: str = "") -> Picture:
    """A picture, uint8 RGB: a column per image, with the true class's maps below it.

    Args:
        model: in any mode; it is left in the mode it was in.
        images: normalised, (B, 3, H, W).
        labels: true classes, (B,).
        title: a line above.
    """
    training = model.training
    model.eval()
    try:
        output = model(images)
        kinds = MAPS["calm" if isinstance(output, CalmOutput) else "cam"]
        maps = {kind: output.attribute(labels, kind).float().cpu() for kind in kinds}
        probs = output.probs.cpu()
    finally:
        model.train(training)
    pixels = (
        model.preprocessing.denormalize(images.float())
        .mul(255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    pictures = [
        Tile(
            image,
            _caption(model.class_names, row, int(label)),
            RIGHT if int(row.argmax()) == label else WRONG,
        )
        for image, row, label in zip(pixels, probs, labels.cpu(), strict=True)
    ]
    how: Normalization = "minmax" if kinds == ("cam",) else "max"
    rows: list[Sequence[Tile]] = [pictures]
    for kind in kinds:
        rows.append(
            [Tile(overlay(image, values, how=how)) for image, values in zip(pixels, maps[kind], strict=True)]
        )
    return panel(rows, title=title, labels=["", *kinds], cell=128)


def _caption(names: Sequence[str], probs: Tensor, label: int) -> str:
    guess = int(probs.argmax())
    told = f"{names[label]}: {100 * float(probs[label]):.0f} %"
    return told if guess == label else f"{told}\n{names[guess]}: {100 * float(probs[guess]):.0f} %"
