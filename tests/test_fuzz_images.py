"""Untrusted and damaged image files: a picture, or CalmError that names the file."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from fuzz_corpus import FLAT, LOSSY, SIZE, corpus, files_of, pixels_of
from fuzzing import cases, damaged, outcome
from hypothesis import given, strategies as st
from PIL import Image
from stress_counts import count

from calm.cli.attribute import find_images
from calm.data.cues import read_segmentation
from calm.errors import CalmError
from calm.images import Preprocessing, image_size, probe, read_image

pytestmark = [pytest.mark.stress, pytest.mark.filterwarnings("ignore::UserWarning")]  # Pillow's, of odd metadata


def read_every_way(path: Path) -> None:
    """All readers of images agree whether the file is one, and none raises anything but CalmError."""
    found = outcome(lambda: read_image(path), path.name)
    shown = outcome(lambda: read_image(path, exif=True), path.name)
    look, size = probe(path, decode=True), image_size(path)
    assert (look.kind == "") == (not look.message)
    if found is not None:
        assert look.kind == "", look
        assert size == look.size == (found.shape[1], found.shape[0])
        assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)
        assert shown is not None
        assert sorted(shown.shape) == sorted(found.shape)
    outcome(lambda: Preprocessing(size=(8, 8))(path), path.name)
    outcome(lambda: read_segmentation(path, (8, 8)), path.name)


@pytest.mark.parametrize("name", corpus())
def test_read_image_reads_a_good_file_of_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(corpus()[name])
    found = outcome(lambda: read_image(tmp_path / name), name)
    assert found is not None
    stored = (SIZE[1], SIZE[0])
    assert found.shape[:2] == (stored[::-1] if name == "turned.tif" else stored)  # which Pillow itself turns
    read_every_way(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), SIZE])
@pytest.mark.parametrize("name", corpus())
def test_read_image_shows_what_was_saved(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Oracle: of one colour, half of it transparent, what each kind keeps; of noise, the pixels, where none is lost."""
    path = tmp_path / name
    red, green, blue, alpha = FLAT
    luma = round(0.299 * red + 0.587 * green + 0.114 * blue)
    colour: list[float] = [luma] * 3 if name.startswith("grey") else [red, green, blue]
    if name.startswith("bits"):
        colour = [255 * (luma > 127)] * 3
    kept = {"palette-alphas.png": 80, "grey-alpha.png": alpha, "alpha.png": alpha, "lossless.webp": alpha}
    opaque = kept.get(name, 255) / 255
    path.write_bytes(files_of(size, noise=False)[name])
    found = read_image(path, exif=True)
    assert found.shape == (*(size if "turned" in name else size[::-1]), 3)
    lossy = name.endswith(LOSSY)
    expected = np.array(colour) * opaque + 255 * (1 - opaque)
    assert np.abs(found - expected).max() <= (4 if lossy else 1)
    read_every_way(path)
    path.write_bytes(files_of(size, noise=True)[name])
    read_every_way(path)
    exact = name.startswith(("plain", "turned", "deep", "pages", "text", "lzw", "cmyk", "animated.png")) and not lossy
    if exact and not name.endswith("gif"):
        shown = pixels_of(size, noise=True)[..., :3]
        assert (read_image(path, exif=True) == (np.rot90(shown, -1) if "turned" in name else shown)).all()


@cases(100, 3000)
@given(data=st.data())
def test_read_image_of_a_damaged_file_names_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(corpus())))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(damaged(corpus()[name])))
    read_every_way(path)


