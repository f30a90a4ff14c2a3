"""From an image file to a model's input: the test-time preprocessing that travels with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
from jaxtyping import Float
from torch import Tensor

from calm.errors import CalmError, shown

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

__all__ = ["ImageLike", "Preprocessing", "check_images"]

ImageLike: TypeAlias = Union[str, Path, "PIL.Image.Image", "np.ndarray", Tensor]
"""A file, a PIL image, or uint8 RGB of shape (H, W, 3)."""


LARGEST_SIDE = 8192
"""Pixels of a side of the model's input, at most."""

LONGEST_AT_ONCE = 2**16
"""Pixels of a side of a picture up to which it is resized in one step."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize to ``size`` (no crop, the aspect ratio gives way: the paper's test protocol), scale, normalise.

    Attributes:
        size: (height, width) in pixels, each from 1 to `LARGEST_SIDE`.
        mean: per channel, of RGB in [0, 1]; the default is ImageNet's.
        std: per channel, of RGB in [0, 1]; the default is ImageNet's.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.size) != 2 or not 1 <= min(self.size) <= max(self.size) <= LARGEST_SIDE:
            raise CalmError(
                f"preprocessing size is {shown(self.size)}: give (height, width) in pixels, each 1 to {LARGEST_SIDE}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise CalmError("preprocessing needs three means and three positive stds")

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b 3 H W"]:
        """A float32 batch of one or several images. The image is resized by Pillow's antialiased bilinear filter.

        Raises:
            CalmError: a file that is missing or no image, an array of another shape or dtype, an empty list.

        Files are read by `calm.data.images.read_rgb`: grey, CMYK and palette images become RGB, transparent pixels
        are laid over white, and the picture is turned upright as its EXIF orientation says, as `calm attribute`
        does. A PIL image or an array is taken as it is: give ``PIL.Image.open(file)`` for the stored pixels, which
        boxes and masks of CUB and of the metadata format refer to (`calm.data.records.Split.exif`).
        """
        several: Sequence[ImageLike] = images if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
        if not several:
            raise CalmError("no images given")
        return torch.stack([self._one(image) for image in several])

    def normalize(self, images: Float[Tensor, "*b 3 H W"]) -> Float[Tensor, "*b 3 H W"]:
        """(images - mean) / std, for RGB in [0, 1]."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def denormalize(self, images: Float[Tensor, "*b 3 H W"]) -> Float[Tensor, "*b 3 H W"]:
        """Back to RGB in [0, 1], clipped."""
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def _one(self, image: ImageLike) -> Tensor:
        import numpy as np
        from PIL import Image

        picture = _open(image)
        height, width = self.size
        # Pillow's weights take 16 bytes for each pixel of a side: of a very long one, means of pixels come first.
        gap = 3.0 if max(picture.size) > LONGEST_AT_ONCE else None
        resized = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=gap)
        pixels = torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1)
        return self.normalize(pixels.float() / 255)


def _open(image: ImageLike) -> PIL.Image.Image:
    """``image`` as an RGB PIL image."""
    import numpy as np
    from PIL import Image

    from calm.data.images import read_rgb, to_rgb

    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, Path)):
        return Image.fromarray(read_rgb(Path(image), exif=True))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise CalmError(
            f"an image array must be uint8 of shape (H, W, 3), got {array.dtype} of shape {array.shape};"
            " a normalised float batch goes to the model directly"
        )
    return Image.fromarray(array)


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of normalised images.

    Raises:
        CalmError: no floats of shape (B, 3, H, W).
    """
    if not isinstance(images, Tensor):
        raise CalmError(
            f"images must be a tensor, got a {type(images).__name__}: model.preprocess makes one of files"
        )
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise CalmError(
            f"images must be floats of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
