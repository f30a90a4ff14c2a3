"""The images of a split, read once and in order, and looked at on the subject's device.

Where several processes work together (`calm.evaluate.processes`), whole batches are dealt out in turn: a batch is the
same images however many processes there are, and no image is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.evaluate.processes import in_order, listen, rank, share, size
from calm.evaluate.subject import Looked, Subject
from calm.preprocess import Preprocessing

__all__ = ["Progress", "Seen", "batches", "by_id", "looks", "paced", "turns"]

Progress: TypeAlias = Callable[[int], None]
"""Told after each batch how many images it had; with several processes, how many all their batches had."""


def paced(progress: Progress | None, reads: int, total: int) -> Progress | None:
    """Progress of a benchmark that reads ``reads`` images in all, told as if they were ``total``."""
    read = 0

    def tell(count: int) -> None:
        nonlocal read
        before, read = read, read + count
        assert progress is not None
        progress(read * total // reads - before * total // reads)

    return None if progress is None else tell


def turns(
    places: Sequence[int], batch_size: int, progress: Progress | None = None
) -> Iterator[Sequence[int]]:
    """The batches of places that this process does, in order.

    Raises:
        CalmError: a batch size below 1; another process has failed.
    """
    runs = _runs(places, batch_size)
    for start in range(0, len(runs), size()):
        now = runs[start : start + size()]
        if rank() < len(now):
            yield now[rank()]
        listen()
        if progress is not None:
            progress(sum(map(len, now)))


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
    """Images of a split, batch by batch: the batches of this process.

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
        CalmError: a batch size below 1, a negative number of workers, an image that cannot be read; another
            process has failed.
    """
    if workers < 0:
        raise CalmError(f"workers must be at least 0, got {workers}")
    data: Dataset[tuple[Tensor, int, int]] = ImageDataset(split, eval_transform(preprocessing))
    places = range(len(split.records)) if indices is None else indices
    pinned = torch.device(device).type == "cuda"
    loader = DataLoader(
        data,
        batch_sampler=[list(run) for run in share(_runs(places, batch_size))],
        num_workers=workers,
        pin_memory=pinned,
    )
    for _, (images, labels, positions) in zip(turns(places, batch_size, progress), loader, strict=False):
        yield images.to(device, non_blocking=pinned), labels, positions


class Seen(NamedTuple):
    """A batch that a subject has looked at, on its device.

    Attributes:
        images: normalised, the model's input.
        labels: the right classes.
        keys: positions in the split.
        looked: what was seen.
    """

    images: Float[Tensor, "b 3 H W"]
    labels: Int[Tensor, " b"]
    keys: Int[Tensor, " b"]
    looked: Looked


def looks(
    subject: Subject,
    split: Split,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Seen]:
    """One look at every image (see `batches` for the arguments).

    Raises:
        CalmError: a label that the subject has no class for; see `batches`.
    """
    for images, labels, positions in batches(
        split,
        subject.preprocessing,
        subject.device,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        indices=indices,
    ):
        looked = subject.look(images)
        classes = looked.probs.shape[1]
        if int(labels.max()) >= classes:
            raise CalmError(
                f"a label is {int(labels.max())}, {subject.label} has classes 0 to {classes - 1}: the data set"
                " is not the one it was trained for"
            )
        yield Seen(images, labels.to(subject.device), positions.to(subject.device), looked)


def by_id(split: Split, values: Mapping[int, float]) -> dict[str, float]:
    """Numbers of images by their positions, from all processes, as numbers by their ids in the split's order."""
    return {split.records[place].id: value for place, value in in_order(values).items()}


def _runs(places: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    if batch_size < 1:
        raise CalmError(f"batch_size must be at least 1, got {batch_size}")
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
