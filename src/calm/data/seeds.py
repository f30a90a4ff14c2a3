"""Random numbers that depend only on their purpose, and a function of many files in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeVar

from calm.errors import CalmError


def mix_seed(*parts: int) -> int:
    """Return a 64-bit seed of integers; other integers, or another order of them, give an unrelated seed.

    >>> mix_seed(0, 1, 2) == mix_seed(0, 1, 2), mix_seed(0, 1, 2) == mix_seed(0, 2, 1)
    (True, False)
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Run the block with torch's CPU generator seeded by ``parts``, and restore the generator afterwards.

    Generators of accelerators are neither seeded nor restored.
    """
    import torch  # here, so that a help page need not wait for it

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*parts))
        yield


S = TypeVar("S")
T = TypeVar("T")

BLOCK = 1024  # items submitted to the threads at a time, which bounds the memory of results that wait


def in_threads(function: Callable[[S], T], items: Sequence[S], workers: int | None = None) -> Iterator[T]:
    """Yield ``function`` of each item, in order, computed in threads: by default two per processor.

    Raises:
        CalmError: ``workers`` below 1.
    """
    if workers is not None and workers < 1:
        raise CalmError(f"workers is {workers}: give 1 or more threads")
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), BLOCK):
            yield from pool.map(function, items[start : start + BLOCK])
