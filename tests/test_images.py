"""calm.images: what is wrong with a file, its pixels as RGB, and the model's input."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from data_files import write_broken, write_image
from PIL import Image
from torch.testing import assert_close

from calm import images
from calm.errors import CalmError
from calm.images import Preprocessing, image_size, probe, read_image, read_mask, to_rgb

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


def test_read_image_names_a_broken_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    for name, path in write_broken(tmp_path).items():
        with pytest.raises(CalmError, match=path.name) as caught:
            read_image(path)
        if name == "not-an-image":
            assert "an HTML page" in str(caught.value)


def test_read_image_refuses_more_pixels_than_the_limit_before_decoding(tmp_path, monkeypatch) -> None:
    """The limit keeps a small file from becoming an image that fills the memory."""
    path = write_image(tmp_path / "a.png", (64, 48))
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(CalmError, match=r"a\.png is too large: 64 x 48 pixels, allowed are 3,071"):
        read_image(path)
    assert probe(path).kind == "too-large"
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("pixels", [2000, 1000])
def test_read_image_names_the_file_when_pillows_own_limit_is_passed(tmp_path, monkeypatch, pixels: int) -> None:
    """Above its limit Pillow warns, which a user may turn into an error; above twice that it raises."""
    path = write_image(tmp_path / "a.png", (64, 48))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    with pytest.raises(CalmError, match=r"a\.png is too large"):
        read_image(path)
    assert probe(path).kind == "too-large"


def test_read_image_refuses_more_scans_than_the_limit(tmp_path, monkeypatch) -> None:
    """Each scan of a progressive JPEG costs the decoder a pass over all pixels, however few its bytes."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", progressive=True)
    assert read_image(tmp_path / "a.jpg").shape == (16, 16, 3)
    monkeypatch.setattr(images, "MAX_SCANS", 2)
    with pytest.raises(CalmError, match=r"a\.jpg is too large: a JPEG of \d+ scans, allowed are 2"):
        read_image(tmp_path / "a.jpg")
    assert probe(tmp_path / "a.jpg").kind == "too-large"


