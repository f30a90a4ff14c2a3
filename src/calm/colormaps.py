"""Two colour maps, made here so that drawing needs no plotting library.

``heat`` goes from night blue over violet and orange to pale yellow: lightness only rises, so it also reads in
grey and by colour-blind eyes. ``signed`` goes from blue over near-white to red: the two ends are equally
dark. Both have equal steps of perceived colour, measured as distance in OKLab (Ottosson, 2020).
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from calm.errors import unknown

__all__ = ["Colormap", "colorize", "table"]

Colormap: TypeAlias = Literal["heat", "signed"]

_ANCHORS: dict[str, tuple[str, ...]] = {
    "heat": ("0d1233", "3a2387", "86279a", "cd3e78", "f2743f", "fcb53f", "fdf6b0"),
    "signed": ("103c80", "2f7fc1", "8fc1e3", "f4f3f0", "f2b08c", "d9583f", "8a1322"),
}

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def colorize(values: NDArray[np.floating], colormap: Colormap = "heat") -> NDArray[np.uint8]:
    """Colours for values of any shape, (..., 3) RGB.

    Args:
        values: ``heat``: in [0, 1]; ``signed``: in [-1, 1]. Values outside take the colour of the nearest
            end, NaN that of 0.
        colormap: the name of the map.

    Raises:
        CalmError: an unknown colour map.
    """
    colours = table(colormap)
    share = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    share = (share + 1) / 2 if colormap == "signed" else share
    return np.asarray(colours[np.rint(share.clip(0, 1) * 255).astype(np.intp)])


@cache
def table(colormap: Colormap) -> NDArray[np.uint8]:
    """The 256 colours of a map, (256, 3) RGB, read-only."""
    if colormap not in _ANCHORS:
        raise unknown("colour map", colormap, get_args(Colormap))
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _ANCHORS[colormap]]) / 255
    path = _oklab(anchors)
    way = np.r_[0, np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()]
    if colormap == "signed":  # zero is the middle, whichever half is longer
        middle = len(way) // 2
        way = np.r_[
            way[: middle + 1] / way[middle], 1 + (way[middle:] - way[middle])[1:] / (way[-1] - way[middle])
        ]
    steps = np.linspace(0, way[-1], 256)
    colours = _rgb(np.stack([np.interp(steps, way, path[:, axis]) for axis in range(3)], axis=1))
    result: NDArray[np.uint8] = np.rint(colours.clip(0, 1) * 255).astype(np.uint8)
    result.flags.writeable = False
    return result


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB in [0, 1] to OKLab, over the last axis."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T)


def _rgb(oklab: NDArray[np.float64]) -> NDArray[np.float64]:
    """OKLab to sRGB; slightly outside [0, 1] for colours that no screen shows."""
    linear = (oklab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    positive = linear.clip(min=0)
    return np.asarray(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * positive ** (1 / 2.4) - 0.055))
