"""Several processes that evaluate together: each takes its share of the batches, and all end with the same figures.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from calm.errors import CalmError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["first", "gathered", "in_order", "listen", "own_gpu", "rank", "share", "size", "together"]

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
