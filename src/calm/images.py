"""Read image files as RGB pixels, say what is wrong with them, and turn images into a model's input."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, Union, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from calm.config import Interpolation, check_options
from calm.errors import CalmError, needs_extra, shown
from calm.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor


MAX_PIXELS = 89_478_485  # most pixels of an image: Pillow's own limit, from which on it warns (256 MiB of RGB)
MAX_SCANS = 100  # most scans of a progressive JPEG, each a pass over all pixels; encoders write about ten
LONG_SIDE = 2**16  # longest side, in pixels, of a picture that is resized in one step
MAX_SEGMENT = 2**22  # most compressed bytes of a strip or tile of a TIFF of several bands; they become 1,000 times more
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
    bits: int = 8  # of a value, as the file says


class _TooLargeError(Exception):
    """The image has more pixels or scans than are read."""


# Our error and those of Pillow, which has the same limit, warns above it, and raises above twice it.
_TOO_LARGE = (_TooLargeError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def probe(path: Path, *, decode: bool = False, channels: int | None = 3) -> Probe:
    """Examine an image file that is to be read with ``channels`` channels (None for a mask); errors are in the result.

    Without ``decode`` only the header is read, and the pixels of JPEG and PNG files without an end marker, which finds
    truncated files at the cost of a header.
    """
    size, start = None, b""
    try:
        with open_regular(path, "image") as file:
            start = file.read(512)
            image = _opened(file, channels)
            size, bits = image.size, _depth(image)
            _check_cost(image, file)
            if channels is not None and image.mode == "F":
                return Probe(size, "floating-point", "its values are floating-point numbers")
            if decode or not _has_end_marker(image, file):
                image.load()
            return Probe(size, bits=bits)
    except CalmError as error:
        message = str(error) if os.path.lexists(path) else "no such file"
        return Probe(None, "other-bands" if start else "missing-file", message)
    except _TOO_LARGE as error:
        return Probe(size, "too-large", str(error))
    except UnidentifiedImageError:
        if not start:
            return Probe(None, "empty-file", "0 bytes")
        kinds = [kind for magic, kind in _OTHER_KINDS.items() if start.lstrip().lower().startswith(magic)]
        unknown = f"none of the formats {', '.join(FORMATS)}; it begins with {start[:12]!r}"
        return Probe(None, "not-an-image", f"{kinds[0]}, by its first bytes" if kinds else unknown)
    except Exception as error:  # a damaged file can make the decoders fail in any way
        return Probe(None, "truncated", str(error)[:200] or type(error).__name__)


# A TIFF of more bands than Pillow reads is no error here, and should not be logged as one.
logging.getLogger(TiffImagePlugin.__name__).addFilter(lambda record: "More samples per pixel" not in str(record.msg))


class _Bands:
    """A TIFF with any number of bands, with those attributes of Pillow's images that are used of every file."""

    format = "TIFF"

    def __init__(self, file: BinaryIO) -> None:
        with needs_extra("reading a TIFF of several bands", "bands"):
            import tifffile
        file.seek(0)
        self.series = tifffile.TiffFile(file).series[0]
        sides, page = dict(zip(self.series.axes, self.series.shape, strict=True)), self.series.keyframe
        self.size = self.width, self.height = sides["X"], sides["Y"]
        self.mode = "I" if self.series.dtype.kind in "iu" else "F"
        self.tag_v2 = {277: self.series.size // (self.width * self.height), 258: (page.bitspersample,)}
        if self.series.size > 3 * MAX_PIXELS:
            raise _TooLargeError(f"{self.series.shape} values, allowed are {3 * MAX_PIXELS:,}")
        if page.compression != 1 and max(page.databytecounts) > MAX_SEGMENT:
            raise _TooLargeError(f"a compressed strip or tile of more than {MAX_SEGMENT:,} bytes")

    def load(self) -> NDArray[Any]:
        """Return the values, (H, W, bands)."""
        places = [self.series.axes.index(axis) for axis in "YX"]
        return np.moveaxis(self.series.asarray(), places, (0, 1)).reshape(self.height, self.width, -1)

    __array__ = load


def _opened(file: BinaryIO, channels: int | None) -> Any:
    """Open an image without reading its pixels: by Pillow, or as `_Bands` where Pillow would not read all bands."""
    file.seek(0)
    is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    file.seek(0)
    try:
        image: Any = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if channels is None or not is_tiff:
            raise
        image = _Bands(file)
    by_pillow = isinstance(image, Image.Image)
    if channels is None or (by_pillow and channels in (1, 3) and _band_count(image) <= 4):
        return image
    if by_pillow and is_tiff and (_depth(image) > 8 or not channels == _band_count(image) == len(image.getbands())):
        image = _Bands(file)
    if (count := _band_count(image)) != channels:
        fix = f"train with --reading.channels {count}, which the model keeps, or take other images"
        raise CalmError(f"it has {count} bands, and {channels} are read: {fix}")
    return image


def _band_count(image: Any) -> int:
    return int(image.tag_v2.get(277, 1) if image.format == "TIFF" else len(image.getbands()))


def _depth(image: Any) -> int:
    """Return the bits of a value, at most 16: as a TIFF says; Pillow stretches those of PPM to 16."""
    deep = image.mode.startswith("I") or ";16" in str(getattr(image, "tile", ""))
    return min(16, *getattr(image, "tag_v2", {}).get(258, (16,))) if deep else 8


def _upper_bits(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return the upper 8 of ``bits`` bits of integers; values beyond are black or white."""
    if values.dtype.kind not in "iu":
        raise CalmError("floating-point image: convert it to 8 bits a channel first")
    return values if values.dtype == np.uint8 else np.clip(values >> max(0, bits - 8), 0, 255).astype(np.uint8)


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


def read_image(path: Path, *, channels: int = 3, bits: int | None = None, exif: bool = False) -> NDArray[np.uint8]:
    """Return the pixels of an image file, (H, W, channels) uint8.

    Args:
        path: an image of one of `FORMATS`, of any mode; of an animation, the first frame is read.
        channels: 3 for RGB, 1 for grey; any other number must be that of the file's bands, which are read as they are.
        bits: how many bits the values of files with more than 8 bits really use: 2**bits - 1 is white. None: as many as
            the file says, at most 16.
        exif: whether to rotate the picture as its EXIF orientation says. (Pillow itself rotates TIFF files, always.)

    Raises:
        CalmError: naming the file: it is missing, not an image, broken, of floating-point pixels, of another number of
            bands, or of more than `MAX_PIXELS` pixels. No other exception, whatever is in the file.
    """

    def convert(image: Any) -> Any:
        depth = bits or _depth(image)
        if isinstance(image, _Bands):
            return _upper_bits(image.load(), depth)
        if bits is not None and _depth(image) > 8 and len(image.getbands()) > 1:  # Pillow keeps the upper 8 bits of 16
            with needs_extra("reading colours of more than 8 bits", "evaluate"):
                import cv2
            colours: Any = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # blue, green, red, perhaps alpha
            image = Image.fromarray(_upper_bits(colours[..., 2::-1], bits))
        image = _upright(image) if exif else image
        image = to_rgb(image, depth) if channels in (1, 3) else image
        return image.convert("L") if channels == 1 else image

    return np.atleast_3d(_read(path, convert, "image", channels))


def highest_value(path: Path, channels: int = 3) -> int:
    """Return the highest value in an image file of more than 8 bits (of 16-bit colours, to the upper 8 bits)."""
    values = _read(path, np.asarray, "image", channels)
    return int(values.max()) << 8 * (values.dtype == np.uint8)


def mask_problem(size: tuple[int, int] | None, image_size: tuple[int, int] | None) -> str:
    """Return what is wrong with a mask, whose (width, height) must be, to a pixel, in proportion to its image's."""
    (width, height), (across, down) = size or (0, 0), image_size or (0, 0)
    if abs(width * down - height * across) <= max(width + height, across + down):
        return ""
    stored = f"its image as stored {across} x {down}"
    return f"it is {width} x {height} pixels, {stored}: give it that shape, for no mask is stretched"


def read_mask(path: Path, image_size: tuple[int, int] | None = None, what: str = "mask") -> NDArray[np.uint8]:
    """Return a mask as 8-bit grey (H, W): above 0 where a channel, or the index of a palette, is not 0.

    Raises:
        CalmError: see `read_image`; or the mask has not, at any scale, the shape of its image, whose (width, height) as
            stored is ``image_size``. None compares nothing.
    """

    def convert(image: Image.Image) -> NDArray[Any]:
        if problem := mask_problem(image.size, image_size):
            raise CalmError(problem)
        values, alpha = np.atleast_3d(np.asarray(image)), image.mode in ("LA", "PA", "RGBA")
        inside = (values[..., : values.shape[2] - alpha] != 0).any(axis=2)
        inside = inside & (values[..., -1] != 0) if alpha else inside
        levels = np.asarray(image.convert("L")) if image.mode != "P" else np.full(inside.shape, 255, np.uint8)
        return np.where(inside, np.maximum(levels, 1), 0)

    return _read(path, convert, what, None)


def _read(path: Path, convert: Callable[[Any], Any], what: str, channels: int | None) -> NDArray[Any]:
    """Return what ``convert`` makes of an image file, as an array; ``what`` describes the image in messages."""
    with open_regular(path, what) as file:
        try:
            image = _opened(file, channels)
            _check_cost(image, file)
            array: NDArray[Any] = np.array(convert(image))
            return array
        except _TOO_LARGE as error:
            raise CalmError(f"{what} {path} is too large: {error}") from error
        except CalmError as error:
            raise CalmError(f"{what} {path}: {error}") from error
        except Exception as error:  # a damaged file can make the decoders fail in any way
            reason = (
                probe(path, decode=True, channels=channels or 3).message or str(error)[:200] or type(error).__name__
            )
            raise CalmError(f"cannot read {what} {path}: {reason}; `calm data check` lists all such files") from error


def _upright(image: Image.Image) -> Image.Image:
    """Rotate ``image`` as its EXIF orientation says; return it as stored if that cannot be read."""
    image.load()  # Pillow rotates TIFF files itself, and only then forgets their orientation
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data are no reason to refuse a whole picture
        return image


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
    """Return ``image`` in mode RGB, 8 bits a channel; floating-point pixels, of unknown range, are refused.

    Transparent pixels are laid over white, those of a PNG's transparent colour too. Integers keep the upper 8 of
    ``bits`` bits. Grey, palette and CMYK images convert as Pillow does.
    """
    if image.mode == "RGB":
        colour = image.info.get("transparency")  # the colour that a PNG declares to be transparent
        if not isinstance(colour, tuple):
            return image
        if max(colour) > 255:  # of a file with 16 bits a channel; Pillow has made the pixels 8 bits
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in colour)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_upper_bits(np.asarray(image), bits)).convert("RGB")
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


