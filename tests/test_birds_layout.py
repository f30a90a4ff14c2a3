"""The folder that write_birds makes: CUB_200_2011's layout to the letter, complete or recognisably not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from calm.errors import CalmError
from calm_birds import BirdsSummary, write_birds
from calm_birds.attributes import ATTRIBUTES, PARTS

SMALL: dict[str, Any] = {"species": 5, "images_per_species": 4, "size": 64, "seed": 3, "test_fraction": 0.25}


def rows(path: Path) -> list[list[str]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [line.split(" ") for line in text.splitlines()]


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> BirdsSummary:
    return write_birds(tmp_path_factory.mktemp("birds") / "CUB", **SMALL, workers=1)


def test_the_summary_says_what_is_there(birds: BirdsSummary) -> None:
    assert (birds.train_images, birds.test_images, birds.reused) == (15, 5, False)
    assert birds.pairs == (4, 4, 2)
    assert "5 species, 15 training and 5 test images of 64x64" in str(birds)


def test_ids_run_from_one_and_every_list_names_every_image(birds: BirdsSummary) -> None:
    ids = [str(number) for number in range(1, 21)]
    for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes"):
        assert [row[0] for row in rows(birds.root / f"{name}.txt")] == ids, name
    classes = rows(birds.root / "classes.txt")
    assert [row[0] for row in classes] == ["1", "2", "3", "4", "5"]
    assert all(re.fullmatch(rf"{int(number):03d}\.[A-Z][A-Za-z_]+", name) for number, name in classes)
    assert [name[4:] for _, name in classes] == list(birds.class_names)
    for (_, image), (_, label) in zip(
        rows(birds.root / "images.txt"), rows(birds.root / "image_class_labels.txt"), strict=True
    ):
        folder, file = image.split("/")
        assert folder == classes[int(label) - 1][1]
        assert re.fullmatch(rf"{folder[4:]}_\d{{4}}_\d+\.jpg", file)


def test_each_species_has_its_share_of_test_images(birds: BirdsSummary) -> None:
    labels = [int(row[1]) for row in rows(birds.root / "image_class_labels.txt")]
    train = [int(row[1]) for row in rows(birds.root / "train_test_split.txt")]
    for label in range(1, 6):
        assert sorted(t for t, y in zip(train, labels, strict=True) if y == label) == [0, 1, 1, 1]


def test_boxes_are_the_extents_of_the_segmentations(birds: BirdsSummary) -> None:
    for (_, image), box in zip(rows(birds.root / "images.txt"), rows(birds.root / "bounding_boxes.txt"), strict=True):
        assert all(re.fullmatch(r"\d+\.0", value) for value in box[1:])
        picture = read(birds.root / "images" / image)
        mask = read(birds.root / "segmentations" / image.replace(".jpg", ".png"))
        assert picture.shape == (64, 64, 3)
        assert mask.shape == (64, 64)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        y, x = np.nonzero(mask)
        assert [float(value) for value in box[1:]] == [x.min(), y.min(), np.ptp(x), np.ptp(y)]


def test_part_locations_are_in_order_and_inside_the_segmentation(birds: BirdsSummary) -> None:
    parts = (birds.root / "parts" / "parts.txt").read_text().splitlines()
    assert parts == [f"{number} {name}" for number, name in enumerate(PARTS, 1)]
    locations = rows(birds.root / "parts" / "part_locs.txt")
    assert [row[:2] for row in locations] == [[str(i), str(p)] for i in range(1, 21) for p in range(1, 16)]
    images = dict(rows(birds.root / "images.txt"))
    for image, _, x, y, seen in locations:
        if seen == "0":
            assert (x, y) == ("0.0", "0.0")
            continue
        mask = read(birds.root / "segmentations" / images[image].replace(".jpg", ".png"))
        assert mask[int(float(y)), int(float(x))] == 255


def test_part_locations_are_the_medians_of_the_clicks(birds: BirdsSummary) -> None:
    clicks: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for image, part, x, y, _, seconds in rows(birds.root / "parts" / "part_click_locs.txt"):
        assert float(seconds) > 0
        clicks.setdefault((image, part), []).append((float(x), float(y)))
    for image, part, x, y, _ in rows(birds.root / "parts" / "part_locs.txt"):
        assert np.median(clicks[image, part], 0).tolist() == [float(x), float(y)]


def test_attribute_files_agree_with_each_other(birds: BirdsSummary) -> None:
    folder = birds.root / "attributes"
    assert rows(folder / "attributes.txt") == [[str(n), name] for n, name in enumerate(ATTRIBUTES, 1)]
    assert (folder / "certainties.txt").read_text() == "1 not visible\n2 guessing\n3 probably\n4 definitely\n"
    percent = np.array(
        [[float(value) for value in row] for row in rows(folder / "class_attribute_labels_continuous.txt")]
    )
    assert percent.shape == (5, 312)
    assert set(np.unique(percent)) == {0.0, 100.0}
    labels = np.array([float(v) for row in rows(folder / "image_attribute_labels.txt") for v in row]).reshape(-1, 5)
    assert labels.shape == (20 * 312, 5)
    assert np.array_equal(labels[:, 0], np.repeat(np.arange(1, 21), 312))
    assert np.array_equal(labels[:, 1], np.tile(np.arange(1, 313), 20))
    expected = np.repeat(percent >= 50, 4, axis=0).ravel()
    definite, hidden = labels[:, 3] == 4, labels[:, 3] == 1
    assert np.all(definite | hidden)
    assert definite.mean() > 0.9
    assert np.array_equal(labels[definite, 2] == 1, expected[definite])
    assert not labels[hidden, 2].any()


def test_the_number_of_workers_does_not_change_a_byte(birds: BirdsSummary, tmp_path: Path) -> None:
    write_birds(tmp_path / "two", **SMALL, workers=2)
    assert digest(tmp_path / "two") == digest(birds.root)


def test_another_seed_gives_other_pictures(birds: BirdsSummary, tmp_path: Path) -> None:
    other = write_birds(tmp_path / "other", **SMALL | {"seed": 4}, workers=1)
    image = rows(birds.root / "images.txt")[0][1]
    assert (other.root / "images" / image).read_bytes() != (birds.root / "images" / image).read_bytes()


def test_a_complete_folder_is_left_alone(birds: BirdsSummary) -> None:
    before = {path: path.stat().st_mtime_ns for path in birds.root.rglob("*")}
    again = write_birds(birds.root, **SMALL, workers=1)
    assert again.reused
    assert "already complete" in str(again)
    assert {path: path.stat().st_mtime_ns for path in birds.root.rglob("*")} == before


def test_a_folder_that_another_opencv_drew_is_not_complete_without_a_word(birds: BirdsSummary) -> None:
    path = birds.root / "birds.json"
    before = path.read_text()
    record = json.loads(before)
    assert record["versions"]["opencv"] == birds.opencv == cv2.__version__
    assert "OpenCV" not in str(birds)
    record["versions"]["opencv"] = "4.11.0"
    path.write_text(json.dumps(record))
    try:
        again = write_birds(birds.root, **SMALL)
    finally:
        path.write_text(before)
    assert again.reused
    assert f"nothing drawn; drawn with OpenCV 4.11.0, this is {cv2.__version__}" in str(again)


def test_another_configuration_is_never_mixed_in(birds: BirdsSummary) -> None:
    before = digest(birds.root)
    with pytest.raises(CalmError, match=r"'seed': 3.*'seed': 9.*choose another folder"):
        write_birds(birds.root, **SMALL | {"seed": 9}, workers=1)
    assert digest(birds.root) == before


def test_a_folder_of_somebody_elses_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CalmError, match="not empty and not a set of birds"):
        write_birds(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CalmError, match="it is a file"):
        write_birds(tmp_path / "notes.txt", **SMALL)


def test_a_killed_run_looks_incomplete_and_the_same_call_completes_it(birds: BirdsSummary, tmp_path: Path) -> None:
    root = tmp_path / "birds"
    code = f"from calm_birds import write_birds; write_birds({str(root)!r}, workers=1, **{SMALL!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    )
    deadline = time.monotonic() + 60
    while not any(root.glob("images/*/*.jpg")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(root.glob("images/*/*.jpg"))
    assert not (root / "birds.json").exists()
    assert (root / "birds.partial.json").exists()
    with pytest.raises(CalmError, match="choose another folder"):
        write_birds(root, **SMALL | {"species": 6}, workers=1)
    assert not write_birds(root, **SMALL, workers=1).reused
    assert digest(root) == digest(birds.root)


def test_the_manifest_holds_the_configuration(birds: BirdsSummary) -> None:
    manifest = json.loads((birds.root / "birds.json").read_text())
    assert manifest["config"] == SMALL
    assert manifest["generator"] >= 1
    assert manifest["pairs"] == {"1": 4, "2": 4, "3": 2}


@pytest.mark.parametrize(("change", "message"), [
    ({"species": 1}, "species=1: give a whole number between 2 and 208"),
    ({"images_per_species": 1}, "images_per_species=1"),
    ({"size": 16}, "size=16: give a whole number between 32 and 512"),
    ({"size": 96.0}, r"size=96\.0"),
    ({"seed": -1}, "seed=-1"),
    ({"workers": 0}, "workers=0"),
    ({"test_fraction": 0.0}, r"test_fraction=0\.0 makes 0 of 4"),
    ({"test_fraction": 1.0}, r"test_fraction=1\.0 makes 4 of 4"),
])  # fmt: skip
def test_values_out_of_range_are_refused_before_anything_is_written(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CalmError, match=message):
        write_birds(tmp_path / "new", **SMALL | change)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif("CALM_SAMPLE_DATA" not in os.environ, reason="CALM_SAMPLE_DATA is not set")
def test_part_and_attribute_names_are_the_official_files(birds: BirdsSummary) -> None:
    official = Path(os.environ["CALM_SAMPLE_DATA"]) / "cub-meta"
    for name in ("parts/parts.txt", "attributes/attributes.txt"):
        assert (birds.root / name).read_bytes() == (official / name).read_bytes()
