"""Read the images of a split once, in order, and predict them on the subject's device.

Several processes (`calm.evaluate.distributed`) take whole batches in turn: a batch has the same images however many
processes there are, and no image is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.evaluate.distributed import check_failures, gather_dict, rank, share, world_size
from calm.evaluate.subject import Prediction, Subject
from calm.images import Preprocessing

Progress: TypeAlias = Callable[[int], None]
"""Called after each batch with its number of images; of several processes, with that of all their batches."""


class Reading(TypedDict, total=False):
    """Keyword arguments of every benchmark.

    Attributes:
        batch_size: images in a forward pass, 32 by default. It does not change the figures.
        workers: processes that read images ahead; 0, the default, reads in this one.
        progress: called after each batch with its share of the work, as a number of the split's images.
    """

    batch_size: int
    workers: int
    progress: Progress | None


def scaled_progress(progress: Progress | None, reads: int, total: int) -> Progress | None:
    """Return the progress of a benchmark that reads ``reads`` images in all, reported as if they were ``total``."""
    if progress is None:
        return None
    read = 0

    def advance(count: int) -> None:
        nonlocal read
        before, read = read, read + count
        progress(read * total // reads - before * total // reads)

    return advance


def own_batches(indices: Sequence[int], batch_size: int, progress: Progress | None = None) -> Iterator[Sequence[int]]:
    """Yield the batches of indices of this process, in order.

    Raises:
        CalmError: a batch size below 1; another process has failed.
    """
    every = _split_batches(indices, batch_size)
    for start in range(0, len(every), world_size()):
        current = every[start : start + world_size()]
        if rank() < len(current):
            yield current[rank()]
        check_failures()
        if progress is not None:
            progress(sum(map(len, current)))


def batches(
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[Float[Tensor, "b channels H W"], Int[Tensor, " b"], Int[Tensor, " b"]]]:
    """Yield normalised images on ``device``, class indices and positions: this process's batches of ``indices``.

    Raises:
        CalmError: a batch size below 1, a negative number of workers, an image that cannot be read; another
            process has failed.
    """
    if workers < 0:
        raise CalmError(f"workers must be at least 0, got {workers}")
    data: Dataset[tuple[Tensor, int, int]] = ImageDataset(
        split, eval_transform(preprocessing), preprocessing=preprocessing
    )
    own = [list(batch) for batch in share(_split_batches(indices, batch_size))]
    pinned = device.type == "cuda"
    loader = DataLoader(data, batch_sampler=own, num_workers=workers, pin_memory=pinned)
    for _, (images, labels, positions) in zip(own_batches(indices, batch_size, progress), loader, strict=False):
        yield images.to(device, non_blocking=pinned), labels, positions


class Batch(NamedTuple):
    """A batch with its prediction, all on the subject's device."""

    images: Float[Tensor, "b channels H W"]  # normalised, the model's input
    labels: Int[Tensor, " b"]  # the right classes, by the model's numbers
    keys: Int[Tensor, " b"]  # positions in the split
    prediction: Prediction


def predictions(
    subject: Subject, split: Split, indices: Sequence[int] | None = None, **reading: Unpack[Reading]
) -> Iterator[Batch]:
    """Yield the batches of this process with their predictions; ``indices``: of these images only.

    Raises:
        CalmError: a label that the subject has no class for; probabilities that are not finite; see `batches`.
    """
    indices, model_class = range(len(split.records)) if indices is None else indices, subject.classes(split)
    for images, labels, positions in batches(split, subject.preprocessing, subject.device, indices, **reading):
        labels, prediction = model_class[labels], subject.predict(images)
        classes = prediction.probs.shape[1]
        if int(labels.max()) >= classes:
            raise CalmError(
                f"a label is {int(labels.max())}, {subject.label} has classes 0 to {classes - 1}: the data set"
                " is not the one it was trained for"
            )
        if not bool((finite := prediction.probs.isfinite().all(dim=1).cpu()).all()):
            image = split.records[int(positions[~finite][0])].path
            raise CalmError(f"{subject.label} predicts NaN for {image}: numbers overflow in it; try it in float32")
        yield Batch(images, labels.to(subject.device), positions.to(subject.device), prediction)


def scores_by_id(split: Split, scores: Mapping[int, float]) -> dict[str, float]:
    """Return the scores of all processes by image id, in the split's order; they are given by position."""
    return {split.records[position].id: score for position, score in gather_dict(scores).items()}


def _split_batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    if batch_size < 1:
        raise CalmError(f"batch_size must be at least 1, got {batch_size}")
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
