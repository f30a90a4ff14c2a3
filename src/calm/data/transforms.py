"""Turn a decoded image into the model's input, for training and for testing; mixup and cutmix of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from calm.data.augmentation import Augmentation
from calm.errors import CalmError
from calm.images import Pixels, Preprocessing, resize_pixels
from calm.inference import seeded

ImageTransform = Callable[[Pixels], Tensor]
"""Pixels to a normalised float32 image (C, H, W); random numbers come from torch's CPU generator only."""


def eval_transform(preprocessing: Preprocessing) -> ImageTransform:
    """Return the test protocol: exactly ``preprocessing``, for one image of any size."""
    return partial(Preprocessing.one, preprocessing)


def train_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> ImageTransform:
    """Return a picklable transform of images of any size to (C, height, width).

    It augments one picture (`BatchMix` mixes whole batches), resizing by the filter of ``preprocessing``, which also
    gives the size and the normalisation that follows.
    """
    from torchvision.transforms import v2

    channels = preprocessing.channels
    # What a rotation or shear uncovers becomes a mid grey.
    automatic: Any = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": [124, 116, 104] if channels == 3 else 116}
    steps = _crop(augmentation, preprocessing)
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.automatic == "trivial":
        steps.append(v2.TrivialAugmentWide(**automatic))
    elif augmentation.automatic == "rand":
        steps.append(v2.RandAugment(augmentation.rand_ops, augmentation.rand_magnitude, **automatic))
    jitter = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    if channels not in (1, 3) and (any(jitter) or augmentation.automatic != "none"):
        fix = "set automatic to none, and brightness, contrast, saturation and hue to 0"
        raise CalmError(f"augmentation of colours is for images of 1 or 3 channels, and these have {channels}: {fix}")
    steps.append(v2.Lambda(preprocessing.to_tensor))
    if augmentation.erase:
        steps.append(v2.RandomErasing(augmentation.erase))
    transform: ImageTransform = v2.Compose(steps)
    return transform


def _crop(augmentation: Augmentation, preprocessing: Preprocessing) -> list[nn.Module]:
    from torchvision.transforms import v2

    size, how = preprocessing.size, preprocessing.interpolation
    steps: list[nn.Module] = []
    if resized := fixed_size(augmentation, size):
        steps.append(v2.Lambda(partial(resize_pixels, size=resized, interpolation=how)))
    if preprocessing.channels not in (1, 3):
        steps.append(v2.ToImage())
    if augmentation.crop == "random-resized-crop":
        window = {"scale": augmentation.area, "ratio": augmentation.aspect}
        steps.append(v2.RandomResizedCrop(size, **window, interpolation=v2.InterpolationMode(how)))
    elif augmentation.crop == "resize-crop":
        steps.append(v2.RandomCrop(size))
    elif augmentation.crop == "pad-shift":
        y, x = (min(round(side * augmentation.shift), side - 1) for side in size)
        steps.append(v2.RandomCrop(size, padding=[x, y, x, y], padding_mode="reflect"))
    return steps


def fixed_size(augmentation: Augmentation, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (height, width) that every picture is resized to before anything random; None if it is not.

    ``size`` is that of the model's input. `train_transform` does the same to a picture that was resized so before.

    >>> from calm.data.augmentation import AUGMENTATIONS
    >>> fixed_size(AUGMENTATIONS["published"], (224, 224)), fixed_size(AUGMENTATIONS["modern"], (224, 224))
    ((256, 256), None)
    """
    ratio = augmentation.resize_ratio if augmentation.crop == "resize-crop" else 1.0
    return None if augmentation.crop == "random-resized-crop" else (round(size[0] * ratio), round(size[1] * ratio))


class BatchMix:
    """Mixup or cutmix of a batch, with random numbers that depend only on the seed and on the batch's place in the run.

    Each image is mixed with its neighbour in the batch, so batches must be shuffled. Several processes mix within their
    local batches, and differ from one process with the whole batch. Of ``augmentation``, ``mixup``, ``cutmix`` and
    ``mix_probability`` are used; ``num_classes`` is C.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        from torchvision.transforms import v2

        if num_classes < 2:
            raise CalmError(f"num_classes is {num_classes}: mixing needs two classes or more")
        self.num_classes = num_classes
        self.probability = augmentation.mix_probability
        kinds = ((v2.MixUp, augmentation.mixup), (v2.CutMix, augmentation.cutmix))
        self.mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(
        self, images: Tensor, labels: Tensor, *, seed: int, epoch: int, step: int, rank: int = 0
    ) -> tuple[Tensor, Tensor, tuple[int, int, int, int] | None]:
        """Mix one batch: float images (B, 3, H, W) on any device, which are not changed, and class indices (B,).

        ``step`` is the number of the batch within the epoch, ``rank`` that of the process; all count from 0.

        Returns:
            Images; targets (B, C) whose rows sum to 1: one-hot rows for a batch that is not mixed; and of cutmix the
            window x0, y0, x1, y1 in pixels, perhaps empty, that each image has from the one before it, else None.
        """
        with seeded(seed, epoch, step, rank):
            if self.mixers and float(torch.rand(())) < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                with torch.random.fork_rng(devices=()):  # what the mixer is about to draw
                    window = mixer.make_params([images]).get("box")
                return *mixer(images, labels), window
        return images, one_hot(labels, self.num_classes).to(images.dtype), None
