"""Read image files as RGB pixels, say what is wrong with them, and turn images into a model's input."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, Union, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from calm.errors import CalmError, shown
from calm.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor


MAX_PIXELS = 89_478_485  # most pixels of an image: Pillow's own limit, from which on it warns (256 MiB of RGB)
MAX_SCANS = 100  # most scans of a progressive JPEG, each a pass over all pixels; encoders write about ten
LONG_SIDE = 2**16  # longest side, in pixels, of a picture that is resized in one step
MAX_INPUT_SIDE = 8192  # most pixels of a side of the model's input

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read, whatever the file's name. Pillow knows more, but hands EPS to Ghostscript, which runs it."""

_OTHER_KINDS = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<?xml": "an XML document",
    b"<svg": "an SVG drawing",
    b"version https://git-lfs": "a Git LFS pointer",
    b"pk\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"%pdf": "a PDF document",
}
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


class Probe(NamedTuple):
    """The result of looking at an image file."""

    size: tuple[int, int] | None  # (width, height) of the stored pixels; None if the header cannot be read
    kind: str = ""  # key of ``calm.data.records.KINDS``; empty if nothing is wrong
    message: str = ""  # what is wrong


class _TooLargeError(Exception):
    """The image has more pixels or scans than are read."""


# Our error and those of Pillow, which has the same limit, warns above it, and raises above twice it.
_TOO_LARGE = (_TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def probe(path: Path, *, decode: bool = False) -> Probe:
    """Look at an image file; errors are in the result.

    Without ``decode`` only the header is read, and the pixels of JPEG and PNG files without an end marker, which finds
    truncated files at the cost of a header.
    """
    size, start = None, b""
    try:
        with open_regular(path, "image") as file:
            start = file.read(512)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                size = image.size
                _check_cost(image, file)
                if decode or not _has_end_marker(image, file):
                    image.load()
                return Probe(size)
    except CalmError as error:
        return Probe(None, "missing-file", str(error) if os.path.lexists(path) else "no such file")
    except _TOO_LARGE as error:
        return Probe(size, "too-large", str(error))
    except UnidentifiedImageError:
        if not start:
            return Probe(None, "empty-file", "0 bytes")
        kinds = [kind for magic, kind in _OTHER_KINDS.items() if start.lstrip().lower().startswith(magic)]
        unknown = f"none of the formats {', '.join(FORMATS)}; it begins with {start[:12]!r}"
        return Probe(None, "not-an-image", f"{kinds[0]}, by its first bytes" if kinds else unknown)
    except Exception as error:  # a damaged file can make Pillow's decoders fail in any way
        return Probe(None, "truncated", str(error)[:200] or type(error).__name__)


def _check_cost(image: Image.Image, file: BinaryIO) -> None:
    """Raise _TooLargeError for more than `MAX_PIXELS` pixels or `MAX_SCANS` scans, before anything is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise _TooLargeError(f"{image.width} x {image.height} pixels, allowed are {MAX_PIXELS:,}")
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(position)
        if scans > MAX_SCANS:
            raise _TooLargeError(f"a JPEG of {scans:,} scans, allowed are {MAX_SCANS}")


def _has_end_marker(image: Image.Image, file: BinaryIO) -> bool:
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 32))
    tail = file.read()
    file.seek(position)
    return _END_MARKERS.get(image.format or "", b"") in tail


def image_size(path: Path) -> tuple[int, int] | None:
    """Return (width, height) of the stored pixels by the file's header; None if it cannot be read."""
    try:
        with open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception:  # as in `probe`
        return None


def read_rgb(path: Path, *, exif: bool = False) -> NDArray[np.uint8]:
    """Return the pixels of an image file, (H, W, 3) uint8 RGB.

    Args:
        path: an image of one of `FORMATS`, of any mode; of an animation, the first frame is read.
        exif: whether to rotate the picture as its EXIF orientation says. (Pillow itself rotates TIFF files, always.)

    Raises:
        CalmError: naming the file: it is missing, not an image, broken, of floating-point pixels, or of more than
            `MAX_PIXELS` pixels. No other exception, whatever is in the file.
    """
    return read_pixels(path, lambda image: to_rgb(_upright(image) if exif else image))


def read_pixels(path: Path, convert: Callable[[Image.Image], Image.Image], what: str = "image") -> NDArray[np.uint8]:
    """Return an image file's pixels as uint8, after ``convert`` has made them 8 bits a channel.

    ``what`` describes the image in messages; the errors are those of `read_rgb`.
    """
    with open_regular(path, what) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_cost(image, file)
                return np.array(convert(image), dtype=np.uint8)
        except _TOO_LARGE as error:
            raise CalmError(f"{what} {path} is too large: {error}") from error
        except CalmError as error:
            raise CalmError(f"{what} {path}: {error}") from error
        except Exception as error:  # a damaged file can make Pillow's decoders fail in any way
            reason = probe(path, decode=True).message or str(error)[:200] or type(error).__name__
            raise CalmError(f"cannot read {what} {path}: {reason}; `calm data check` lists all such files") from error


def _upright(image: Image.Image) -> Image.Image:
    """Rotate ``image`` as its EXIF orientation says; return it as stored if that cannot be read."""
    image.load()  # Pillow rotates TIFF files itself, and only then forgets their orientation
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data are no reason to refuse a whole picture
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in mode RGB, 8 bits a channel; floating-point pixels, of unknown range, are refused.

    Transparent pixels are laid over white, those of a PNG's transparent colour too. 16-bit grey keeps its upper 8
    bits. Grey, palette and CMYK images convert as Pillow does.
    """
    if image.mode == "RGB":
        colour = image.info.get("transparency")  # the colour that a PNG declares to be transparent
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
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def resize_image(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize to (height, width) by one of Pillow's antialiased filters; the aspect ratio is not kept."""
    # Pillow's weights take 16 bytes for each pixel of a side: those of a very long side are averaged first.
    gap = 3.0 if max(image.size) > LONG_SIDE else None
    return image.resize(size[::-1], resample, reducing_gap=gap)


ImageLike: TypeAlias = Union[str, Path, "Image.Image", "np.ndarray", "Tensor"]
"""A file, a PIL image, or uint8 RGB of shape (H, W, 3)."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize to ``size`` (no crop, the aspect ratio is not kept: the paper's test protocol), scale, and normalise.

    Attributes:
        size: (height, width) in pixels, each from 1 to `MAX_INPUT_SIDE`.
        mean: per channel, of RGB in [0, 1]; the default is ImageNet's.
        std: per channel, of RGB in [0, 1]; the default is ImageNet's.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.size) != 2 or not 1 <= min(self.size) <= max(self.size) <= MAX_INPUT_SIDE:
            form = f"(height, width) in pixels, each 1 to {MAX_INPUT_SIDE}"
            raise CalmError(f"preprocessing size is {shown(self.size)}: give {form}")
        if not 1 <= len(self.mean) == len(self.std) or not min(self.std) > 0:
            raise CalmError("preprocessing needs a mean and a positive std for each channel")

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b 3 H W"]:
        """Return a float32 batch of one or several images, resized by Pillow's antialiased bilinear filter.

        Files are read by `read_rgb`: grey, CMYK and palette images become RGB, transparent pixels are laid over white,
        and the picture is turned upright as its EXIF orientation says, as `calm attribute` does. A PIL image or an
        array is taken as it is: give ``PIL.Image.open(file)`` for the stored pixels, which boxes and masks of CUB and
        of the metadata format refer to (`calm.data.records.Split.exif`).

        Raises:
            CalmError: a file that is missing or no image, an array of another shape or dtype, an empty list.
        """
        several = cast("Sequence[ImageLike]", images if isinstance(images, (list, tuple)) else [images])
        if not several:
            raise CalmError("no images given")
        import torch

        return torch.stack([self.one(image) for image in several])

    def one(self, image: ImageLike) -> Float[Tensor, "3 H W"]:
        """Return the input of one image, as a call does."""
        return self.to_tensor(resize_image(_open(image), self.size))

    def to_tensor(self, picture: Image.Image) -> Float[Tensor, "3 H W"]:
        """Return an RGB picture, scaled and normalised but not resized, as float32."""
        import torch

        pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
        return self.normalize(pixels.float() / 255).contiguous()

    def normalize(self, images: Float[Tensor, "*b 3 H W"]) -> Float[Tensor, "*b 3 H W"]:
        """Return (images - mean) / std, for RGB in [0, 1]."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def denormalize(self, images: Float[Tensor, "*b 3 H W"]) -> Float[Tensor, "*b 3 H W"]:
        """Return RGB in [0, 1], clipped."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def _open(image: ImageLike) -> Image.Image:
    """Return ``image`` as an RGB PIL image."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, Path)):
        return Image.fromarray(read_rgb(Path(image), exif=True))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        given = f"got {array.dtype} of shape {array.shape}"
        raise CalmError(
            f"an image array must be uint8 of shape (H, W, 3), {given}; give a normalised batch to the model itself"
        )
    return Image.fromarray(array)


def check_images(images: Tensor, channels: int = 3) -> None:
    """Raise a CalmError unless ``images`` is a floating-point tensor of shape (B, channels, H, W)."""
    from torch import Tensor

    if not isinstance(images, Tensor):
        raise CalmError(f"images must be a tensor, got a {type(images).__name__}: model.preprocess makes one of files")
    if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}"
        raise CalmError(f"images must be floats of shape (B, {channels}, H, W), got {given}")
