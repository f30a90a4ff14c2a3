"""``calm attribute``: what is written, what is printed, and what happens to bad input."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from explain_cases import NAMES, make_model, write_picture
from PIL import Image
from torch import Tensor

import calm.cli.attribute
from calm.cli.attribute import attribute_files, find_images
from calm.config import Precision
from calm.errors import CalmError
from calm.heatmaps import resize_maps
from calm.images import Preprocessing
from calm.model import CalmModel, create_model


@pytest.fixture(params=["calm-em", "cam"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CalmModel:
    made = make_model(request.param)
    monkeypatch.setattr(calm.cli.attribute, "_load", lambda source, device: made)
    return made


@pytest.fixture
def calm_model(monkeypatch: pytest.MonkeyPatch) -> CalmModel:
    made = make_model("calm-em")
    monkeypatch.setattr(calm.cli.attribute, "_load", lambda source, device: made)
    return made


def test_attribute_files_writes_what_the_model_computes(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_picture(tmp_path / "in" / "a.png"), tmp_path / "out"
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
        assert overlay.width == 400, "enlarged ten times, to 224 pixels or more"
        assert 240 < overlay.height < 340, "with a legend below"
    attribute_files([str(file)], model="m", out=tmp_path / "plain", plain=True)
    with Image.open(tmp_path / "plain" / "a.joint.png") as overlay:
        assert overlay.size == (400, 240)
    said = capsys.readouterr().out
    assert "a.png" in said
    assert f"{float(output.probs[0, best]):.3f}" in said
    assert record["place"]["words"] in said
    assert "Note" not in said
    assert f"{record['place']['share']:.0%} (uniform: {record['place']['area']:.0%})" in said
    calm_model.training_summary["posterior_entropy_relative"] = 0.99
    flat = attribute_files([str(file)], model="m", out=tmp_path / "flat")
    assert f"Note of this model: {calm_model.caution}" in capsys.readouterr().out
    assert json.loads(flat.read_text())["caution"] == calm_model.caution


def test_attribute_files_prints_markup_in_names_as_it_is(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_picture(tmp_path / "[red]a.png")
    attribute_files([str(file)], model="m", out=tmp_path / "out", target="5")
    said = capsys.readouterr().out
    assert "[bold]Wren" in said
    assert "[red]a.png" in said


@pytest.mark.parametrize("method", ["integrated-gradients", "gradcam"])
def test_attribute_files_writes_the_same_files_for_baselines(method: str, model: CalmModel, tmp_path: Path) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", method=method, target="owl", out=out)
    assert np.load(out / f"a.{method}.npy").shape == (24, 40)
    record = json.loads((out / "results.json").read_text())["images"][0]
    assert record["target"]["name"] == "004.Owl"


def test_attribute_files_versus_is_the_difference_of_the_model(model: CalmModel, tmp_path: Path) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", target="Owl", versus="Auk", out=out)
    image = model.preprocess(file)
    expected = model.difference(image, torch.tensor([3]), torch.tensor([4]), size=(24, 40))[0]
    name = f"a.{model.map_kind()}-difference"
    np.testing.assert_allclose(np.load(out / f"{name}.npy"), expected, rtol=1e-5, atol=1e-7)
    assert (out / f"{name}.png").is_file()


def test_attribute_files_writes_signed_evidence(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    options = {"kind": "evidence", "prior_exponent": 0.5}
    attribute_files([str(file)], model="m", target="Owl", versus="Auk", out=out, grid=True, **options)  # type: ignore[arg-type]
    output = calm_model(calm_model.preprocess(file))
    one, other = output.attribute([[3, 4]], "evidence", prior_exponent=0.5)[0].detach()
    np.testing.assert_allclose(np.load(out / "a.evidence-signed-difference.grid.npy"), one - other, rtol=1e-5)
    results = json.loads((out / "results.json").read_text())
    assert (results["signed"], results["prior_exponent"]) == (True, 0.5)
    assert f"expected log-odds {float((one - other).sum()):+.2f} nats" in capsys.readouterr().out
    attribute_files([str(file)], model="m", target="Owl", versus="Auk", out=out, signed=False, **options)  # type: ignore[arg-type]
    assert np.load(out / "a.evidence-difference.npy").min() >= 0


def test_attribute_files_superclass_sums_its_classes(calm_model: CalmModel, tmp_path: Path) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    attribute_files([str(file)], model="m", superclass="red finch,green finch", out=out, grid=True)
    joint = calm_model(calm_model.preprocess(file)).joint[0].detach()
    np.testing.assert_allclose(np.load(out / "a.joint-superclass.grid.npy"), joint[0] + joint[2], rtol=1e-5)
    (record,) = json.loads((out / "results.json").read_text())["images"]
    assert [member["index"] for member in record["superclass"]] == [0, 2]


def test_attribute_files_writes_a_gallery(
    calm_model: CalmModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of files and classes cannot end the page's data, and the page's links are those of the results."""
    calm_model.class_names = (*NAMES[:5], "</script><b>Wren")
    folder = tmp_path / "in" / NAMES[3]
    for i, name in enumerate(["a", "b <i>&'"]):
        write_picture(folder / f"{name}.png", (40, 24), seed=i)
    write_picture(tmp_path / "in" / "elsewhere" / "c.png", (20, 60), seed=5)
    out = tmp_path / "out"
    for number in ("", "-2"):
        results = attribute_files([str(tmp_path / "in")], model="m", out=out, html=True)
        assert results.name == f"results{number}.json"
        assert f"open {out / f'gallery{number}.html'} in a browser" in capsys.readouterr().out
    records = json.loads((out / "results.json").read_text())["images"]
    assert [record["label"] and record["label"]["index"] for record in records] == [3, 3, None]
    page = (out / "gallery.html").read_text()
    data = {}
    for name in ("names", "rows"):
        text = page.split(f'<script type="application/json" id="{name}">')[1].split("</script>")[0]
        assert "<" not in text
        data[name] = json.loads(text)
    assert data["names"] == list(calm_model.class_names)
    assert [row["large"] for row in data["rows"]] == [record["files"]["overlay"] for record in records]
    for row, record in zip(data["rows"], records, strict=True):
        assert row["file"] == record["file"]
        assert row["top"][0] == [record["top"][0]["index"], round(record["top"][0]["probability"], 4)]
        assert row["flat"] == record["flat"] == (record["peak_over_uniform"] < 2)
        with Image.open(out / row["small"]) as both, Image.open(record["file"]) as picture:
            assert max(both.width // 2, both.height) == 224, "enlarged to it: the picture and its map, side by side"
            assert both.width / 2 / both.height == pytest.approx(picture.width / picture.height, abs=0.01)
            halves = np.asarray(both.convert("RGB"), dtype=float).reshape(both.height, 2, -1)
        assert np.abs(halves[:, 0] - halves[:, 1]).mean() > 5


def test_the_gallery_sorts_filters_and_takes_keys(calm_model: CalmModel, tmp_path: Path) -> None:
    """In a browser, if there is one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs the browser chromium")
    for i in range(7):
        write_picture(tmp_path / "in" / NAMES[i % 2] / f"{i} #%.png", (40, 24), seed=i)
    attribute_files([str(tmp_path / "in")], model="m", out=tmp_path / "out", html=True)
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    sure = [Path(r["file"]).name for r in sorted(records, key=lambda r: -r["top"][0]["probability"])]
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        problems: list[object] = []
        page.on("pageerror", lambda error: problems.append(error))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto((tmp_path / "out" / "gallery.html").as_uri(), wait_until="networkidle")
        names = page.locator(".shot .name")
        assert names.all_inner_texts() == [Path(record["file"]).name for record in records]
        page.select_option("#sort", "sure")
        assert names.all_inner_texts() == sure
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.blur()")
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        assert page.inner_text("#file").endswith(sure[1])
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#file").endswith(sure[2])
        assert page.evaluate("document.getElementById('large').decode().then(() => true)")
        page.keyboard.press("Escape")
        assert not page.locator("dialog").is_visible()
        page.check("#wrong")
        mistakes = {Path(r["file"]).name for r in records if r["label"]["index"] != r["top"][0]["index"]}
        assert set(names.all_inner_texts()) == mistakes
        page.fill("#name", "no such file")
        assert names.count() == 0
        assert not problems
        browser.close()


def test_attribute_files_batches_pictures_of_any_size(calm_model: CalmModel, tmp_path: Path) -> None:
    for i, size in enumerate([(40, 24), (17, 300), (16, 16)]):
        write_picture(tmp_path / "in" / f"{i}.png", size, seed=i)
    together, apart = tmp_path / "together", tmp_path / "apart"
    attribute_files([str(tmp_path / "in")], model="m", out=together)
    attribute_files([str(tmp_path / "in")], model="m", out=apart, batch_size=1)
    for i, shape in enumerate([(24, 40), (300, 17), (16, 16)]):
        one, other = (np.load(folder / f"{i}.joint.npy") for folder in (together, apart))
        assert one.shape == shape
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_attribute_files_runs_parts_of_a_batch_in_several_threads(
    calm_model: CalmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        write_picture(tmp_path / "in" / f"{i}.png", seed=i)
    calls: list[tuple[int, bool]] = []
    main = threading.current_thread()
    calm_model.backbone.register_forward_pre_hook(
        lambda _, inputs: calls.append((len(inputs[0]), threading.current_thread() is main))
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    folders = {method: tmp_path / method for method in ("joint", "gradcam", "own")}
    attribute_files([str(tmp_path / "in")], model="m", out=folders["joint"], batch_size=6)
    assert [number for number, alone in calls if not alone] == [2] * 5
    for method in ("gradcam", "own"):  # hooks and the user's own code are not for several threads
        calls.clear()
        if method == "own":
            monkeypatch.setattr(calm_model, "config", replace(calm_model.config, backbone="package.module:function"))
        kind = {"method": "gradcam"} if method == "gradcam" else {}
        attribute_files([str(tmp_path / "in")], model="m", out=folders[method], batch_size=6, **kind)
        assert calls
        assert all(alone for _, alone in calls)
    for i in range(10):
        one, other = (np.load(folders[name] / f"{i}.joint.npy") for name in ("joint", "own"))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_attribute_files_names_bad_images_and_explains_the_others(calm_model: CalmModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    good = [write_picture(folder / f"{name}.png", seed=ord(name)) for name in "ac"]
    (folder / "b.jpg").write_text("not an image")
    with pytest.raises(CalmError, match="2 of 4 images") as caught:
        attribute_files([str(folder), "nowhere.png"], model="m", out=tmp_path / "out")
    assert "b.jpg" in str(caught.value)
    assert "nowhere.png" in str(caught.value)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Path(entry["file"]) for entry in results["images"]] == good
    assert len(results["failed"]) == 2
    assert all((tmp_path / "out" / f"{name}.joint.npy").is_file() for name in "ac")


def test_attribute_files_never_overwrites_an_input(calm_model: CalmModel, tmp_path: Path) -> None:
    first = write_picture(tmp_path / "a.png")
    second = write_picture(tmp_path / "a.joint.png", seed=1)
    before = second.read_bytes()
    with pytest.raises(CalmError, match="would overwrite the input"):
        attribute_files([str(first), str(second)], model="m", out=tmp_path, overwrite=True)
    assert second.read_bytes() == before
    assert not (tmp_path / "a.joint.npy").exists()


def test_attribute_files_numbers_results_of_equal_names(calm_model: CalmModel, tmp_path: Path) -> None:
    one, two = write_picture(tmp_path / "x" / "a.png"), write_picture(tmp_path / "y" / "A.jpg", seed=1)
    out = tmp_path / "out"
    attribute_files([str(one), str(two)], model="m", out=out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(first) == {"a.joint.png", "a.joint.npy", "A-2.joint.png", "A-2.joint.npy", "results.json"}
    again = attribute_files([str(two)], model="m", out=out)
    assert again == out / "results-2.json"
    (record,) = json.loads(again.read_text())["images"]
    assert record["files"] == {"overlay": "A.joint.png", "map": "A.joint.npy"}
    attribute_files([str(two)], model="m", out=out)
    assert (out / "A-3.joint.png").is_file()
    assert {name: (out / name).read_bytes() for name in first} == first


def test_attribute_files_overwrites_earlier_results_if_asked(calm_model: CalmModel, tmp_path: Path) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    for _ in range(2):
        attribute_files([str(file)], model="m", out=out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"a.joint.png", "a.joint.npy", "results.json"}


def test_attribute_files_does_not_read_its_results(calm_model: CalmModel, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    for _ in range(2):
        attribute_files([str(tmp_path)], model="m", out=tmp_path / "maps")
    results = json.loads((tmp_path / "maps" / "results-2.json").read_text())
    assert len(results["images"]) == 1


def test_find_images_follows_linked_folders_but_not_in_a_circle(tmp_path: Path) -> None:
    write_picture(tmp_path / "x" / "a.png")
    write_picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "x" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "x")
    found, _ = find_images([str(tmp_path / "x")], tmp_path / "out")
    assert [*found.values()] == ["a", "more/b"]


def test_find_images_finds_each_once(tmp_path: Path) -> None:
    one, two = write_picture(tmp_path / "x" / "a.png"), write_picture(tmp_path / "y" / "A.jpg")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    for hidden in ("._a.png", "@eaDir/a.png"):  # of a Mac and of a file server
        write_picture(tmp_path / "x" / hidden)
    found, missing = find_images(
        [str(one), str(tmp_path / "x"), str(tmp_path / "*" / "*.jpg"), str(tmp_path / "z*.png")], tmp_path / "out"
    )
    assert found == {one: "a", two: "A"}
    assert missing == [str(tmp_path / "z*.png")]
    nested, _ = find_images([str(tmp_path)], tmp_path / "out")
    assert [*nested.values()] == ["x/a", "y/A"]
    with pytest.raises(CalmError, match=r"no image found in 'nothing.png': give image files"):
        find_images(["nothing.png"], tmp_path)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.heic").touch()
    with pytest.raises(CalmError, match=r"no image found in '.*phone': files are read that end in .*\.jpg"):
        find_images([str(tmp_path / "phone")], tmp_path)


def test_attribute_files_finds_mistakes_before_writing(calm_model: CalmModel, tmp_path: Path) -> None:
    file, out = write_picture(tmp_path / "a.png"), tmp_path / "out"
    for options in ({"target": "nobody"}, {"batch_size": 0}, {"method": "gradient", "grid": True}, {"out": file}):
        with pytest.raises(CalmError):
            attribute_files([str(file)], model="m", **{"out": out} | options)  # type: ignore[arg-type]
    assert not out.exists()


def test_attribute_files_names_an_unusable_device(tmp_path: Path) -> None:
    file = write_picture(tmp_path / "a.png")
    with pytest.raises(CalmError, match="device 'gpu'"):
        attribute_files([str(file)], model="m", device="gpu", out=tmp_path / "out")


def test_attribute_files_splits_batches_of_large_pictures(
    calm_model: CalmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 2,880 bytes; a batch is full above the limit."""
    for i in range(5):
        write_picture(tmp_path / "in" / f"{i}.png", seed=i)
    batches: list[int] = []
    calm_model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    for limit, expected in ((10_000, [4, 1]), (4_000, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(calm.cli.attribute, "BATCH_BYTES", limit)
        batches.clear()
        results = attribute_files([str(tmp_path / "in")], model="m", out=tmp_path / "out")
        assert batches == expected
        assert len(json.loads(results.read_text())["images"]) == 5


def test_attribute_files_keeps_what_was_finished_when_the_disk_is_full(
    calm_model: CalmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(40):
        write_picture(tmp_path / "in" / f"{i:02}.png", seed=i)
    write = calm.cli.attribute.write_bytes

    def full(path: Path, data: memoryview) -> None:
        if path.name == "05.joint.npy":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(calm.cli.attribute, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        attribute_files([str(tmp_path / "in")], model="m", out=tmp_path / "out", batch_size=4)
    assert [line for line in capsys.readouterr().out.split() if line.endswith(".png")] == [
        str(tmp_path / "in" / f"{i:02}.png") for i in range(5)
    ]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{i:02}.joint.{kind}" for i in range(5) for kind in ("png", "npy")} <= written
    assert len(written) < 80, "what had not begun is left"
    assert not any("writing" in name for name in written)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_attribute_files_of_many_pictures_uses_the_optimised_model(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("tiny_resnet", 7, preprocessing=Preprocessing((32, 32)))
    model.eval().backbone.apply(lambda part: getattr(part, "running_mean", torch.zeros(1)).normal_(0, 0.1))
    monkeypatch.setattr(calm.cli.attribute, "_load", lambda source, device: model)
    files = [write_picture(tmp_path / "in" / f"{i}.png", seed=i) for i in range(5)]
    called: list[CalmModel] = []
    encode = CalmModel.encode

    def spied(self: CalmModel, images: Tensor) -> Tensor:
        called.append(self)
        return encode(self, images)

    monkeypatch.setattr(CalmModel, "encode", spied)
    out = tmp_path / "out"
    results = attribute_files([str(tmp_path / "in")], model="m", out=out, batch_size=2, precision=precision)
    assert called
    assert model not in called
    with torch.no_grad():
        output = model(model.preprocess(files))
    grids = [resize_maps(grid, (24, 40)) for grid in output.attribute(output.probs.argmax(dim=1))]
    half = precision == "bf16-mixed"
    for i, grid in enumerate(grids):
        written = torch.from_numpy(np.load(out / f"{i}.joint.npy"))
        torch.testing.assert_close(written, grid, rtol=0.2 if half else 1e-4, atol=1e-3 if half else 1e-6)
        assert bool((written != grid).any()) or not half
    assert json.loads(results.read_text()).get("precision") == ("bf16-mixed" if half else None)
