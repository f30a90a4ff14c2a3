"""The images of a split, read once and in order, on the subject's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.preprocess import Preprocessing

__all__ = ["Progress", "batches"]

Progress: TypeAlias = Callable[[int], None]
"""Told after each batch how many images it had."""


def batches(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device | str,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Float[Tensor, "b 3 H W"], Int[Tensor, " b"], Int[Tensor, " b"]]]:
    """Images of a split, batch by batch.

    Args:
        split: its order is kept.
        preprocessing: the model's.
        device: where the images go; labels and indices stay on the CPU.
        batch_size: most images in a batch.
        workers: processes that read ahead; 0 reads here.
        progress: called after each batch was dealt with.
        indices: read only these images of the split; None: all.

    Yields:
        Normalised images, class indices, and positions in the split.

    Raises:
        CalmError: a batch size below 1, a negative number of workers, an image that cannot be read.
    """
    if batch_size < 1 or workers < 0:
        raise CalmError(
            f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}"
        )
    data: Dataset[tuple[Tensor, int, int]] = ImageDataset(split, eval_transform(preprocessing))
    if indices is not None:
        data = Subset(data, list(indices))
    pinned = torch.device(device).type == "cuda"
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=pinned)
    for images, labels, positions in loader:
        yield images.to(device, non_blocking=pinned), labels, positions
        if progress is not None:
            progress(len(images))
