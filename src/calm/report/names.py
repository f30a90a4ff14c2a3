"""Names as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["listed", "species_name"]


def species_name(name: str) -> str:
    """A class of CUB as the name of a bird.

    >>> species_name("009.Brewer_Blackbird"), species_name("010.Red_winged_Blackbird"), species_name("dog")
    ('Brewer Blackbird', 'Red-winged Blackbird', 'dog')
    """
    return re.sub(r"_(?=[a-z])", "-", re.sub(r"^\d+\.", "", name)).replace("_", " ")


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words in a sentence.

    >>> listed(["head"]), listed(["head", "leg", "wing"])
    ('head', 'head, leg and wing')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
