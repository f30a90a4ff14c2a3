"""calm.images: what is wrong with a file, its pixels as RGB, and the model's input."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_broken, write_image
from PIL import Image
from torch.testing import assert_close

from calm import images
from calm.errors import CalmError
from calm.images import Preprocessing, image_size, probe, read_rgb, to_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tif", "a.ppm"])
def test_probe_finds_the_size_and_no_problem_of_a_good_file(tmp_path: Path, name: str, decode: bool) -> None:
    path = write_image(tmp_path / name, (9, 5))
    assert probe(path, decode=decode).size == (9, 5)
    assert probe(path, decode=decode).kind == ""
    assert image_size(path) == (9, 5)


@pytest.mark.parametrize("decode", [False, True])
def test_probe_tells_each_kind_of_broken_file_without_decoding(
    tmp_path: Path, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
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
def test_probe_says_what_a_file_is_instead(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert words in probe(path).message


def test_probe_finds_broken_pixels_inside_a_whole_file_by_decoding(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (64, 48))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 50] ^= 0xFF
    path.write_bytes(data)
    assert probe(path).kind == ""
    assert probe(path, decode=True).kind == "truncated"


def test_probe_reports_a_folder_in_place_of_an_image(tmp_path: Path) -> None:
    assert probe(tmp_path).kind == "missing-file"


def test_read_rgb_names_a_broken_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    for name, path in write_broken(tmp_path).items():
        with pytest.raises(CalmError, match=path.name) as caught:
            read_rgb(path)
        if name == "not-an-image":
            assert "an HTML page" in str(caught.value)


def test_read_rgb_refuses_more_pixels_than_the_limit_before_decoding(tmp_path, monkeypatch) -> None:
    """The limit keeps a small file from becoming an image that fills the memory."""
    path = write_image(tmp_path / "a.png", (64, 48))
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(CalmError, match=r"a\.png is too large: 64 x 48 pixels, allowed are 3,071"):
        read_rgb(path)
    assert probe(path).kind == "too-large"
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("pixels", [2000, 1000])
def test_read_rgb_names_the_file_when_pillows_own_limit_is_passed(tmp_path, monkeypatch, pixels: int) -> None:
    """Above its limit Pillow warns, which a user may turn into an error; above twice that it raises."""
    path = write_image(tmp_path / "a.png", (64, 48))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(CalmError, match=r"a\.png is too large"):
        read_rgb(path)
    assert probe(path).kind == "too-large"


def test_read_rgb_refuses_more_scans_than_the_limit(tmp_path, monkeypatch) -> None:
    """Each scan of a progressive JPEG costs the decoder a pass over all pixels, however few its bytes."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", progressive=True)
    assert read_rgb(tmp_path / "a.jpg").shape == (16, 16, 3)
    monkeypatch.setattr(images, "MAX_SCANS", 2)
    with pytest.raises(CalmError, match=r"a\.jpg is too large: a JPEG of \d+ scans, allowed are 2"):
        read_rgb(tmp_path / "a.jpg")
    assert probe(tmp_path / "a.jpg").kind == "too-large"


def _saved(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    return read_rgb(path)


def test_read_rgb_converts_every_mode(tmp_path: Path) -> None:
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
def test_read_rgb_lays_transparent_pixels_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = _saved(tmp_path / "a.png", image.convert(mode))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [255, 255, 255]


def test_read_rgb_lays_the_transparent_colour_of_a_png_over_white(tmp_path: Path) -> None:
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, row: bytes, colour: bytes) -> bytes:
    """A PNG of mode RGB, all rows the same, with a transparent colour; Pillow writes none of 16 bits a channel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", colour) + pixels + chunk(b"IEND", b"")


def test_to_rgb_refuses_floating_point_pixels(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="floating-point image"):
        to_rgb(Image.new("F", (2, 2)))


def test_read_rgb_follows_the_exif_orientation_only_if_told_to(tmp_path: Path) -> None:
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


# Preprocessing


def test_preprocessing_gives_the_same_batch_for_every_source(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    prepare = Preprocessing(size=(6, 8))
    want = (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255 - torch.tensor(prepare.mean).view(3, 1, 1)) / torch.tensor(
        prepare.std
    ).view(3, 1, 1)
    for source in (path, str(path), Image.fromarray(PIXELS), PIXELS, torch.from_numpy(PIXELS)):
        assert_close(prepare(source), want[None])
    assert prepare([path, PIXELS]).shape == (2, 3, 6, 8)
    assert_close(prepare.denormalize(prepare(path))[0], torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)


def test_preprocessing_size_is_height_then_width():
    assert Preprocessing(size=(3, 5))(PIXELS).shape == (1, 3, 3, 5)


def test_preprocessing_reads_grey_and_transparent_images_as_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (4, 4)).save(tmp_path / "x.tiff")
        assert Preprocessing(size=(4, 4))(tmp_path / "x.tiff").shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), "uint8 of shape"),
        (PIXELS[..., 0], "uint8 of shape"),
        ("nowhere.png", "cannot read image nowhere.png: no such file"),
        ([], "no images given"),
    ],
)
def test_preprocessing_refuses_wrong_images(image, message):
    with pytest.raises(CalmError, match=message):
        Preprocessing()(image)


def test_preprocessing_names_a_page_called_jpg(tmp_path):
    (tmp_path / "x.jpg").write_text("<html>not found</html>")
    with pytest.raises(CalmError, match=r"x\.jpg: an HTML page"):
        Preprocessing()(tmp_path / "x.jpg")


def test_preprocessing_refuses_wrong_settings():
    with pytest.raises(CalmError, match="size"):
        Preprocessing(size=(0, 5))
    with pytest.raises(CalmError, match="positive std"):
        Preprocessing(std=(1.0, 0.0, 1.0))
