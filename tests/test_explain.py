"""``calm attribute``: what is written, what is said, and what happens to bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import calm.cli.attribute
from calm.cli.attribute import attribute_files, find_images
from calm.errors import CalmError
from calm.explain import Query, class_index, draw, explain, resolve_query
from calm.heatmaps import locate, resize_maps
from calm.images import Preprocessing
from calm.model import CalmHead, CalmModel, CamHead, ModelConfig
from calm.render import overlay

NAMES = ("001.Red_Finch", "002.Blue_Bunting", "003.Green_Finch", "004.Owl", "005.Auk", "006.[bold]Wren")


class Net(nn.Module):
    """16x16 pixels to a 4x4 grid."""

    out_channels = 3

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4)


def make(method: str) -> CalmModel:
    torch.manual_seed(0)
    head = CamHead(3, 6) if method == "cam" else CalmHead(3, 6)
    config = ModelConfig("custom", 6, method)  # type: ignore[arg-type]
    return CalmModel(config, Net(), head, class_names=NAMES, preprocessing=Preprocessing((16, 16))).eval()


@pytest.fixture(params=["calm-em", "cam"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CalmModel:
    made = make(request.param)
    monkeypatch.setattr(calm.cli.attribute, "_load", lambda source, device: made)
    return made


@pytest.fixture
def calm_model(monkeypatch: pytest.MonkeyPatch) -> CalmModel:
    made = make("calm-em")
    monkeypatch.setattr(calm.cli.attribute, "_load", lambda source, device: made)
    return made


def picture(path: Path, size: tuple[int, int] = (40, 24), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_files_hold_what_the_model_says(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = picture(tmp_path / "in" / "a.png"), tmp_path / "out"
    results = attribute_files([str(file)], model="m", out=out, grid=True)
    assert results == out / "results.json"
    with torch.no_grad():
        output = calm_model(calm_model.preprocess(file))
    best = int(output.probs.argmax())
    grid = output.joint[0, best]
    np.testing.assert_allclose(np.load(out / "a.joint.grid.npy"), grid, rtol=1e-6)
    values = np.load(out / "a.joint.npy")
    assert values.dtype == np.float32
    assert values.shape == (24, 40)
    np.testing.assert_allclose(values, resize_maps(grid, (24, 40)), rtol=1e-6)
    record = json.loads(results.read_text())["images"][0]
    assert record["grid_sum"] == pytest.approx(float(output.probs[0, best]), rel=1e-5)
    assert record["target"] == {
        "index": best, "name": NAMES[best], "probability": pytest.approx(record["grid_sum"], rel=1e-5)
    }  # fmt: skip
    assert [entry["index"] for entry in record["top"]] == output.probs[0].topk(5).indices.tolist()
    y, x = np.unravel_index(values.argmax(), values.shape)
    assert (record["place"]["x"], record["place"]["y"]) == (x, y)
    assert all((out / name).is_file() for name in record["files"].values())
    with Image.open(out / record["files"]["overlay"]) as overlay:
        assert overlay.size == (400, 240), "enlarged ten times, to 224 pixels or more"
    said = capsys.readouterr().out
    assert "a.png" in said
    assert f"{float(output.probs[0, best]):.3f}" in said
    assert record["place"]["words"] in said


def test_markup_in_names_is_printed_as_it_is(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = picture(tmp_path / "[red]a.png")
    attribute_files([str(file)], model="m", out=tmp_path / "out", target="5")
    said = capsys.readouterr().out
    assert "[bold]Wren" in said
    assert "[red]a.png" in said


@pytest.mark.parametrize("method", ["integrated-gradients", "gradcam"])
def test_baselines_write_the_same_files(method: str, model: CalmModel, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", method=method, target="owl", out=out)
    assert np.load(out / f"a.{method}.npy").shape == (24, 40)
    record = json.loads((out / "results.json").read_text())["images"][0]
    assert record["target"]["name"] == "004.Owl"


def test_versus_is_the_models_difference(model: CalmModel, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", target="Owl", versus="Auk", out=out)
    image = model.preprocess(file)
    expected = model.difference(image, torch.tensor([3]), torch.tensor([4]), size=(24, 40))[0]
    name = f"a.{model.map_kind()}-difference"
    np.testing.assert_allclose(np.load(out / f"{name}.npy"), expected, rtol=1e-5, atol=1e-7)
    assert (out / f"{name}.png").is_file()


def test_without_a_target_versus_is_asked_against_the_best_other_class(calm_model: CalmModel) -> None:
    pictures = [np.full((16, 16, 3), value, np.uint8) for value in (0, 128, 255)]
    with torch.no_grad():
        best = calm_model(calm_model.preprocess(pictures)).probs.topk(2).indices.tolist()
    for first, second in best:
        answers = explain(calm_model, pictures, Query("joint", versus=first))
        expected = [b if a == first else a for a, b in best]
        assert [answer.target for answer in answers] == expected
        assert second in expected
        assert all(float(answer.grid.sum()) > 0 for answer in answers)


def test_superclass_sums_its_classes(calm_model: CalmModel, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", superclass="red finch,green finch", out=out, grid=True)
    joint = calm_model(calm_model.preprocess(file)).joint[0].detach()
    np.testing.assert_allclose(np.load(out / "a.joint-superclass.grid.npy"), joint[0] + joint[2], rtol=1e-5)
    (record,) = json.loads((out / "results.json").read_text())["images"]
    assert [member["index"] for member in record["superclass"]] == [0, 2]


def test_pictures_of_any_size_share_a_batch(calm_model: CalmModel, tmp_path: Path) -> None:
    for i, size in enumerate([(40, 24), (17, 300), (16, 16)]):
        picture(tmp_path / "in" / f"{i}.png", size, seed=i)
    together, apart = tmp_path / "together", tmp_path / "apart"
    attribute_files([str(tmp_path / "in")], model="m", out=together)
    attribute_files([str(tmp_path / "in")], model="m", out=apart, batch_size=1)
    for i, shape in enumerate([(24, 40), (300, 17), (16, 16)]):
        one, other = (np.load(folder / f"{i}.joint.npy") for folder in (together, apart))
        assert one.shape == shape
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_bad_images_are_named_and_the_others_done(calm_model: CalmModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = [picture(folder / f"{name}.png", seed=ord(name)) for name in "ac"]
    (folder / "b.jpg").write_text("not an image")
    with pytest.raises(CalmError, match="2 of 4 images") as caught:
        attribute_files([str(folder), "nowhere.png"], model="m", out=tmp_path / "out")
    assert "b.jpg" in str(caught.value)
    assert "nowhere.png" in str(caught.value)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Path(entry["file"]) for entry in results["images"]] == good
    assert len(results["failed"]) == 2
    assert all((tmp_path / "out" / f"{name}.joint.npy").is_file() for name in "ac")


def test_an_input_is_never_overwritten(calm_model: CalmModel, tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png")
    second = picture(tmp_path / "a.joint.png", seed=1)
    before = second.read_bytes()
    with pytest.raises(CalmError, match="would overwrite the input"):
        attribute_files([str(first), str(second)], model="m", out=tmp_path)
    assert second.read_bytes() == before
    assert not (tmp_path / "a.joint.npy").exists()


def test_results_are_not_read_as_inputs(calm_model: CalmModel, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for _ in range(2):
        attribute_files([str(tmp_path)], model="m", out=tmp_path / "maps")
    results = json.loads((tmp_path / "maps" / "results.json").read_text())
    assert len(results["images"]) == 1


def test_images_are_found_once_and_named_apart(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "x" / "a.png"), picture(tmp_path / "y" / "A.jpg")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    found, missing = find_images(
        [str(one), str(tmp_path / "x"), str(tmp_path / "*" / "*.jpg"), str(tmp_path / "z*.png")],
        tmp_path / "out",
    )
    assert [entry.path for entry in found] == [one, two]
    assert [entry.name for entry in found] == ["a", "A-2"]
    assert missing == [str(tmp_path / "z*.png")]
    nested, _ = find_images([str(tmp_path)], tmp_path / "out")
    assert [entry.name for entry in nested] == ["x/a", "y/A"]
    with pytest.raises(CalmError, match=r"no image found in 'nothing.png'"):
        find_images(["nothing.png"], tmp_path)


def test_classes_are_found_by_name_and_index() -> None:
    model = make("cam")
    for text in ("1", "002.Blue_Bunting", "blue bunting", " Blue_Bunting "):
        assert class_index(model, text) == 1
    with pytest.raises(CalmError, match=r"close are '002.Blue_Bunting'"):
        class_index(model, "Blue Buntling")
    with pytest.raises(CalmError, match="0 to 5"):
        class_index(model, "6")


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
    ],
)
def test_questions_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        resolve_query(make("calm-em"), **options)


def test_mistakes_are_found_before_anything_is_written(calm_model: CalmModel, tmp_path: Path) -> None:
    file, out = picture(tmp_path / "a.png"), tmp_path / "out"
    for options in (
        {"target": "nobody"},
        {"batch_size": 0},
        {"method": "gradient", "grid": True},
        {"out": file},
    ):
        with pytest.raises(CalmError):
            attribute_files([str(file)], model="m", **{"out": out} | options)  # type: ignore[arg-type]
    assert not out.exists()


def test_an_unusable_device_is_named(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png")
    with pytest.raises(CalmError, match="device 'gpu'"):
        attribute_files([str(file)], model="m", device="gpu", out=tmp_path / "out")


def test_the_model_is_left_as_found(calm_model: CalmModel) -> None:
    calm_model.train()
    calm_model.backbone.eval()
    explain(calm_model, [np.zeros((16, 16, 3), np.uint8)], Query("joint"))
    assert calm_model.training
    assert not calm_model.backbone.training
    assert all(parameter.requires_grad for parameter in calm_model.parameters())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 3), (7, 100)])
def test_the_ninths_share_the_whole_map(height: int, width: int) -> None:
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


def test_a_map_without_positive_mass_has_no_share() -> None:
    assert locate(-torch.ones(4, 4)).share == 0


def test_the_ring_of_a_shrunk_overlay_lies_at_the_place() -> None:
    """Compared with the overlay of the same map without a ring."""
    model, picture = (
        make("calm-em"),
        np.random.default_rng(3).integers(0, 256, (2600, 3900, 3), dtype=np.uint8),
    )
    (answer,) = explain(model, [picture], Query("joint"))
    grid = torch.zeros(4, 4)
    grid[1, 2] = 1
    answer = replace(
        answer, grid=grid, signed=grid, places={answer.target: locate(resize_maps(grid, (2600, 3900)))}
    )
    drawn = draw(picture, answer, Query("joint"))
    assert drawn.shape[:2] == (1633, 2449)
    ringed = (drawn != overlay(picture, answer.grid, size=drawn.shape[:2])).any(axis=-1)
    y, x = (np.flatnonzero(ringed.any(axis=axis)) for axis in (1, 0))
    place = answer.places[answer.target]
    assert abs((y[0] + y[-1]) / 2 - place.y * 1633 / 2600) < 2
    assert abs((x[0] + x[-1]) / 2 - place.x * 2449 / 3900) < 2


def test_large_pictures_of_one_batch_are_explained_apart(
    calm_model: CalmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 2,880 bytes; a batch is full above the limit."""
    for i in range(5):
        picture(tmp_path / "in" / f"{i}.png", seed=i)
    batches: list[int] = []
    preprocess = calm_model.preprocess

    def counted(pictures: list[np.ndarray]) -> Tensor:
        batches.append(len(pictures))
        return preprocess(pictures)

    object.__setattr__(calm_model, "preprocess", counted)
    for limit, expected in ((10_000, [4, 1]), (4_000, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(calm.cli.attribute, "BATCH_BYTES", limit)
        batches.clear()
        results = attribute_files([str(tmp_path / "in")], model="m", out=tmp_path / "out")
        assert batches == expected
        assert len(json.loads(results.read_text())["images"]) == 5