@cases(20, 1000)
@given(st.binary(max_size=2000))
def test_read_image_refuses_noise(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.png"
    path.write_bytes(noise)
    read_every_way(path)


@pytest.mark.parametrize("name", corpus())
def test_read_image_of_a_truncated_file_names_it(tmp_path: Path, name: str) -> None:
    whole, path = corpus()[name], tmp_path / name
    for end in np.linspace(0, len(whole) - 1, count(reduced=4, full=60), dtype=int).tolist():
        path.write_bytes(whole[:end])
        read_every_way(path)


# Files that are no pictures


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(MARKER) (w) file closefile showpage
%%EOF
"""


def odd_things(folder: Path) -> dict[str, Path]:
    """What else may have the name of an image: no reader takes any of it for one."""
    folder.mkdir(exist_ok=True)
    paths = {
        name: folder / f"{name}.jpg"
        for name in ("page", "empty", "lfs", "script", "folder", "loop", "dangling", "itself", "device")
    }
    paths["page"].write_bytes(b"\n<!DOCTYPE html><html><title>404</title></html>")
    paths["empty"].write_bytes(b"")
    paths["lfs"].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    paths["script"].write_bytes(POSTSCRIPT.replace(b"MARKER", os.fsencode(folder / "marker")))
    paths["folder"].mkdir()
    paths["loop"].symlink_to(folder / "other-loop.jpg")
    (folder / "other-loop.jpg").symlink_to(paths["loop"])
    paths["dangling"].symlink_to(folder / "nowhere.jpg")
    paths["itself"].symlink_to(paths["itself"])
    paths["device"].symlink_to(os.devnull)
    return paths


def test_read_image_refuses_what_is_no_picture(tmp_path: Path) -> None:
    for path in odd_things(tmp_path).values():
        for read in (read_image, read_segmentation, Preprocessing()):
            with pytest.raises(CalmError, match=path.name):
                read(path)
        assert probe(path, decode=True).kind in ("missing-file", "empty-file", "not-an-image")
        assert image_size(path) is None
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["a\0b.jpg", "n" * 5000 + ".jpg", "folder/../" * 2000 + "x.jpg"])
def test_read_image_refuses_a_name_that_no_file_can_have(name: str) -> None:
    for read in (read_image, read_segmentation, Preprocessing()):
        with pytest.raises(CalmError, match="cannot read"):
            read(Path(name))
    assert probe(Path(name)).kind == "missing-file"
    with pytest.raises(CalmError, match="no image found"):
        find_images([name], Path("out"))


def test_probe_takes_postscript_for_no_image(tmp_path: Path) -> None:
    """Pillow would start Ghostscript for it."""
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with warnings.catch_warnings(), Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "EPS"
    assert probe(tmp_path / "a.jpg").kind == "not-an-image"


def test_read_image_names_a_file_of_floating_point_pixels(tmp_path: Path) -> None:
    Image.new("F", (4, 3)).save(tmp_path / "depth.tif")
    with pytest.raises(CalmError, match=r"depth\.tif.*floating-point"):
        read_image(tmp_path / "depth.tif")


def test_read_image_ignores_damaged_exif_data(tmp_path: Path) -> None:
    whole = corpus()["turned.jpg"]
    start = whole.index(b"Exif")
    (tmp_path / "a.jpg").write_bytes(whole[: start + 6] + b"\xff" * 8 + whole[start + 14 :])
    assert read_image(tmp_path / "a.jpg", exif=True).shape == read_image(tmp_path / "a.jpg").shape


# From the file to the model


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_rotates_each_orientation_as_the_standard(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Oracle: where the stored first row and first column are shown (EXIF 2.3, tag 274), here for two bars of 8 pixels
    that meet in one corner, since JPEG blurs."""
    rows, columns = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = np.zeros((32, 48, 3), dtype=np.uint8)
    stored[:8, :, 0], stored[:, :8, 1] = 255, 255  # first rows red, first columns green
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **exact)
    shown = read_image(path, exif=True)
    assert shown.shape == ((48, 32, 3) if orientation > 4 else (32, 48, 3))
    bars = {"top": shown[:8], "bottom": shown[-8:], "left": shown[:, :8], "right": shown[:, -8:]}
    assert (bars[rows][..., 0] > 250).all()
    assert (bars[columns][..., 1] > 250).all()
    assert (shown[..., 0] > 128).sum() == 8 * 48
    assert (shown[..., 1] > 128).sum() == 8 * 32
    prepare = Preprocessing(size=(16, 16))
    assert (prepare(path) == prepare(shown)).all()


def test_preprocessing_reads_a_file_upright_as_calm_attribute_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(corpus()["turned.jpg"])
    prepare = Preprocessing(size=(16, 16))
    assert (prepare(path) == prepare(read_image(path, exif=True))).all()
    assert not (prepare(path) == prepare(read_image(path))).all()
    with Image.open(path) as image:
        assert (prepare(image) == prepare(read_image(path))).all()  # a picture already open is taken as it is
