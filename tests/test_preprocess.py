"""From files, PIL images and arrays to a normalised batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from calm.errors import CalmError
from calm.images import Preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_every_source_gives_the_same_batch(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    prepare = Preprocessing(size=(6, 8))
    want = (
        torch.from_numpy(PIXELS).permute(2, 0, 1) / 255 - torch.tensor(prepare.mean).view(3, 1, 1)
    ) / torch.tensor(prepare.std).view(3, 1, 1)
    for source in (path, str(path), Image.fromarray(PIXELS), PIXELS, torch.from_numpy(PIXELS)):
        assert_close(prepare(source), want[None])
    assert prepare([path, PIXELS]).shape == (2, 3, 6, 8)
    assert_close(prepare.denormalize(prepare(path))[0], torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)


def test_size_is_height_then_width():
    assert Preprocessing(size=(3, 5))(PIXELS).shape == (1, 3, 3, 5)


def test_grey_and_transparent_images_become_rgb(tmp_path):
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
def test_wrong_images_are_refused(image, message):
    with pytest.raises(CalmError, match=message):
        Preprocessing()(image)


def test_a_page_named_jpg_is_named(tmp_path):
    (tmp_path / "x.jpg").write_text("<html>not found</html>")
    with pytest.raises(CalmError, match=r"x\.jpg: an HTML page"):
        Preprocessing()(tmp_path / "x.jpg")


def test_wrong_settings_are_refused():
    with pytest.raises(CalmError, match="size"):
        Preprocessing(size=(0, 5))
    with pytest.raises(CalmError, match="stds"):
        Preprocessing(std=(1.0, 0.0, 1.0))