ImageLike: TypeAlias = Union[str, Path, Image.Image, np.ndarray, "Tensor"]
"""A file, a PIL image, or uint8 of shape (H, W, channels)."""

Pixels: TypeAlias = Image.Image | NDArray[np.uint8]
"""A PIL image of mode RGB or L, or (H, W, channels) of any other number of channels."""


def as_pixels(array: NDArray[np.uint8]) -> Pixels:
    """Return (H, W, channels) as a PIL image if it has 1 or 3 channels."""
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) if array.shape[2] in (1, 3) else array


def resize_pixels(pixels: Pixels, size: tuple[int, int], interpolation: Interpolation = "bilinear") -> Pixels:
    """Resize by `resize_image`, band by band if it is no PIL image."""
    resample = Image.Resampling[interpolation.upper()]
    if isinstance(pixels, Image.Image):
        return resize_image(pixels, size, resample)
    bands = (Image.fromarray(band) for band in np.moveaxis(pixels, 2, 0))
    return np.stack([np.asarray(resize_image(band, size, resample)) for band in bands], 2)


@dataclass(frozen=True)
class Preprocessing:
    """Resize to ``size`` (no crop, the aspect ratio is not kept: the paper's test protocol), scale, and normalise.

    Attributes:
        size: (height, width) in pixels, each from 1 to `MAX_INPUT_SIDE`.
        mean: per channel, of values in [0, 1]; the default is ImageNet's. There are as many channels as means.
        std: per channel, of values in [0, 1]; the default is ImageNet's.
        bits: see `read_image`: the bits that files of more than 8 bits use, 8 to 32; None: as many as the file says.
        view: the channels that people see as red, green and blue, from 0; None: the first three, or the only one.
        interpolation: the filter, one of Pillow's antialiased ones, that resizes: ``bilinear`` is the paper's; most
            weights of timm were trained with ``bicubic``.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    bits: int | None = None
    view: tuple[int, ...] | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        check_options(self, "preprocessing ")
        for name in ("size", "mean", "std", "view"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.size) != 2 or not 1 <= min(self.size) <= max(self.size) <= MAX_INPUT_SIDE:
            form = f"(height, width) in pixels, each 1 to {MAX_INPUT_SIDE}"
            raise CalmError(f"preprocessing size is {shown(self.size)}: give {form}")
        if not 1 <= len(self.mean) == len(self.std) or not min(self.std) > 0:
            raise CalmError("preprocessing needs a mean and a positive std for each channel")
        if self.bits is not None and not 8 <= self.bits <= 32:
            raise CalmError(f"preprocessing bits is {self.bits}: allowed are 8 to 32")
        if self.view is not None and (len(self.view) != 3 or not 0 <= min(self.view) <= max(self.view) < self.channels):
            raise CalmError(f"preprocessing view is {shown(self.view)}: give three channels, 0 to {self.channels - 1}")

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)

    def read(self, path: Path, *, exif: bool = True) -> NDArray[np.uint8]:
        """Return the pixels of a file, (H, W, channels), by `read_image`."""
        return read_image(path, channels=self.channels, bits=self.bits, exif=exif)

    def picture(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return what people see of an image (H, W, channels): RGB, stretched where it is neither grey nor RGB."""
        bands = np.take(array, self.view or [channel % self.channels for channel in range(3)], axis=2)
        if self.channels in (1, 3):
            return bands
        low, high = np.percentile(bands, (2, 98), axis=(0, 1))
        return np.asarray(255 * ((bands - low) / np.maximum(high - low, 1)).clip(0, 1), dtype=np.uint8)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b c H W"]:
        """Return a float32 batch of one or several images, resized by Pillow's antialiased filter.

        Files are read by `read_image`, and turned upright as their EXIF orientation says, as `calm attribute` does. A
        PIL image or an array is taken as it is: give ``PIL.Image.open(file)`` for the stored pixels, which boxes and
        masks of CUB and of the metadata format refer to (`calm.data.records.Split.exif`).

        Raises:
            CalmError: a file that is missing or no image, an array of another shape or dtype, an empty list.
        """
        several = cast("Sequence[ImageLike]", images if isinstance(images, (list, tuple)) else [images])
        if not several:
            raise CalmError("no images given")
        import torch

        return torch.stack([self.one(image) for image in several])

    def one(self, image: ImageLike) -> Float[Tensor, "c H W"]:
        """Return the input of one image, as a call does."""
        return self.to_tensor(resize_pixels(self.pixels(image), self.size, self.interpolation))

    def pixels(self, image: ImageLike) -> Pixels:
        """Return the pixels of an image as stored (a file: upright), neither resized nor normalised."""
        if isinstance(image, Image.Image) and self.channels in (1, 3):
            colours = to_rgb(image, self.bits or _depth(image))
            return colours if self.channels == 3 else colours.convert("L")
        array = self.read(Path(image)) if isinstance(image, (str, Path)) else np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != self.channels:
            form = f"uint8 of shape (H, W, {self.channels}), got {array.dtype} of shape {array.shape}"
            raise CalmError(
                f"an image array must be {form}: permute or scale it; a normalised batch is the model's input"
            )
        return as_pixels(array)

    def to_tensor(self, pixels: Pixels | Tensor) -> Float[Tensor, "c H W"]:
        """Return pixels, or a uint8 tensor (channels, H, W), scaled and normalised but not resized, as float32."""
        import torch

        if not isinstance(pixels, torch.Tensor):
            pixels = torch.from_numpy(np.atleast_3d(np.array(pixels, dtype=np.uint8))).permute(2, 0, 1)
        return self.normalize(pixels.float() / 255).contiguous()

    def normalize(self, images: Float[Tensor, "*b c H W"]) -> Float[Tensor, "*b c H W"]:
        """Return (images - mean) / std, for values in [0, 1]."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def denormalize(self, images: Float[Tensor, "*b c H W"]) -> Float[Tensor, "*b c H W"]:
        """Return values in [0, 1], clipped."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def check_images(images: Tensor, channels: int | None = 3) -> None:
    """Raise a CalmError unless ``images`` are floats of shape (B, channels, H, W); None is any number of channels."""
    from torch import Tensor

    if not isinstance(images, Tensor):
        raise CalmError(f"images must be a tensor, got a {type(images).__name__}: model.preprocess makes one of files")
    if images.ndim != 4 or channels not in (None, images.shape[1]) or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}"
        raise CalmError(f"images must be floats of shape (B, {channels or 'channels'}, H, W), got {given}")
