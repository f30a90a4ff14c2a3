"""Pictures of maps: exact values of colours, overlays, outlines and panels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

import calm.render
from calm.errors import CalmError
from calm.render import (
    Colormap,
    Tile,
    add_legend,
    colorize,
    draw_boxes,
    draw_contour,
    draw_peak,
    draw_point,
    encode_png,
    overlay,
    panel,
    resize_picture,
    table,
)

GREY = np.full((6, 8, 3), 100, np.uint8)


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* from sRGB, from its own definition."""
    rgb = colours / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def test_table_heat_only_gets_lighter() -> None:
    steps = np.diff(lightness(table("heat").astype(float)))
    assert steps.min() > -0.25  # rounding to 8 bits
    assert lightness(table("heat")[[0, -1]].astype(float)) == pytest.approx([9, 96], abs=4)


def test_table_signed_is_lightest_in_the_middle_and_equally_dark_at_the_ends() -> None:
    light = lightness(table("signed").astype(float))
    assert abs(int(light.argmax()) - 127.5) <= 2
    assert abs(light[0] - light[-1]) < 5
    assert table("signed")[127].std() < 5  # neutral
    assert table("signed")[0].argmax() == 2, "the negative end is blue"
    assert table("signed")[-1].argmax() == 0, "the positive end is red"


def test_colorize_takes_the_nearest_end_outside_and_zero_for_nan() -> None:
    values = np.array([-3, 0, 1, 9, np.nan])
    assert (colorize(values) == table("heat")[[0, 0, 255, 255, 0]]).all()
    assert (colorize(np.array([-1, 1, -7, np.nan]), "signed") == table("signed")[[0, 255, 0, 128]]).all()


def test_table_cannot_be_changed_by_its_users() -> None:
    with pytest.raises(ValueError, match="read-only"):
        table("heat")[0] = 0


