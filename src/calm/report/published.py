"""The paper's own figures, to stand beside those measured on the same data set.

Source: Kim, Choe, Akata, Oh, Keep CALM and Improve Visual Feature Attribution, ICCV 2021: the tables of cue
localization and of classification; ResNet-50 on a 28x28 grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["DATA_SETS", "PUBLISHED", "Published", "data_set", "published"]

CUB, IMAGENET, OPENIMAGES = "CUB-200-2011", "ImageNet", "OpenImages30k"

DATA_SETS = {(200, 5794): CUB, (1000, 50000): IMAGENET, (100, 5000): OPENIMAGES}
"""Which data set has so many classes and test images."""


@dataclass(frozen=True)
class Published:
    """A table of the paper.

    Attributes:
        benchmark: as in ``Result.benchmark``.
        data: a value of `DATA_SETS`.
        rows: method to figures, fractions under the names of ``Result.figures``.
        note: what one has to know to compare.
    """

    benchmark: str
    data: str
    rows: Mapping[str, Mapping[str, float]]
    note: str


_CUE_COLUMNS = ("mpxap_published_1", "mpxap_published_2", "mpxap_published_3", "mpxap_published")
_CUE_ROWS = {
    "vanilla gradient": (10.0, 13.7, 15.3, 13.9),
    "integrated gradients": (12.0, 15.1, 17.3, 15.7),
    "SmoothGrad": (11.8, 15.5, 18.6, 16.5),
    "VarGrad": (16.7, 21.1, 23.1, 21.4),
    "CAM": (24.1, 28.3, 32.2, 29.6),
    "CALM-ML": (23.6, 26.7, 28.8, 27.3),
    "CALM-EM": (30.4, 33.3, 36.3, 34.3),
}
_ACCURACY = {
    CUB: {"CALM-ML": 59.6, "CALM-EM": 71.8},
    OPENIMAGES: {"CALM-ML": 70.9, "CALM-EM": 70.1},
    IMAGENET: {"CALM-ML": 70.6, "CALM-EM": 70.4},
}

PUBLISHED = (
    Published(
        "cue-localization",
        CUB,
        {
            name: {column: value / 100 for column, value in zip(_CUE_COLUMNS, values, strict=True)}
            for name, values in _CUE_ROWS.items()
        },
        "The paper's figures of cue localization count cumulatively: the released code never empties its histogram,"
        " so that each pair's figure includes all pairs before it. They stand in the columns that count so."
        " Its network is a ResNet-50 with a 28x28 grid.",
    ),
    *(
        Published(
            "classification",
            data,
            {name: {"top1": value / 100} for name, value in rows.items()},
            "The paper gives top-1 accuracy without intervals.",
        )
        for data, rows in _ACCURACY.items()
    ),
)


def data_set(classes: int, images: int, names: Iterable[str]) -> str | None:
    """The data set of the paper that a test split is, by its size and (CUB) a class name, or None.

    >>> data_set(200, 5794, ["001.Black_footed_Albatross"]), data_set(200, 5794, ["Emerald_Leafbird"])
    ('CUB-200-2011', None)
    """
    found = DATA_SETS.get((classes, images))
    return None if found == CUB and not any("Black_footed_Albatross" in name for name in names) else found


def published(benchmark: str, data: str | None) -> Published | None:
    """The paper's table of a benchmark on a data set, if it has one."""
    return next((table for table in PUBLISHED if (table.benchmark, table.data) == (benchmark, data)), None)
