"""From a decoded image to the model's input, for training and for testing; mixup and cutmix of whole batches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import one_hot

from calm.data.augmentation import Augmentation, Crop
from calm.data.seeds import seeded
from calm.errors import CalmError
from calm.images import Preprocessing

__all__ = [
    "BatchMix",
    "ImageTransform",
    "eval_transform",
    "fixed_size",
    "resize_picture",
    "train_transform",
]


ImageTransform = Callable[[Image.Image], Tensor]
"""An RGB picture to a normalised float32 image (3, H, W); random only by torch's CPU generator."""


class _Test(nn.Module):
    """The model's own preprocessing of one picture."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, picture: Image.Image) -> Tensor:
        return self.preprocessing(picture)[0]


class _Normalize(nn.Module):
    """RGB picture (H, W) to (3, H, W) float32, normalised as the model's preprocessing does it."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
        return self.preprocessing.normalize(pixels.float() / 255).contiguous()


def eval_transform(preprocessing: Preprocessing) -> ImageTransform:
    """The test protocol: exactly ``preprocessing``, for one RGB picture of any size."""
    return _Test(preprocessing)


def train_transform(augmentation: Augmentation, preprocessing: Preprocessing) -> ImageTransform:
    """Augmentation of one picture, then the normalisation of ``preprocessing``.

    Resizing uses Pillow's antialiased bilinear filter, as ``preprocessing`` does. Batch-level mixing is
    apart: ``calm.data.transforms.BatchMix``.

    Args:
        augmentation: what to do; ``AUGMENTATIONS`` has named ones.
        preprocessing: gives size, mean, and standard deviation of the model's input.

    Returns:
        A picklable transform of RGB pictures of any size to (3, height, width).
    """
    from torchvision.transforms import v2

    steps: list[nn.Module] = list(_CROPS[augmentation.crop](augmentation, preprocessing.size))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.automatic != "none":
        steps.append(_automatic(augmentation))
    jitter = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    steps.append(_Normalize(preprocessing))
    if augmentation.erase:
        steps.append(v2.RandomErasing(augmentation.erase))
    transform: ImageTransform = v2.Compose(steps)
    return transform


def fixed_size(augmentation: Augmentation, size: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width) that `train_transform` resizes every picture to before anything random; None if it does not.

    A picture that was resized by `resize_picture` before comes out of the transform the same.

    Args:
        augmentation: what is done.
        size: (height, width) of the model's input.

    >>> from calm.data.augmentation import AUGMENTATIONS
    >>> fixed_size(AUGMENTATIONS["published"], (224, 224)), fixed_size(AUGMENTATIONS["modern"], (224, 224))
    ((256, 256), None)
    """
    if augmentation.crop == "random-resized-crop":
        return None
    ratio = augmentation.resize_ratio if augmentation.crop == "resize-crop" else 1.0
    height, width = (round(side * ratio) for side in size)
    return height, width


def resize_picture(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) by Pillow's antialiased bilinear filter; the aspect ratio gives way."""
    return picture.resize(size[::-1], Image.Resampling.BILINEAR)


def _resize(height: int, width: int) -> nn.Module:
    from torchvision.transforms import v2

    resize: nn.Module = v2.Resize((height, width), interpolation=v2.InterpolationMode.BILINEAR)
    return resize


def _resize_crop(augmentation: Augmentation, size: tuple[int, int]) -> list[nn.Module]:
    from torchvision.transforms import v2

    height, width = (round(side * augmentation.resize_ratio) for side in size)
    return [_resize(height, width), v2.RandomCrop(size)]


def _pad_shift(augmentation: Augmentation, size: tuple[int, int]) -> list[nn.Module]:
    from torchvision.transforms import v2

    y, x = (min(round(side * augmentation.shift), side - 1) for side in size)
    return [_resize(*size), v2.RandomCrop(size, padding=[x, y, x, y], padding_mode="reflect")]


def _random_resized_crop(augmentation: Augmentation, size: tuple[int, int]) -> list[nn.Module]:
    from torchvision.transforms import v2

    return [v2.RandomResizedCrop(size, scale=augmentation.area, ratio=augmentation.aspect)]


def _only_resize(augmentation: Augmentation, size: tuple[int, int]) -> list[nn.Module]:
    return [_resize(*size)]


_CROPS: dict[Crop, Callable[[Augmentation, tuple[int, int]], list[nn.Module]]] = {
    "resize-crop": _resize_crop,
    "pad-shift": _pad_shift,
    "random-resized-crop": _random_resized_crop,
    "none": _only_resize,
}


def _automatic(augmentation: Augmentation) -> nn.Module:
    """TrivialAugmentWide or RandAugment; what a rotation or shear uncovers gets a mid grey."""
    from torchvision.transforms import v2

    how = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": [124, 116, 104]}
    automatic: nn.Module
    if augmentation.automatic == "trivial":
        automatic = v2.TrivialAugmentWide(**how)
    else:
        automatic = v2.RandAugment(augmentation.rand_ops, augmentation.rand_magnitude, **how)
    return automatic


class BatchMix:
    """Mixup or cutmix of a batch, by the numbers that name the batch.

    Each image is mixed with its neighbour in the batch, so batches must be shuffled. Several processes mix
    within their local batches, and differ from one process with the whole batch.

    Args:
        augmentation: ``mixup``, ``cutmix`` and ``mix_probability`` are used.
        num_classes: C.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        from torchvision.transforms import v2

        if num_classes < 2:
            raise CalmError(f"num_classes is {num_classes}: mixing needs two classes or more")
        self.num_classes = num_classes
        self.probability = augmentation.mix_probability
        self.mixers: list[nn.Module] = []
        if augmentation.mixup:
            self.mixers.append(v2.MixUp(alpha=augmentation.mixup, num_classes=num_classes))
        if augmentation.cutmix:
            self.mixers.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=num_classes))

    def __call__(
        self, images: Tensor, labels: Tensor, *, seed: int, epoch: int, step: int, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            images: (B, 3, H, W) float, on any device; not changed.
            labels: (B,) class indices.
            seed: of the run.
            epoch: from 0.
            step: batch within the epoch, from 0.
            rank: of the process.

        Returns:
            Images, and targets (B, C) whose rows sum to 1: one-hot rows for a batch that is not mixed.
        """
        with seeded(seed, epoch, step, rank):
            if self.mixers and float(torch.rand(())) < self.probability:
                mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
                mixed: tuple[Tensor, Tensor] = mixer(images, labels)
                return mixed
        return images, one_hot(labels, self.num_classes).to(images.dtype)
