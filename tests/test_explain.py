"""Explanations of pictures: queries, batches, overlays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain_cases import make_model
from PIL import Image

import calm.explain
from calm import render
from calm.config import class_index
from calm.errors import CalmError
from calm.explain import Answer, Query, complete, draw, explain, overlay, resolve_query
from calm.heatmaps import locate, resize_maps
from calm.model import create_model


def test_explain_versus_without_target_takes_the_best_other_class() -> None:
    calm_model = make_model("calm-em")
    pictures = [np.full((16, 16, 3), value, np.uint8) for value in (0, 128, 255)]
    with torch.no_grad():
        best = calm_model(calm_model.preprocess(pictures)).probs.topk(2).indices.tolist()
    for first, second in best:
        answers = explain(calm_model, pictures, Query("joint", versus=first))
        expected = [b if a == first else a for a, b in best]
        assert [answer.target for answer in answers] == expected
        assert second in expected
        assert all(float(answer.grid.sum()) > 0 for answer in answers)


def test_class_index_takes_numbers_for_names_where_all_names_are_numbers() -> None:
    names = ["0", "1", "10", "11", "7"]
    model = create_model("tiny_resnet", len(names), class_names=names)
    assert [model.class_index(text) for text in ("10", "7", "1")] == [2, 4, 1]
    with pytest.raises(CalmError, match=r"no class '3': give one of the model's 5 names$"):
        model.class_index("3")


def test_class_index_asks_for_an_index_where_two_classes_have_a_name() -> None:
    with pytest.raises(CalmError, match="2 classes are called 'crane': give an index, 0 or 2"):
        class_index(["crane", "owl", "Crane"], "crane")


def test_class_index_takes_names_and_indices() -> None:
    model = make_model("cam")
    for text in ("1", "002.Blue_Bunting", "blue bunting", " Blue_Bunting "):
        assert model.class_index(text) == 1
    with pytest.raises(CalmError, match=r"close are '002.Blue_Bunting'"):
        model.class_index("Blue Buntling")
    with pytest.raises(CalmError, match="0 to 5"):
        model.class_index("6")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jont"}, "did you mean 'joint'"),
        ({"kind": "cam"}, "cannot be read from a CALM model"),
        ({"method": "cam"}, "cannot be read from a CALM model"),
        ({"method": "smothgrad"}, "did you mean 'smoothgrad'"),
        ({"kind": "posterior", "method": "gradient"}, "choose one"),
        ({"kind": "joint-superclass"}, "needs superclass"),
        ({"kind": "joint", "superclass": "0,1"}, "takes no superclass"),
        ({"superclass": "0,1", "versus": "2"}, "leave out superclass"),
        ({"superclass": "0,1", "target": "2"}, "leave out target"),
        ({"target": "Owl", "versus": "3"}, "the same class"),
        ({"versus": "Oxl"}, "no class 'Oxl'"),
        ({"kind": "evidence"}, "evidence compares two classes: give the other one as versus"),
        ({"signed": True}, "give the second as versus"),
        ({"prior_exponent": -1.0}, "prior_exponent is -1: give 0"),
        ({"method": "gradient", "prior_exponent": 0.5}, "gradient of this model reads no prior"),
    ],
)
def test_resolve_query_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        resolve_query(make_model("calm-em"), **options)


@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_explain_keeps_the_sign_of_evidence_and_places_the_target(method: str) -> None:
    model = make_model(method)
    pictures = [np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)]
    query = resolve_query(model, target="Owl", versus="Auk", kind="evidence")
    assert query.signed
    assert not resolve_query(model, target="Owl", versus="Auk").signed
    (answer,) = explain(model, pictures, query)
    with torch.no_grad():
        one, other = model(model.preprocess(pictures)).attribute([[3, 4]], "evidence")[0]
    torch.testing.assert_close(answer.grid, one - other)
    assert answer.places == {3: locate(resize_maps(one - other, (16, 16)))}
    (absolute,) = explain(model, pictures, replace(query, signed=False))
    torch.testing.assert_close(absolute.grid, (one - other).abs())
    plain = draw(pictures[0], answer, query)
    named = draw(pictures[0], answer, query, model.class_names)
    np.testing.assert_array_equal(named[: len(plain)], plain)
    bar = named[len(plain)]
    assert bar[0, 2] > bar[0, 0] + 60, "blue speaks for the other class, on the left"
    assert bar[-1, 0] > bar[-1, 2] + 60, "red for the target, on the right"
    assert (named[len(plain) + 12 :] < 100).any(), "with names below"


def of_map(grid: list[list[float]], *, method: str = "calm-em", label: str = "Owl", versus: str | None = None) -> Any:
    """A model, the explanation of a grey picture with a map of our own, and the query."""
    model, values = make_model(method), torch.tensor(grid)
    query = resolve_query(model, target=label, versus=versus)
    maps = torch.stack([values, values.flip(0)]) if versus else values[None]
    probs = torch.tensor([0.02, 0.7, 0.1, 0.1, 0.05, 0.03])
    classes = (query.target or 0, *([query.versus] if query.versus else []))
    answer = Answer(probs, (1, 2, 3), classes, maps, method != "cam")
    return model, complete(answer, (224, 224), query), query


def test_draw_shares_a_scale_of_multiples_of_uniform() -> None:
    """By hand: the peak is 1.5 times the mean of 0.05; colours end at 4 times, so that the peak is 0.375 of the way."""
    _, answer, query = of_map([[0.075, 0.025], [0.075, 0.025]])
    assert answer.uniform == pytest.approx(0.05)
    assert answer.peak == pytest.approx(1.5)
    assert answer.flat
    picture = np.full((224, 224, 3), 99, np.uint8)
    drawn = draw(picture, answer, query)
    expected = render.overlay(picture, torch.tensor([[0.375, 0.125]] * 2), how="clipping")
    far = slice(60, 200)  # from the ring, which is in the upper left corner
    np.testing.assert_allclose(drawn[far].astype(int), expected[far].astype(int), atol=1)
    _, sharp, query = of_map([[0.9, 0.0], [0.0, 0.0]], label="Auk")
    assert (sharp.peak, sharp.flat) == (pytest.approx(4), False)


def test_draw_stretches_maps_without_a_unit_and_calls_constant_ones_flat() -> None:
    _, answer, _ = of_map([[-2.0, 3.0], [0.0, 1.0]], method="cam")
    assert (answer.uniform, answer.peak, answer.flat) == (None, None, False)
    _, constant, _ = of_map([[3.0, 3.0], [3.0, 3.0]], method="cam")
    assert constant.flat


def test_complete_compares_a_difference_with_both_maps() -> None:
    """Two maps of .02 each, so .01 per cell if spread evenly; the difference of their cells is .014."""
    _, answer, _ = of_map([[0.015, 0.003], [0.001, 0.001]], versus="Auk")
    assert answer.uniform == pytest.approx(0.01)
    assert answer.peak == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("options", "label", "said"),
    [
        ({}, None, ["0", "4 x uniform", "1 = uniform", "p = 0.100  004.Owl  (joint)", "predicted: p = 0.700", "flat"]),
        ({"label": "blue bunting"}, 2, ["p = 0.700  002.Blue_Bunting  (joint)", "true class: p = 0.100  003.Green"]),
        (
            {"versus": "Auk"},
            1,
            ["blue: p = 0.050", "red: p = 0.100", "joint difference, ±4 x", "neither is likely; predicted: p = 0.7"],
        ),
        ({"method": "cam"}, None, ["0.003", "0.02", "(cam)"]),
    ],
)
def test_draw_says_class_probability_and_scale(
    options: dict[str, Any], label: int | None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, answer, query = of_map([[0.02, 0.01], [0.003, 0.02]], **options)
    texts: list[str] = []

    def legend(image: Any, low: str, high: str, *, colormap: str, mark: Any, notes: list[str]) -> Any:
        texts.extend([low, high, *notes, *(mark[1:] if mark else ())])
        return image

    monkeypatch.setattr(calm.explain, "add_legend", legend)
    draw(np.zeros((224, 224, 3), np.uint8), answer, query, model.class_names, label=label)
    for part in said:
        assert any(part in text for text in texts), (part, texts)
    assert any("true class" in text for text in texts) == (label == 2), "not where the prediction is right or none"


def test_draw_puts_no_legend_below_a_line() -> None:
    model, picture = make_model("calm-em"), np.zeros((400, 1, 3), np.uint8)
    (answer,) = explain(model, [picture], Query("joint"))
    assert draw(picture, answer, Query("joint"), model.class_names).shape == draw(picture, answer, Query("joint")).shape


def test_explain_reads_the_exponent_of_the_prior() -> None:
    model, pictures = make_model("calm-em"), [np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)]
    (answer,) = explain(model, pictures, resolve_query(model, target="Owl", prior_exponent=0.0))
    with torch.no_grad():
        output = model(model.preprocess(pictures))
    torch.testing.assert_close(answer.grid, output.conditional[0, 3] / 16)
    torch.testing.assert_close(answer.probs, output.probs[0])


def test_explain_restores_the_mode_of_the_model() -> None:
    calm_model = make_model("calm-em")
    calm_model.train()
    calm_model.backbone.eval()
    explain(calm_model, [np.zeros((16, 16, 3), np.uint8)], Query("joint"))
    assert calm_model.training
    assert not calm_model.backbone.training
    assert all(parameter.requires_grad for parameter in calm_model.parameters())


def test_draw_puts_the_ring_of_a_shrunk_overlay_at_the_place() -> None:
    """Compared with the overlay of the same map without a ring."""
    model, picture = (make_model("calm-em"), np.random.default_rng(3).integers(0, 256, (2600, 3900, 3), dtype=np.uint8))
    (answer,) = explain(model, [picture], Query("joint"))
    grid = torch.zeros(4, 4)
    grid[1, 2] = 1
    answer = replace(answer, grid=grid, signed=grid, places={answer.target: locate(resize_maps(grid, (2600, 3900)))})
    drawn = draw(picture, answer, Query("joint"))
    assert drawn.shape[:2] == (1633, 2449)
    ringed = (drawn != render.overlay(picture, answer.grid, size=drawn.shape[:2])).any(axis=-1)
    y, x = (np.flatnonzero(ringed.any(axis=axis)) for axis in (1, 0))
    place = answer.places[answer.target]
    assert abs((y[0] + y[-1]) / 2 - place.y * 1633 / 2600) < 2
    assert abs((x[0] + x[-1]) / 2 - place.x * 2449 / 3900) < 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 3), (7, 100)])
def test_locate_ninths_share_the_whole_map(height: int, width: int) -> None:
    mass = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    shares: dict[str, float] = {}
    for index in range(height * width):
        lifted = mass.clone()
        lifted.view(-1)[index] += 1e-6 + (mass.max() - mass.view(-1)[index])
        place = locate(lifted)
        assert (place.y, place.x) == divmod(index, width)
        shares[place.words] = float(mass[(torch.arange(height) * 3 // height) == (place.y * 3 // height)][
            :, (torch.arange(width) * 3 // width) == (place.x * 3 // width)
        ].sum() / mass.sum())  # fmt: skip
    assert sum(shares.values()) == pytest.approx(1)


def test_locate_gives_no_share_without_positive_mass() -> None:
    assert locate(-torch.ones(4, 4)).share == 0


def test_locate_area_is_the_share_of_a_uniform_map() -> None:
    values = torch.ones(7, 9, dtype=torch.float64)
    values[6, 8] += 1e-9
    place = locate(values)
    assert place.area == 2 * 3 / 63  # rows 5 and 6 are the last third of 7
    assert place.share == pytest.approx(place.area)


def test_overlay_takes_files_pictures_arrays_and_floats(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grid = torch.rand(3, 5) - 0.5
    floats = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for signed, colormap in ((False, "heat"), (True, "signed")):
        want = render.overlay(pixels, grid, colormap=colormap, alpha=0.5)
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, floats):
            drawn = overlay(image, grid, signed=signed, alpha=0.5)
            assert (np.asarray(drawn) == want).all()
    assert overlay(pixels, grid.numpy()).size == (40, 24)


def test_overlay_says_how_to_draw_a_model_input() -> None:
    model = make_model("cam")
    images = model.preprocessing.normalize(torch.rand(1, 3, 8, 8))
    with pytest.raises(CalmError, match=r"got \(3, 8, 8\) with values from -.*denormalize"):
        overlay(images[0], torch.rand(2, 2))
    overlay(model.preprocessing.denormalize(images)[0], torch.rand(2, 2))