@pytest.mark.parametrize("colormap", ["heat", "signed"])
def test_overlay_computed_in_parts_is_the_same(colormap: Colormap, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    picture, values = generator.integers(0, 256, (23, 37, 3), dtype=np.uint8), generator.normal(size=(4, 5))
    whole = overlay(picture, values, colormap=colormap)
    before = picture.copy()
    monkeypatch.setattr(calm.render, "PIXELS_AT_ONCE", 100)
    assert (overlay(picture, values, colormap=colormap) == whole).all()
    assert (picture == before).all()


def test_overlay_mixes_as_documented() -> None:
    values = torch.zeros(6, 8)
    values[2, 3], values[4, 4] = 4.0, 1.0
    drawn = overlay(GREY, values, alpha=0.8)
    assert (drawn[0, 0] == 100).all(), "no evidence: the grey picture as it was"
    peak, quarter = table("heat")[255].astype(float), table("heat")[64].astype(float)
    np.testing.assert_allclose(drawn[2, 3], 0.2 * 100 + 0.8 * peak, atol=1)
    np.testing.assert_allclose(drawn[4, 4], 0.6 * 100 + 0.4 * quarter, atol=1)


def test_overlay_of_a_signed_map_leaves_zero_clear_and_keeps_signs() -> None:
    values = np.zeros((6, 8))
    values[1, 1], values[3, 3] = -2.0, 1.0
    drawn = overlay(GREY, values, colormap="signed", alpha=1.0).astype(int)
    assert (drawn[5, 7] == 100).all()
    assert (drawn[1, 1] == table("signed")[0]).all()
    assert drawn[1, 1, 2] > drawn[1, 1, 0]
    assert drawn[3, 3, 0] > drawn[3, 3, 2]


@pytest.mark.parametrize("empty", [torch.zeros(3, 4), torch.full((3, 4), torch.nan), -torch.rand(3, 4)])
@pytest.mark.parametrize("colormap", ["heat", "signed"])
def test_overlay_of_a_map_without_evidence_draws_nothing(empty: torch.Tensor, colormap: str) -> None:
    if colormap == "signed" and bool((empty < 0).any()):
        return
    assert (overlay(GREY, empty, colormap=colormap) == 100).all()  # type: ignore[arg-type]


def test_overlay_enlarges_picture_and_map() -> None:
    drawn = overlay(GREY, torch.rand(2, 2), size=(30, 20))
    assert drawn.shape == (30, 20, 3)
    assert drawn.dtype == np.uint8


def test_overlay_refuses_what_is_no_picture_or_map() -> None:
    for image, values, alpha, message in [
        (GREY.astype(float), torch.rand(2, 2), 0.5, "uint8 RGB"),
        (GREY[..., 0], torch.rand(2, 2), 0.5, "uint8 RGB"),
        (GREY, torch.rand(1, 2, 2), 0.5, r"shape \(h, w\)"),
        (GREY, torch.rand(2, 2), 1.5, "between 0 and 1"),
    ]:
        with pytest.raises(CalmError, match=message):
            overlay(image, values, alpha=alpha)
    with pytest.raises(CalmError, match="did you mean 'signed'"):
        overlay(GREY, torch.rand(2, 2), colormap="signd")  # type: ignore[arg-type]


def test_draw_boxes_paints_their_inclusive_corners() -> None:
    drawn = draw_boxes(GREY, [(1, 2, 6, 4)], colour=(255, 0, 0))
    painted = (drawn == (255, 0, 0)).all(axis=2)
    expected = np.zeros((6, 8), bool)
    expected[2:5, 1:7] = True
    expected[3, 2:6] = False
    assert (painted == expected).all()
    assert (GREY == 100).all(), "the picture given is not drawn on"


def test_draw_contour_runs_around_the_mask() -> None:
    picture = np.full((40, 40, 3), 100, np.uint8)
    mask = np.zeros((40, 40))
    mask[10:30, 10:30] = 1
    drawn = draw_contour(picture, mask, 0.5, colour=(0, 255, 0))
    bright = drawn[..., 1] > 180
    assert bright[10, 10:30].all()
    assert bright[10:30, 29].all()
    assert not bright[14:26, 14:26].any()
    assert (drawn[:7] == 100).all()
    assert (picture == 100).all()


def test_draw_point_draws_a_ring_around_it() -> None:
    drawn = draw_point(np.full((30, 30, 3), 100, np.uint8), 15, 12, radius=6)
    changed = (drawn != 100).any(axis=2)
    ys, xs = np.nonzero(changed)
    assert (xs.min() + xs.max()) / 2 == 15
    assert (ys.min() + ys.max()) / 2 == 12
    assert not changed[12, 15]


def test_draw_peak_draws_a_ring_around_the_highest_value() -> None:
    picture, values = np.full((96, 48, 3), 100, np.uint8), torch.zeros(12, 6)
    values[9, 2] = 1e-6  # a cell of 8 pixels: its middle is at (20, 76)
    changed = (draw_peak(picture, values) != picture).any(axis=2)
    ys, xs = np.nonzero(changed)
    assert abs((xs.min() + xs.max()) / 2 - 19.5) <= 1
    assert abs((ys.min() + ys.max()) / 2 - 75.5) <= 1
    assert not changed[76, 20]
    assert (picture == 100).all()


@pytest.mark.parametrize("values", [torch.ones(3, 3), torch.full((3, 3), torch.nan)])
def test_draw_peak_draws_nothing_where_no_place_is_the_highest(values: torch.Tensor) -> None:
    assert (draw_peak(GREY, values) == GREY).all()


def test_panel_puts_each_picture_in_its_cell() -> None:
    red, blue = (np.full((10, 10, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    drawn = panel([[Tile(red), None], [None, Tile(blue)]], cell=20, gap=5)
    assert drawn.shape == (5 + 2 * 25, 5 + 2 * 25, 3)
    assert (drawn[5:25, 5:25] == (255, 0, 0)).all()
    assert (drawn[30:50, 30:50] == (0, 0, 255)).all()
    rest = drawn.copy()
    rest[5:25, 5:25] = rest[30:50, 30:50] = 255
    assert (rest == 255).all()


def test_panel_keeps_proportions_and_finds_room_for_words() -> None:
    wide = Tile(np.zeros((10, 20, 3), np.uint8), caption="a caption\nsecond line", frame=(255, 0, 0))
    bare = panel([[Tile(wide.image)] * 2], cell=100, gap=10)
    assert bare.shape == (10 + 50 + 10, 10 + 2 * 110, 3)
    full = panel([[wide] * 2], cell=100, gap=10, title="Title", columns=["A", "B"], labels=["row"])
    assert full.shape[0] > bare.shape[0] + 50
    assert full.shape[1] > bare.shape[1]
    black = (full == 0).all(axis=2)
    assert black.sum() == 2 * 50 * 100
    assert (full == (255, 0, 0)).all(axis=2).any()


def test_overlay_with_a_top_shares_a_scale() -> None:
    values = torch.tensor([[0.0, 0.5], [0.25, 2.0]])
    np.testing.assert_array_equal(overlay(GREY, values, top=1.0), overlay(GREY, values.clamp(max=1), how="clipping"))
    signed = torch.tensor([[0.0, -0.5], [0.25, 2.0]])
    expected = overlay(GREY, torch.tensor([[0.0, -0.5], [0.25, 1.0]]), colormap="signed")
    np.testing.assert_array_equal(overlay(GREY, signed, top=1.0, colormap="signed"), expected)
    none = overlay(GREY, torch.full((2, 2), torch.nan), top=1.0)
    np.testing.assert_array_equal(none, overlay(GREY, torch.zeros(2, 2)))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(CalmError, match="top is a finite value above 0"):
            overlay(GREY, values, top=wrong)


@pytest.mark.parametrize(("high", "lines"), [("4 x", 3), ("4" * 60, 4)])
def test_add_legend_has_a_bar_a_mark_and_lines(high: str, lines: int) -> None:
    picture = np.full((50, 264, 3), 7, np.uint8)
    drawn = add_legend(picture, "0", high, colormap="heat", mark=(0.5, "one"), notes=["first", "second " * 99])
    np.testing.assert_array_equal(drawn[:50], picture)
    assert len(drawn) == 50 + 5 + lines * 16, "sizes of a font of 11 pixels"
    assert (drawn[50:55, [0, 263]] == table("heat")[[0, 255]]).all()
    assert (drawn[50:55, 131] == 255).all(), "the mark"
    text = drawn[55:].reshape(lines, 16, 264, 3)
    assert (text.min(axis=(1, 2, 3)) < 150).all(), "every line has text"
    if lines == 3:
        assert text[0, :, 120:144].min() < 100, "that of the mark"
    assert (drawn[55:, 262:] == 255).all(), "long text is cut"


def test_panel_cuts_long_words_to_their_cell() -> None:
    tile = Tile(np.zeros((10, 10, 3), np.uint8), caption="x" * 500)
    drawn = panel([[tile, None]], cell=60, gap=10)
    assert (drawn[:, 75:] == 255).all()


def test_panel_needs_a_cell() -> None:
    for rows in ([], [[]]):
        with pytest.raises(CalmError, match="at least one"):
            panel(rows)


def test_resize_picture_does_not_touch_one_of_the_right_size() -> None:
    assert resize_picture(GREY, (6, 8)) is GREY


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_encode_png_keeps_every_pixel(picture: NDArray[np.uint8]) -> None:
    with Image.open(io.BytesIO(encode_png(picture))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), picture)


def test_encode_png_takes_pictures_of_any_layout_and_no_grey_ones() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 30, 20), np.uint8).T[::2, ::-1]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)
    with pytest.raises(CalmError, match="uint8 RGB"):
        encode_png(picture[..., :1])
