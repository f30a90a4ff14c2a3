"""Names and formulas as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["P_Y", "P_YZ", "P_Z", "P_Z_GIVEN_Y", "listed", "species_name"]

P_Y, P_Z, P_YZ, P_Z_GIVEN_Y = (
    text.replace(" ", "\N{NO-BREAK SPACE}").replace("|", "|\N{WORD JOINER}")
    for text in ("p(y | x)", "p(z | x)", "p(y, z | x)", "p(z | x, y)")
)


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
