"""Several processes, started by a launcher such as torchrun, evaluate together and end with the same figures.

Each takes its share of the batches. They exchange a few megabytes of sums and scores, so gloo does it, also for GPUs.
An error in one process must end all: `all_gather` exchanges, beside the value, what has gone wrong; a process that
fails takes part in the next exchange with its message; and between batches the others call `check_failures`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from calm.errors import CalmError
from calm.inference import resolve_device

T = TypeVar("T")

_JOIN_TIMEOUT = timedelta(minutes=10)
"""Timeout for all processes to join."""

_EXCHANGE_TIMEOUT = timedelta(days=1)
"""Timeout for the slowest process at an exchange. A process that has ended is noticed at once."""

_store: Any = None
"""Where a process that fails sets ``_FAILED``; None outside `process_group`."""

_FAILED = "calm evaluate has failed"


class _AgreedError(CalmError):
    """The error of one process, which all of them know."""


class _OtherFailedError(CalmError):
    """Another process has failed, and will say why at the next exchange."""


class _LostError(CalmError):
    """Another process has ended without taking part in an exchange."""


def world_size() -> int:
    """Return the number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the items of this process, perhaps none; items are dealt out in turn, each to one process."""
    return items[rank() :: world_size()]


def all_gather(value: T) -> list[T]:
    """Return the value of each process, by rank. All processes call this at the same point; values are pickled.

    Raises:
        CalmError: a process has failed, or has ended.
    """
    return [value] if world_size() == 1 else _exchange(None, value)


def gather_dict(values: Mapping[int, T]) -> dict[int, T]:
    """Return the entries of all processes, by ascending keys; errors are those of `all_gather`."""
    entries = {key: value for part in all_gather(dict(values)) for key, value in part.items()}
    return dict(sorted(entries.items()))


def check_failures() -> None:
    """Raise a CalmError if another process has failed meanwhile."""
    if _store is not None and _store.check([_FAILED]):
        raise _OtherFailedError("another process has failed")


def device_of_process(name: str) -> torch.device:
    """Return the device of a name, as `resolve_device` does; of several processes, each takes a GPU of its own.

    Raises:
        CalmError: the device cannot be used; there are more processes than GPUs.
    """
    if world_size() == 1:
        return resolve_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"  # no other device can gather results
    if name == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
        if local >= count:
            raise CalmError(
                f"process {local} of this machine has no GPU of its own, {count} are visible: start {count} processes"
                " at most, or name one GPU for all of them, --device cuda:0"
            )
        name = f"cuda:{local}"
    return resolve_device(name)


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes of a launcher while the block runs; without a launcher do nothing.

    If one process fails, the first prints why, and all of them exit. A process group that is initialised already is
    used as it is.

    Raises:
        CalmError: the environment names several processes but not where they meet; a process has ended.
        SystemExit: a process has failed, and the reason has been printed.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or world_size() > 1:
        yield
        return
    global _store
    _store = _connect()
    try:
        try:
            yield
            all_gather(None)
        except (_AgreedError, _LostError):
            raise
        except Exception as error:
            _exchange(_announce(error), None)
    except _AgreedError as error:
        if is_first():
            print(f"calm: {error}", file=sys.stderr, flush=True)
        _exchange(None, None)  # a launcher kills the others when one exits: wait until the reason is printed
        raise SystemExit(2) from error
    finally:
        _store = None
        dist.destroy_process_group()


def _connect() -> Any:
    from torch.distributed.rendezvous import rendezvous

    try:
        store, own, count = next(iter(rendezvous("env://", timeout=_JOIN_TIMEOUT)))
        dist.init_process_group("gloo", store=store, rank=own, world_size=count, timeout=_EXCHANGE_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise CalmError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes do not meet ({error}): start them with"
            " torchrun, or take WORLD_SIZE out of the environment"
        ) from error
    return store


def _announce(error: Exception) -> str | None:
    """Let the other processes know of an error of this one; return the message for them."""
    if isinstance(error, _OtherFailedError):
        return None
    if _store is not None:
        _store.set(_FAILED, "")
    if isinstance(error, (CalmError, OSError)):
        return str(error)
    traceback.print_exception(error)
    return f"process {rank()} of {world_size()} failed, see above: {error!r}"


def _exchange(failure: str | None, value: T) -> list[T]:
    gathered = [(failure, value)] * world_size()
    try:
        dist.all_gather_object(gathered, (failure, value))
    except RuntimeError as error:
        raise _LostError(
            "another process has ended without a word, and its images are missing: see its output, or whether memory"
            " ran out"
        ) from error
    if failures := [message for message, _ in gathered if message is not None]:
        raise _AgreedError(failures[0])
    return [each for _, each in gathered]
