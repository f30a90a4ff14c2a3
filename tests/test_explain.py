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

from calm import render
from calm.errors import CalmError
from calm.explain import Query, draw, explain, overlay, resolve_query
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
