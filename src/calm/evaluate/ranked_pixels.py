"""The pixels of a batch in the order in which a map, or chance, erases them."""

from __future__ import annotations

from typing import NamedTuple, get_args

from jaxtyping import Float, Int
from torch import Tensor

from calm.choices import Explain
from calm.errors import unknown
from calm.evaluate.reading import Seen
from calm.metrics.erasing import Fill, erasing_order, filling, random_order
from calm.normalization import Normalization, resize_and_normalize

__all__ = ["Ranked", "check_names", "ranked"]


class Ranked(NamedTuple):
    """A batch that is ready to be erased.

    Attributes:
        explained: the classes whose maps rank the pixels.
        order: places of the pixels by the map, larger numbers are erased first.
        random: the same by chance.
        filler: what erased pixels become.
        constant: number of maps that say nothing; their order is the random one.
    """

    explained: Int[Tensor, " b"]
    order: Int[Tensor, "b n"]
    random: Int[Tensor, "b n"]
    filler: Float[Tensor, "b 3 H W"]
    constant: int


def ranked(seen: Seen, how: Normalization, *, explain: Explain, fill: Fill, seed: int) -> Ranked:
    """Rank the pixels of a batch by the maps of its labels (the paper's) or of its most probable classes.

    The random order of an image depends on ``seed`` and its place in the split alone, and decides between pixels of
    equal score (`calm.metrics.erasing`).
    """
    explained = seen.labels if explain == "label" else seen.looked.probs.argmax(dim=1)
    size = (seen.images.shape[-2], seen.images.shape[-1])
    maps = resize_and_normalize(seen.looked.maps(explained[:, None])[:, 0], size, how)
    random = random_order(seen.keys, size[0] * size[1], seed)
    return Ranked(
        explained,
        erasing_order(maps, random),
        random,
        filling(seen.images, fill, keys=seen.keys, seed=seed),
        int((~maps.flatten(1).any(dim=1)).sum()),
    )


def check_names(explain: str, fill: str) -> None:
    """Refuse unknown names before any work.

    Raises:
        CalmError: neither label nor prediction; no such fill.
    """
    if explain not in get_args(Explain):
        raise unknown("class to explain", explain, get_args(Explain))
    if fill not in get_args(Fill):
        raise unknown("fill", fill, get_args(Fill))
