"""calm.images: what is in a file, and its pixels as RGB."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_files import write_image
from PIL import Image

from calm.errors import CalmError
from calm.images import MAX_PIXELS, image_size, probe, read_rgb, to_rgb


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_broken(folder: Path) -> dict[str, Path]:
    """A file for each kind of problem an image can have."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = write_image(folder / "whole.jpg", (64, 48)).read_bytes()
    png = write_image(folder / "whole.png", (64, 48)).read_bytes()
    files = {
        "empty-file": b"",
        "not-an-image": b"<!DOCTYPE html><html>Not found</html>",
        "truncated": whole[: len(whole) // 2],
        "truncated-png": png[: len(png) // 2],
        "truncated-header": png[:20],
    }
    paths = {kind: folder / f"{kind}.jpg" for kind in files}
    for kind, content in files.items():
        paths[kind].write_bytes(content)
    paths["too-large"] = write_bomb(folder / "bomb.png", 30_000, 30_000)
    paths["missing-file"] = folder / "nowhere.jpg"
    return paths


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm"])
def test_a_good_file_has_a_size_and_no_problem(tmp_path: Path, name: str, decode: bool) -> None:
    path = write_image(tmp_path / name, (9, 5))
    assert probe(path, decode=decode).size == (9, 5)
    assert probe(path, decode=decode).kind == ""
    assert image_size(path) == (9, 5)


@pytest.mark.parametrize("decode", [False, True])
def test_each_kind_of_broken_file_is_told_even_without_decoding(tmp_path: Path, decode: bool) -> None:
    for name, path in write_broken(tmp_path).items():
        expected = name.removesuffix("-png")
        found = probe(path, decode=decode)
        if name == "truncated-header":
            assert found.kind in ("truncated", "not-an-image")
        else:
            assert found.kind == expected, (name, found)
        assert found.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n <HTML><body>404", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"hello world, this is text", "it begins with b'hello world,'"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert words in probe(path).message


def test_broken_pixels_inside_a_whole_file_are_found_by_decoding(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (64, 48))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 50] ^= 0xFF
    path.write_bytes(data)
    assert probe(path).kind == ""
    assert probe(path, decode=True).kind == "truncated"


def test_a_folder_in_place_of_an_image_is_a_problem(tmp_path: Path) -> None:
    assert probe(tmp_path).kind == "missing-file"


def test_reading_a_broken_file_names_it_and_the_reason(tmp_path: Path) -> None:
    for name, path in write_broken(tmp_path).items():
        with pytest.raises(CalmError, match=path.name) as caught:
            read_rgb(path)
        if name == "not-an-image":
            assert "an HTML page" in str(caught.value)


@pytest.mark.parametrize("factor", [1.1, 3])
def test_the_limit_on_pixels_holds_for_reading_too(tmp_path: Path, factor: float) -> None:
    """Above Pillow's limit, and above twice that, where Pillow itself stops."""
    side = int((factor * MAX_PIXELS) ** 0.5)
    path = write_bomb(tmp_path / "bomb.png", side, side)
    with pytest.raises(CalmError, match=r"bomb.png is too large: .*89,478,485"):
        read_rgb(path)
    assert image_size(path) is None or factor < 2


def _saved(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    return read_rgb(path)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = Image.new("L", (3, 2), 100)
    assert np.all(_saved(tmp_path / "l.png", grey) == 100)
    assert np.all(_saved(tmp_path / "1.png", grey.convert("1", dither=Image.Dither.NONE)) == 0)
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (_saved(tmp_path / "p.gif", palette) == (10, 20, 30)).all()
    deep = Image.fromarray(np.full((2, 3), 100 * 256 + 255, dtype=np.uint16))
    assert np.all(_saved(tmp_path / "i16.png", deep) == 100)
    cmyk = _saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    assert cmyk.shape == (16, 16, 3)
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() < 12  # no cyan, full magenta and yellow: red


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = _saved(tmp_path / "a.png", image.convert(mode))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [255, 255, 255]


def test_the_transparent_colour_of_a_png_is_laid_over_white(tmp_path: Path) -> None:
    """A tRNS chunk, of RGB with 8 bits a channel and with 16, whose upper 8 are kept."""
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (1, 2, 4))
    assert _saved(tmp_path / "a.png", image, transparency=(1, 2, 3)).tolist() == [[[255] * 3, [1, 2, 4]]]
    shades = Image.new("L", (2, 1), 5)
    shades.putpixel((1, 0), 6)
    assert _saved(tmp_path / "grey.png", shades, transparency=5).tolist() == [[[255] * 3, [6] * 3]]
    (tmp_path / "deep.png").write_bytes(
        png((2, 1), 16, struct.pack(">6H", 0x0102, 0x0304, 0x0506, 0x0201, 0x0403, 0x0605), b"\1\2\3\4\5\6")
    )
    assert read_rgb(tmp_path / "deep.png").tolist() == [[[255] * 3, [2, 4, 6]]]


def png(size: tuple[int, int], bits: int, row: bytes, colour: bytes) -> bytes:
    """A PNG of mode RGB, all rows the same, with a transparent colour; Pillow writes none of 16 bits a channel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", colour) + pixels + chunk(b"IEND", b"")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="floating-point image"):
        to_rgb(Image.new("F", (2, 2)))


def test_exif_orientation_is_followed_only_when_asked(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    stored, shown = read_rgb(tmp_path / "a.png"), read_rgb(tmp_path / "a.png", exif=True)
    assert stored.shape == (2, 4, 3)
    assert stored[0, 0].all()
    assert shown.shape == (4, 2, 3)
    assert shown[0, 1].all()
    assert image_size(tmp_path / "a.png") == (4, 2)
