"""Mixup and cutmix: whole batches, soft targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from calm.data.augmentation import Augmentation
from calm.data.randomness import seeded
from calm.errors import CalmError

__all__ = ["BatchMix"]


class BatchMix:
    """Mixup or cutmix of a batch, by the numbers that name the batch.

    Each image is mixed with its neighbour in the batch, so batches must be shuffled. Several processes mix
    within their local batches, and differ from one process with the whole batch.

    Args:
        augmentation: ``mixup``, ``cutmix`` and ``mix_probability`` are used.
        num_classes: C.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        from torchvision.transforms import v2

        if num_classes < 2:
            raise CalmError(f"num_classes is {num_classes}: mixing needs two classes or more")
        self.num_classes = num_classes
        self.probability = augmentation.mix_probability
        self.mixers: list[nn.Module] = []
        if augmentation.mixup:
            self.mixers.append(v2.MixUp(alpha=augmentation.mixup, num_classes=num_classes))
        if augmentation.cutmix:
            self.mixers.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=num_classes))

    def __call__(
        self, images: Tensor, labels: Tensor, *, seed: int, epoch: int, step: int, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images: (B, 3, H, W) float, on any device; not changed.
            labels: (B,) class indices.
            seed: of the run.
            epoch: from 0.
            step: batch within the epoch, from 0.
            rank: of the process.

        Returns:
            Images, and targets (B, C) whose rows sum to 1: one-hot rows for a batch that is not mixed.
        """
        with seeded(seed, epoch, step, rank):
            if self.mixers and float(torch.rand(())) < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                mixed: tuple[Tensor, Tensor] = mixer(images, labels)
                return mixed
        return images, one_hot(labels, self.num_classes).to(images.dtype)