def _saved(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    return read_image(path)


def test_read_image_converts_every_mode(tmp_path: Path) -> None:
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
def test_read_image_lays_transparent_pixels_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = _saved(tmp_path / "a.png", image.convert(mode))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == [255, 255, 255]


def test_read_image_lays_the_transparent_colour_of_a_png_over_white(tmp_path: Path) -> None:
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
    assert read_image(tmp_path / "deep.png").tolist() == [[[255] * 3, [2, 4, 6]]]


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


def test_read_image_follows_the_exif_orientation_only_if_told_to(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    stored, shown = read_image(tmp_path / "a.png"), read_image(tmp_path / "a.png", exif=True)
    assert stored.shape == (2, 4, 3)
    assert stored[0, 0].all()
    assert shown.shape == (4, 2, 3)
    assert shown[0, 1].all()
    assert image_size(tmp_path / "a.png") == (4, 2)


def tiff12(values: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits a value, (H, an even W), which neither Pillow nor tifffile writes."""
    pairs = values.reshape(-1, 2).astype(int)
    data = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in pairs)
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_read_image_scales_integers_by_the_bits_of_the_file_or_those_given(tmp_path: Path) -> None:
    values = np.array([[0, 17, 204, 255], [256, 4095, 4096, 65535]])
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tif")
    (tmp_path / "12.tif").write_bytes(tiff12(values.clip(max=4095)))
    for name in ("a.png", "a.tif"):
        assert (read_image(tmp_path / name)[..., 0] == values >> 8).all()
        assert (read_image(tmp_path / name, bits=12)[..., 1] == (values >> 4).clip(max=255)).all()
        assert (read_image(tmp_path / name, bits=8, channels=1)[..., 0] == values.clip(max=255)).all()
    assert (read_image(tmp_path / "12.tif")[..., 2] == values.clip(max=4095) >> 4).all()
    prepare = Preprocessing(size=(2, 4), bits=12)
    assert_close(
        prepare.denormalize(prepare(tmp_path / "a.png"))[0, 0], torch.tensor((values >> 4).clip(max=255)) / 255
    )
    assert_close(prepare(Image.open(tmp_path / "a.png")), prepare(tmp_path / "a.png"))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_read_image_keeps_the_low_bits_of_colours_that_are_asked_for(tmp_path: Path, name: str) -> None:
    colours = np.random.default_rng(0).integers(0, 4096, (6, 5, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / name), colours[..., ::-1])
    assert (read_image(tmp_path / name) == colours >> 8).all()
    assert (read_image(tmp_path / name, bits=12) == colours >> 4).all()


BANDS = np.random.default_rng(0).integers(0, 4096, (6, 7, 13), dtype=np.uint16)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (BANDS, {"planarconfig": "contig"}),
        (BANDS, {"planarconfig": "contig", "compression": "zlib", "predictor": True, "tile": (16, 16)}),
        (BANDS.transpose(2, 0, 1), {"planarconfig": "separate"}),
        (BANDS.transpose(2, 0, 1), {}),  # a page for each band
    ],
)
def test_read_image_reads_all_bands_of_a_tiff(tmp_path: Path, array: np.ndarray, options: dict[str, object]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, photometric="minisblack", **options)
    assert (read_image(path, channels=13) == BANDS >> 8).all()
    assert (read_image(path, channels=13, bits=12) == BANDS >> 4).all()
    assert probe(path, channels=13, decode=True) == ((7, 6), "", "", 16)
    tifffile.imwrite(path, (array >> 4).astype(np.uint8), photometric="minisblack", **options)
    assert (read_image(path, channels=13) == BANDS >> 4).all()


def test_read_image_names_the_bands_that_a_file_has(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "13.tif", BANDS, photometric="minisblack", planarconfig="contig")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    for name, channels, count in (("13.tif", 3, 13), ("13.tif", 12, 13), ("rgb.png", 13, 3)):
        message = f"it has {count} bands, and {channels} are read: train with --reading.channels {count}"
        with pytest.raises(CalmError, match=rf"{name}.*{message}"):
            read_image(tmp_path / name, channels=channels)
        assert message in probe(tmp_path / name, channels=channels).message
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png", channels=4)[0, 0].tolist() == [1, 2, 3, 4]
    assert read_image(tmp_path / "rgb.png", channels=1).shape == (4, 4, 1)


@pytest.mark.parametrize(("limit", "value"), [("MAX_PIXELS", 100), ("MAX_SEGMENT", 100)])
def test_read_image_refuses_bands_beyond_the_limits(tmp_path, monkeypatch, limit: str, value: int) -> None:
    """Bands may take more memory than pixels, and what a compressed strip unpacks to is not known before."""
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig", compression="zlib")
    monkeypatch.setattr(images, limit, value)
    with pytest.raises(CalmError, match=r"a\.tif is too large"):
        read_image(tmp_path / "a.tif", channels=13)
    assert probe(tmp_path / "a.tif", channels=13).kind == "too-large"


def test_read_mask_is_what_is_not_zero_in_any_channel(tmp_path: Path) -> None:
    object_at = np.zeros((4, 6), dtype=bool)
    object_at[1:3, 2:5] = True
    palette = Image.fromarray(object_at.astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # index 0 white, the object black
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[object_at] = (0, 0, 1)
    alpha = np.dstack([colours, np.full((4, 6), 255, np.uint8)])
    clear = np.dstack([np.full((4, 6, 3), 9, np.uint8), object_at * np.uint8(255)])
    deep = Image.fromarray((object_at * 256).astype(np.uint16))
    for image in (palette, *map(Image.fromarray, (colours, alpha, clear, object_at)), deep):
        image.save(tmp_path / "mask.png")
        assert ((read_mask(tmp_path / "mask.png") > 0) == object_at).all(), image.mode
    grey = Image.fromarray(np.array([[0, 1, 200]], dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png").tolist() == [[0, 1, 200]]


def test_read_mask_has_the_shape_of_its_image_at_any_scale(tmp_path: Path) -> None:
    Image.new("L", (40, 80)).save(tmp_path / "mask.png")
    for size in ((40, 80), (400, 800), (399, 801), (13, 27)):
        read_mask(tmp_path / "mask.png", size)
    with pytest.raises(CalmError, match=r"mask\.png: it is 40 x 80 pixels, its image as stored 80 x 40: give it that"):
        read_mask(tmp_path / "mask.png", (80, 40))


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


def test_preprocessing_of_other_channels_reads_and_shows_them(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig")
    prepare = Preprocessing(size=(6, 7), mean=(0.5,) * 13, std=(0.25,) * 13, bits=12, view=(3, 2, 1))
    want = (torch.from_numpy((BANDS >> 4).astype(np.float32)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert_close(prepare(tmp_path / "a.tif")[0], want)
    assert_close(prepare((BANDS >> 4).astype(np.uint8))[0], want)
    assert prepare(tmp_path / "a.tif").shape == (1, 13, 6, 7)
    shown = prepare.picture(prepare.read(tmp_path / "a.tif"))
    assert shown.shape == (6, 7, 3)
    assert np.corrcoef(shown[..., 0].ravel(), BANDS[..., 3].ravel())[0, 1] > 0.99
    grey = Preprocessing(mean=(0.5,), std=(0.5,))
    assert grey(PIXELS.mean(axis=2, keepdims=True).astype(np.uint8)).shape == (1, 1, 224, 224)
    assert grey(Image.fromarray(PIXELS)).shape == (1, 1, 224, 224)
    assert grey.picture(np.full((2, 2, 1), 7, np.uint8)).tolist() == [[[7] * 3] * 2] * 2
    for options in ({"bits": 7}, {"view": (0, 1)}, {"view": (0, 1, 3)}):
        with pytest.raises(CalmError, match=f"preprocessing {next(iter(options))}"):
            Preprocessing(**options)


def test_preprocessing_resizes_by_its_filter_every_band():
    image = np.random.default_rng(3).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    prepare = Preprocessing(size=(16, 24), interpolation="bicubic")
    want = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC))
    assert_close(prepare(image), prepare.to_tensor(want)[None], rtol=0, atol=0)
    assert not torch.equal(prepare(image), Preprocessing(size=(16, 24))(image))
    five = image[..., [0, 1, 2, 0, 1]]
    bands = Preprocessing((16, 24), (0.5,) * 5, (0.5,) * 5, interpolation="bicubic")
    assert_close(bands(five), bands.to_tensor(want[..., [0, 1, 2, 0, 1]])[None], rtol=0, atol=0)


def test_preprocessing_refuses_wrong_settings():
    with pytest.raises(CalmError, match=r"preprocessing interpolation 'lanczos': allowed are bilinear, bicubic"):
        Preprocessing(interpolation="lanczos")
    with pytest.raises(CalmError, match="size"):
        Preprocessing(size=(0, 5))
    with pytest.raises(CalmError, match=r"preprocessing size is 96: give several values, as in \(96, ...\)"):
        Preprocessing(size=96)
    with pytest.raises(CalmError, match="positive std"):
        Preprocessing(std=(1.0, 0.0, 1.0))
