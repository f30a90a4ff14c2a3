"""Good image files of every kind, for the fuzz suites to damage."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

SIZE = (37, 23)


@cache
def corpus() -> dict[str, bytes]:
    """A good file of every kind: name to content. All are 37 x 23 as stored."""
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(generator.integers(0, 2**16, SIZE[::-1], dtype=np.uint16))
    others = [Image.fromarray(255 - pixels[..., :3]), Image.fromarray(pixels[::-1, :, :3].copy())]
    animated = {"save_all": True, "append_images": others}
    wanted: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.jpg": (rgb, {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "plain.png": (rgb, {}),
        "turned.png": (rgb, {"exif": turned}),
        "deep.png": (deep, {}),
        "bits.png": (grey.convert("1"), {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "alpha.png": (rgba, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "palette-alphas.png": (rgb.quantize(4), {"transparency": bytes([0, 80, 160, 255])}),
        "animated.png": (rgb, animated),
        "plain.gif": (rgb.quantize(32), {"transparency": 1}),
        "animated.gif": (rgb, animated),
        "plain.webp": (rgb, {}),
        "lossless.webp": (rgba, {"lossless": True}),
        "animated.webp": (rgb, animated),
        "plain.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(16), {}),
        "plain.tif": (rgb, {}),
        "lzw.tif": (rgb, {"compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "deep.tif": (deep, {}),
        "pages.tif": (rgb, animated),
        "plain.ppm": (rgb, {}),
        "plain.pgm": (grey, {}),
        "bits.ppm": (grey.convert("1"), {}),
    }
    files = {}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        image.save(
            buffer, {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}.get(name[-3:], name.split(".")[1]), **options
        )
        files[name] = buffer.getvalue()
    files["text.ppm"] = b"P3\n37 23\n255\n" + b" ".join(b"%d" % value for value in pixels[..., :3].ravel())
    return files
