"""Good image files of every kind: for the fuzz suites to damage, and what each of them shows."""

from __future__ import annotations

import io
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SIZE = (37, 23)
TURNED = 6
"""EXIF orientation of the files named turned: a quarter to the right."""
PILLOWS = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}
LOSSY = ("jpg", "mpo", "webp", "jpeg.tif")


FLAT = (200, 120, 40, 128)


@cache
def pixels_of(size: tuple[int, int], *, noise: bool) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA, of noise or of one half transparent colour, `FLAT`."""
    shape = (size[1], size[0], 4)
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8) if noise else np.full(shape, FLAT, np.uint8)


@cache
def files_of(size: tuple[int, int], *, noise: bool) -> dict[str, bytes]:
    """A file of every kind that shows `pixels_of`: name to content. Only the files named alpha, and lossless.webp, keep
    the alpha channel. The last colours of the palettes, which are transparent, are those that are used least."""
    pixels = pixels_of(size, noise=noise)
    rgba = Image.fromarray(pixels)
    rgb = Image.fromarray(pixels[..., :3].copy())
    grey = rgb.convert("L")
    turned = Image.Exif()
    turned[0x0112] = TURNED
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)
    others = [255 - pixels[..., :3], pixels[::-1, :, :3].copy()]
    animated: dict[str, object] = {"save_all": True}
    black = grey.convert("1", dither=Image.Dither.NONE)
    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    wanted: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.jpg": (rgb, {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "several.mpo": (rgb, animated),
        "plain.png": (rgb, {}),
        "turned.png": (rgb, {"exif": turned}),
        "grey-deep.png": (deep, {}),
        "bits.png": (black, {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "alpha.png": (rgba, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 15}),
        "palette-alphas.png": (rgb.quantize(4), {"transparency": bytes([80, 255, 160, 0])}),
        "animated.png": (rgb, animated),
        "plain.gif": (rgb.quantize(32), {"transparency": 31}),
        "animated.gif": (rgb, animated),
        "plain.webp": (rgb, {}),
        "turned.webp": (rgb, {"exif": turned}),
        "lossless.webp": (rgba, {"lossless": True, "exact": True}),
        "animated.webp": (rgb, animated),
        "plain.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(16), {}),
        "plain.tif": (rgb, {}),
        "turned.tif": (rgb, {"exif": turned}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "lab.tif": (lab, {}),
        "grey-deep.tif": (deep, {}),
        "pages.tif": (rgb, animated),
        "plain.ppm": (rgb, {}),
        "grey.pgm": (grey, {}),
        "bits.ppm": (black, {}),
    }
    files = {}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        suffix = name.rpartition(".")[2]
        if options is animated:
            options = {**animated, "append_images": [Image.fromarray(other) for other in others]}
        image.copy().save(buffer, PILLOWS.get(suffix, suffix), **options)  # saving leaves traces in an image
        files[name] = buffer.getvalue()
    colours = pixels[..., :3].astype(np.uint16)[..., ::-1] * 256 + 77
    for name in ("deep.png", "deep.tif"):  # 16 bits a channel, which Pillow does not write
        files[name] = cv2.imencode(name[-4:], colours)[1].tobytes()
    height, width = pixels.shape[:2]
    values = b" ".join(b"%d" % value for value in pixels[..., :3].ravel())
    files["text.ppm"] = b"P3\n%d %d\n255\n" % (width, height) + values
    return files


def corpus() -> dict[str, bytes]:
    """A good file of every kind, of noise: name to content. All are 37 x 23 as stored."""
    return files_of(SIZE, noise=True)
