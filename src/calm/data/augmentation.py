"""Options of the augmentation of training images, and named sets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calm.config import check_options
from calm.errors import CalmError, shown

Crop = Literal["resize-crop", "pad-shift", "random-resized-crop", "none"]
Automatic = Literal["none", "trivial", "rand"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image: crop, flip, automatic, colour, erasing, in this order.

    The defaults are the published recipe. All sizes follow the size that the model's preprocessing has.

    Attributes:
        crop: "resize-crop" resizes to ``resize_ratio`` times the model's size without regard to aspect and cuts a
            random window; "pad-shift" resizes to the model's size and shifts by up to ``shift`` of a side, mirroring at
            the edges; "random-resized-crop" cuts a window of a random share ``area`` and aspect ``aspect`` and resizes
            it; "none" only resizes.
        resize_ratio: side of the resized image over the side of the window, at least 1; published: 256 / 224.
        shift: largest shift as a share of a side, in [0, 1): 1/16 is 4 pixels of 64.
        area: smallest and largest share of the image in a random resized crop, in (0, 1].
        aspect: smallest and largest width / height of a random resized crop, as a factor of the image.
        flip: probability of a horizontal flip.
        automatic: "trivial" is TrivialAugmentWide, "rand" is RandAugment (``rand_ops``, ``rand_magnitude``).
        rand_ops: RandAugment: operations in a row.
        rand_magnitude: RandAugment: their strength, 0 to 30.
        brightness: colour jitter: factor drawn from [1 - brightness, 1 + brightness].
        contrast: colour jitter: the same.
        saturation: colour jitter: the same.
        hue: colour jitter: shift of hue drawn from [-hue, hue], at most 0.5.
        erase: probability that a random rectangle is set to the mean colour.
        mixup: alpha of the Beta distribution of mixup; 0 is off. Targets become (B, C) rows.
        cutmix: alpha of the Beta distribution of cutmix; 0 is off. With both on, each batch gets one of them.
        mix_probability: share of the batches that are mixed, if mixup or cutmix is on.
    """

    crop: Crop = "resize-crop"
    resize_ratio: float = 256 / 224
    shift: float = 1 / 16
    area: tuple[float, float] = (0.25, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    automatic: Automatic = "none"
    rand_ops: int = 2
    rand_magnitude: int = 9
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "erase", "mix_probability"), (0, 1))
        ranges = {"shift": (0, 0.999), "rand_ops": (1, 14), "rand_magnitude": (0, 30), "hue": (0, 0.5), **shares}
        check_options(self, "augmentation.", resize_ratio=(1, 4), mixup=(0, 100), cutmix=(0, 100), **ranges)
        for name, top in (("area", 1.0), ("aspect", 100.0)):
            pair = tuple(getattr(self, name))
            object.__setattr__(self, name, pair)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
                form = f"two numbers, 0 < smallest <= largest <= {top:g}"
                raise CalmError(f"augmentation.{name} is {shown(pair)}: give {form}")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, so that targets become soft."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


AUGMENTATIONS: dict[str, Augmentation] = {
    "published": Augmentation(),
    "small": Augmentation(crop="pad-shift"),
    "modern": Augmentation(
        crop="random-resized-crop", automatic="trivial", brightness=0.2, contrast=0.2, saturation=0.2, erase=0.1
    ),
    "none": Augmentation(crop="none", flip=0.0),
}
"""Named sets: "published" (the paper's), "small" (small images from scratch), "modern", "none"."""
