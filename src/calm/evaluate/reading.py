"""The images of a split, read once and in order, and looked at on the subject's device.

Where several processes work together (`calm.evaluate.reading`), whole batches are dealt out in turn: a batch is the
same images however many processes there are, and no image is read twice.

Several processes that evaluate together: each takes its share of the batches, and all end with the same figures.

A launcher such as torchrun starts them, and says who is who by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
LOCAL_RANK. What crosses between them is small, a few megabytes of sums and scores for each benchmark, so it goes
through the processors' memory (gloo), also where the work is done on GPUs.

A mistake in one process must end all of them. So `gathered` carries, beside the value, what has gone wrong; a process
that fails makes the same exchange with its message; and the others look between their batches (`listen`).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.evaluate.subject import Looked, Subject
from calm.images import Preprocessing

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "Progress",
    "Seen",
    "batches",
    "by_id",
    "first",
    "gathered",
    "in_order",
    "listen",
    "looks",
    "own_gpu",
    "paced",
    "rank",
    "share",
    "size",
    "together",
    "turns",
]

_T = TypeVar("_T")

_MEETING = timedelta(minutes=10)
"""That a process waits for all the others to start."""

_LONGEST = timedelta(days=1)
"""That a process waits for the slowest one. A process that is gone is noticed at once."""

_notes: Store | None = None
"""Where a process that fails leaves a note; there while `together` has the processes connected."""

_NOTE = "calm evaluate has failed"


class _AgreedError(CalmError):
    """Every process has heard what went wrong in one of them."""


class _NotedError(CalmError):
    """Another process has failed; it will say why at the next exchange."""


class _GoneError(CalmError):
    """Another process is not there any more."""


def size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def share(everything: Sequence[_T]) -> Sequence[_T]:
    """What this process does: every item falls to exactly one process, in turn. It may be nothing."""
    return everything[rank() :: size()]


def gathered(value: _T) -> list[_T]:
    """The value of each process, by rank. All processes call this at the same point; a value must survive pickle.

    Raises:
        CalmError: a process has failed, or is gone.
    """
    return [value] if size() == 1 else [theirs for _, theirs in _exchanged(None, value)]


def in_order(values: Mapping[int, _T]) -> dict[int, _T]:
    """The values of all processes by their keys, ascending, however the work was shared.

    Raises:
        CalmError: see `gathered`.
    """
    every = {key: value for some in gathered(dict(values)) for key, value in some.items()}
    return dict(sorted(every.items()))


def listen() -> None:
    """Stop if another process has failed meanwhile.

    Raises:
        CalmError: it has.
    """
    if _notes is not None and _notes.check([_NOTE]):
        raise _NotedError("another process has failed")


def own_gpu() -> str:
    """The name of this process's GPU: "cuda", or "cuda:1" for the second process of a machine.

    Raises:
        CalmError: there are more processes than GPUs.
    """
    if size() == 1:
        return "cuda"
    local, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if local >= count:
        raise CalmError(
            f"process {local} of this machine has no GPU of its own, {count} are visible: start {count} processes"
            " at most, or name one GPU for all of them, --device cuda:0"
        )
    return f"cuda:{local}"


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes of a launcher while the block runs; without a launcher there is nothing to do.

    If one process fails, the first says why, and all of them exit. Where something else has connected the
    processes already, they stay as they are.

    Raises:
        CalmError: the environment names several processes but not where they meet; a process is gone.
        SystemExit: a process has failed, and that has been said.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or size() > 1:
        yield
        return
    _connect()
    try:
        try:
            yield
            gathered(None)
        except (_AgreedError, _GoneError):
            raise
        except Exception as error:
            _exchanged(_told(error), None)
    except _AgreedError as error:
        if first():
            print(f"calm: {error}", file=sys.stderr, flush=True)
        _all_sent((None, None))  # a launcher ends the others when one exits: wait until it is said
        raise SystemExit(2) from error
    finally:
        _disconnect()


def _connect() -> None:
    global _notes
    from torch.distributed.rendezvous import rendezvous

    try:
        store, own, count = next(iter(rendezvous("env://", timeout=_MEETING)))
        dist.init_process_group("gloo", store=store, rank=own, world_size=count, timeout=_LONGEST)
    except (ValueError, RuntimeError) as error:
        raise CalmError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not meet ({error}): start them with"
            " torchrun, or take WORLD_SIZE out of the environment"
        ) from error
    _notes = store


def _disconnect() -> None:
    global _notes
    _notes = None
    dist.destroy_process_group()


def _told(error: Exception) -> str | None:
    """What the other processes are told of an error of this one."""
    if isinstance(error, _NotedError):
        return None
    if _notes is not None:
        _notes.set(_NOTE, "")
    if isinstance(error, (CalmError, OSError)):
        return str(error)
    traceback.print_exception(error)
    return f"process {rank()} of {size()} failed, see above: {error!r}"


def _exchanged(failure: str | None, value: _T) -> list[tuple[str | None, _T]]:
    every = _all_sent((failure, value))
    failures = [theirs for theirs, _ in every if theirs is not None]
    if failures:
        raise _AgreedError(failures[0])
    return every


def _all_sent(value: _T) -> list[_T]:
    every: list[_T] = [value] * size()
    try:
        dist.all_gather_object(every, value)
    except RuntimeError as error:
        raise _GoneError(
            "another process has ended without a word, and its images are missing: see its output, or whether memory"
            " ran out"
        ) from error
    return every


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
