"""From an image file to a model's input: the test-time preprocessing that travels with the weights.

Open image files: size from the header, what is wrong with a file, RGB pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from calm.errors import CalmError, shown
from calm.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import PIL.Image
    from torch import Tensor

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "ImageLike",
    "Preprocessing",
    "Probe",
    "check_images",
    "image_size",
    "probe",
    "read_pixels",
    "read_rgb",
    "to_rgb",
]

MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own default guard against decompression bombs (256 MiB of RGB)."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read, whatever a file's name. Not all that Pillow knows: it hands an EPS file to Ghostscript, which
runs it as a program."""

MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_IMPOSTORS: Mapping[bytes, str] = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"<svg": "an SVG drawing",
    b"version https://git-lfs": "a Git LFS pointer",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"%pdf": "a PDF document",
}
_ENDS: Mapping[str, bytes] = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


@dataclass(frozen=True, slots=True)
class Probe:
    """What one look at a file told.

    Attributes:
        size: (width, height) of the stored pixels; None if the header cannot be read.
        kind: key of ``calm.data.records.KINDS``; empty if nothing is wrong.
        message: what is wrong.
    """

    size: tuple[int, int] | None
    kind: str = ""
    message: str = ""


def probe(path: Path, *, decode: bool = False) -> Probe:
    """Look at an image file without raising.

    Args:
        path: the file.
        decode: decode the pixels too. Otherwise only the header is read, and the pixels just of those JPEG
            and PNG files that do not end as they must: this finds cut-off files at the cost of a header.
    """
    try:
        with open_regular(path, "image") as file:
            return _probe(file, decode)
    except CalmError as error:
        return Probe(None, "missing-file", "no such file" if not os.path.lexists(path) else str(error))


def _probe(file: BinaryIO, decode: bool) -> Probe:
    head = file.read(512)
    if not head:
        return Probe(None, "empty-file", "0 bytes")
    file.seek(0)
    size = None
    try:
        with Image.open(file, formats=FORMATS) as image:
            size = image.size
            _check_cost(image, file)
            if decode or not _ends_well(file, image.format):
                image.load()
            return Probe(size)
    except _TooLarge as error:
        return Probe(size, "too-large", str(error))
    except _BOMB:
        return Probe(None, "too-large", f"more than {MAX_PIXELS:,} pixels")
    except UnidentifiedImageError:
        return Probe(None, "not-an-image", _impostor(head))
    except Exception as error:  # a damaged file can make Pillow's decoders fail in any way
        return Probe(None, "truncated", str(error)[:200] or type(error).__name__)


class _TooLarge(Exception):  # noqa: N818 -- never leaves this module
    """A file that is dear to decode."""


def _check_cost(image: Image.Image, file: BinaryIO) -> None:
    """Raise for an image of too many pixels, or of more scans than a picture has: each costs a pass over all pixels."""
    if image.width * image.height > MAX_PIXELS:
        raise _TooLarge(_too_large(image.size))
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(position)
        if scans > MAX_SCANS:
            raise _TooLarge(f"a JPEG of {scans:,} scans, allowed are {MAX_SCANS}")


def _too_large(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels, allowed are {MAX_PIXELS:,}"


def _impostor(head: bytes) -> str:
    start = head.lstrip().lower()
    for magic, name in _IMPOSTORS.items():
        if start.startswith(magic):
            return f"{name}, by its first bytes"
    return f"none of the formats {', '.join(FORMATS)}; it begins with {head[:12]!r}"


def _ends_well(file: BinaryIO, image_format: str | None) -> bool:
    end = _ENDS.get(image_format or "")
    if end is None:
        return True
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(max(0, size - 32))
    tail = file.read()
    file.seek(position)
    return end in tail


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of the stored pixels by the file's header; None if it cannot be read."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception:  # as in `probe`
        return None


def read_rgb(path: Path, *, exif: bool = False) -> NDArray[np.uint8]:
    """The pixels of an image file, (H, W, 3) uint8 RGB.

    Args:
        path: an image of one of :data:`FORMATS`, of any mode; of an animation, the first frame.
        exif: turn the picture as its EXIF orientation says. (Pillow itself turns TIFF files, asked or not; once.)

    Raises:
        CalmError: naming the file: it is missing, not an image, broken, of floating-point pixels, or more than
            :data:`MAX_PIXELS` pixels. No other exception, whatever is in the file.
    """
    return read_pixels(path, lambda image: to_rgb(_upright(image) if exif else image))


def read_pixels(
    path: Path, convert: Callable[[Image.Image], Image.Image], what: str = "image"
) -> NDArray[np.uint8]:
    """What ``convert`` makes of an image file, as uint8.

    Args:
        path: an image of one of :data:`FORMATS`; of an animation, the first frame.
        convert: to 8 bits a channel.
        what: what the image is, for messages.

    Raises:
        CalmError: as `read_rgb`.
    """
    with open_regular(path, what) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_cost(image, file)
                return np.array(convert(image), dtype=np.uint8)
        except _TooLarge as error:
            raise CalmError(f"{what} {path} is too large: {error}") from error
        except _BOMB as error:
            raise CalmError(f"{what} {path} is too large: more than {MAX_PIXELS:,} pixels") from error
        except CalmError as error:
            raise CalmError(f"{what} {path}: {error}") from error
        except Exception as error:  # a damaged file can make Pillow's decoders fail in any way
            found = probe(path, decode=True)
            reason = found.message or str(error)[:200] or type(error).__name__
            raise CalmError(
                f"cannot read {what} {path}: {reason}; `calm data check` lists all such files"
            ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF orientation says; as stored, if that cannot be read."""
    image.load()  # Pillow turns TIFF files itself, and only then forgets their orientation
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF data is no reason to refuse a whole picture
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, 8 bits a channel.

    Transparent pixels are laid over white, those of a PNG's transparent colour too. 16-bit grey keeps its upper 8
    bits. Grey, palette and CMYK images convert as Pillow does.

    Raises:
        CalmError: floating-point pixels, whose range is not known.
    """
    if image.mode == "RGB":
        colour = image.info.get("transparency")  # one that a PNG declares to be transparent
        if not isinstance(colour, tuple):
            return image
        if max(colour) > 255:  # of a file with 16 bits a channel; Pillow has made the pixels 8 bits
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.mode.startswith("I"):
        pixels: NDArray[Any] = np.asarray(image)
        return Image.fromarray(np.clip(pixels >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CalmError("floating-point image: convert it to 8 bits a channel first")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


ImageLike: TypeAlias = Union[str, Path, "PIL.Image.Image", "np.ndarray", "Tensor"]
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

        Files are read by `calm.images.read_rgb`: grey, CMYK and palette images become RGB, transparent pixels
        are laid over white, and the picture is turned upright as its EXIF orientation says, as `calm attribute`
        does. A PIL image or an array is taken as it is: give ``PIL.Image.open(file)`` for the stored pixels, which
        boxes and masks of CUB and of the metadata format refer to (`calm.data.records.Split.exif`).
        """
        several: Sequence[ImageLike] = images if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
        if not several:
            raise CalmError("no images given")
        import torch

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
        import torch

        pixels = torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1)
        return self.normalize(pixels.float() / 255)


def _open(image: ImageLike) -> PIL.Image.Image:
    """``image`` as an RGB PIL image."""
    import numpy as np
    from PIL import Image

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
    from torch import Tensor

    if not isinstance(images, Tensor):
        raise CalmError(
            f"images must be a tensor, got a {type(images).__name__}: model.preprocess makes one of files"
        )
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise CalmError(
            f"images must be floats of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
