"""Random choices that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

__all__ = ["mix_seed", "seeded"]


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*parts))
        yield
