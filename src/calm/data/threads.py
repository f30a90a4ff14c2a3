"""Do the same to many files at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from calm.errors import CalmError

__all__ = ["in_threads"]

S = TypeVar("S")
T = TypeVar("T")

BLOCK = 1024
"""Items handed to the threads at a time: bounds the memory for results that wait."""


def in_threads(function: Callable[[S], T], items: Sequence[S], workers: int | None = None) -> Iterator[T]:
    """``function`` of each item, in order; several run at once.

    Args:
        function: of one item; reading and decoding files lets other threads run.
        items: any number.
        workers: threads; None is twice the number of processors.

    Raises:
        CalmError: ``workers`` below 1.
    """
    if workers is not None and workers < 1:
        raise CalmError(f"workers is {workers}: give 1 or more threads")
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), BLOCK):
            yield from pool.map(function, items[start : start + BLOCK])
