"""Open image files: size from the header, what is wrong with a file, RGB pixels."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from calm.errors import CalmError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_PIXELS", "Probe", "image_size", "probe", "read_rgb", "to_rgb"]

MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own default guard against decompression bombs (256 MiB of RGB)."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

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
        kind: key of ``calm.data.problems.KINDS``; empty if nothing is wrong.
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
        with path.open("rb") as file:
            return _probe(file, decode)
    except FileNotFoundError:
        return Probe(None, "missing-file", "no such file")
    except OSError as error:
        return Probe(None, "missing-file", f"cannot be opened: {error.strerror}")


def _probe(file: BinaryIO, decode: bool) -> Probe:
    head = file.read(512)
    if not head:
        return Probe(None, "empty-file", "0 bytes")
    file.seek(0)
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return Probe(image.size, "too-large", _too_large(image.size))
            if decode or not _ends_well(file, image.format):
                image.load()
            return Probe(image.size)
    except _BOMB:
        return Probe(None, "too-large", f"more than {MAX_PIXELS:,} pixels")
    except UnidentifiedImageError:
        return Probe(None, "not-an-image", _impostor(head))
    except _BROKEN as error:
        return Probe(None, "truncated", str(error) or type(error).__name__)


def _too_large(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels, allowed are {MAX_PIXELS:,}"


def _impostor(head: bytes) -> str:
    start = head.lstrip().lower()
    for magic, name in _IMPOSTORS.items():
        if start.startswith(magic):
            return f"{name}, by its first bytes"
    return f"no known image format; it begins with {head[:12]!r}"


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
        with Image.open(path) as image:
            return image.size
    except (*_BOMB, *_BROKEN):
        return None


def read_rgb(path: Path, *, exif: bool = False) -> NDArray[np.uint8]:
    """The pixels of an image file, (H, W, 3) uint8 RGB.

    Args:
        path: an image of any format and mode Pillow reads; of an animation, the first frame.
        exif: turn the picture as its EXIF orientation says.

    Raises:
        CalmError: the file is missing, not an image, broken, or of more than :data:`MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CalmError(f"image {path} is too large: {_too_large(image.size)}")
            turned = ImageOps.exif_transpose(image) if exif else image
            return np.array(to_rgb(turned), dtype=np.uint8)
    except CalmError:
        raise
    except _BOMB as error:
        raise CalmError(f"image {path} is too large: more than {MAX_PIXELS:,} pixels") from error
    except _BROKEN as error:
        found = probe(path, decode=True)
        reason = found.message or str(error)
        raise CalmError(
            f"cannot read image {path}: {reason}; `calm data check` lists all such files"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, 8 bits a channel.

    Transparent pixels are laid over white. 16-bit grey keeps its upper 8 bits. Grey, palette and CMYK
    images convert as Pillow does.

    Raises:
        CalmError: floating-point pixels, whose range is not known.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        pixels: NDArray[Any] = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(pixels >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise CalmError("floating-point image: convert it to 8 bits a channel first")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")
