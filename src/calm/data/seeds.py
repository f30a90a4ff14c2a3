"""Do the same to many files at once.

Random choices that depend on what they are for, and on nothing that happened before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeVar

from calm.errors import CalmError

__all__ = ["in_threads", "mix_seed", "seeded"]


def mix_seed(*parts: int) -> int:
    """A 64-bit seed from integers: other parts, or another order, an unrelated seed.

    >>> mix_seed(0, 1, 2) == mix_seed(0, 1, 2), mix_seed(0, 1, 2) == mix_seed(0, 2, 1)
    (True, False)
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Torch's CPU generator seeded by ``parts`` inside, and as it was before afterwards.

    Generators of accelerators are neither seeded nor touched.
    """
    import torch  # here, so that a help page need not wait for it

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*parts))
        yield


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
