"""The images of a split in batches, as a method wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.preprocess import Preprocessing

__all__ = ["Progress", "batches"]

Progress = Callable[[int, int], None]
"""Told how many images are done, and of how many."""


def batches(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device | str,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and indices, in the order of the split; every image is read once.

    Yields:
        (B, 3, H, W) float32 normalised and (B,) class indices, both on ``device``; (B,) positions in the split.

    Raises:
        CalmError: no image, or one that cannot be read.
    """
    dataset = ImageDataset(split, eval_transform(preprocessing))
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, pin_memory=torch.device(device).type == "cuda"
    )
    done = 0
    for images, labels, indices in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), indices
        done += len(indices)
        if progress is not None:
            progress(done, len(dataset))
