"""The localization benchmark on pictures whose objects are known, and folders of maps that do or do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from calm.cli import main
from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.localization import localization, masks, scaled_boxes
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject, open_map_folder
from calm.images import Preprocessing

SIZE = (56, 56)
FAST = {"size": SIZE, "replicates": 20}


def write_split(root, annotation, count=5):
    """Pictures of 28 x 28 with a white block; its box, or its mask, is the truth."""
    records = []
    for place in range(count):
        y, x = 4 + place, 6 + place
        inside = np.zeros((28, 28), dtype=np.uint8)
        inside[y : y + 12, x : x + 14] = 255
        path = root / "images" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([inside] * 3, axis=2)).save(path)
        record = Record(f"images/{place}.png", path, place % 3)
        if annotation == "boxes":
            record = replace(record, boxes=((x, y, x + 13, y + 11),))
        else:
            mask, ignore = root / f"{place}_mask.png", root / f"{place}_ignore.png"
            Image.fromarray(inside).save(mask)
            Image.fromarray(np.where(np.arange(28) < 5, 255, inside).astype(np.uint8)).save(ignore)
            record = replace(record, masks=(mask,), ignore=ignore)
        records.append(record)
    return Split("test", tuple(records), ("a", "b", "c", "d", "e", "f"), root)


class Bright:
    """Sees brightness, for the classes asked, and is sure of class 0."""

    def __init__(self, images):
        self.images = images
        self.probs = torch.tensor([0.5, 0.2, 0.12, 0.08, 0.06, 0.04]).repeat(len(images), 1)

    def maps(self, classes):
        return self.images.mean(1, keepdim=True).expand(-1, classes.shape[1], -1, -1)


def bright(**options):
    return Subject("brightness", Bright, Preprocessing(size=SIZE), torch.device("cpu"), **options)


def truth_maps(split, folder, suffix=".npy"):
    for record in split.records:
        with Image.open(record.path) as image:
            scores = np.asarray(image.convert("L").resize(SIZE, Image.Resampling.NEAREST)) / 255
        path = folder / f"{record.id}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, scores.astype(np.float32))


def test_localization_of_the_object_itself_is_right_by_boxes(tmp_path):
    split = write_split(tmp_path, "boxes")
    done = []
    result = localization(bright(), split, batch_size=2, progress=done.append, **FAST)
    assert done == [2, 2, 1]
    figures = {name: estimate.value for name, estimate in result.figures.items()}
    assert figures["maxboxacc"] == figures["maxboxacc_v2"] == figures["maxboxacc_70"] == 1
    assert figures["top1_localization"] == pytest.approx(2 / 5)  # labels 0 1 2 0 1
    assert figures["top5_localization"] == 1
    assert 0.6 < figures["energy_inside"] < 1
    assert 0.6 < figures["pointing"] <= 1  # truncated boxes lack the last row and column of the block
    assert list(result.scores) == [record.id for record in split.records]
    assert min(result.scores.values()) > 0.8
    assert len(result.curves["box accuracy"].y) == 1000
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").figures == result.figures


def test_localization_ignores_pixels_of_masks(tmp_path):
    split = write_split(tmp_path, "masks")
    truth_maps(split, tmp_path / "maps")
    result = localization(open_map_folder(tmp_path / "maps", split, size=SIZE), split, **FAST)
    assert result.label == "maps"
    assert {name: estimate.value for name, estimate in result.figures.items()} == pytest.approx(
        {"pxap": 1.0, "pxap_released": 1.0, "pointing": 1.0, "energy_inside": 1.0}
    )
    assert all(score == pytest.approx(1) for score in result.scores.values())
    for record in split.records:  # bright where ignored: as if nothing were there
        path = tmp_path / "maps" / f"{record.id}.npy"
        scores, ignore = np.load(path), masks(record, SIZE)[1].numpy()
        assert ignore.any()
        np.save(path, np.where(ignore, 1, scores).astype(np.float32))
    again = localization(open_map_folder(tmp_path / "maps", split, size=SIZE), split, **FAST)
    assert again.figures == result.figures


def test_masks_are_what_is_not_zero_and_have_the_shape_of_their_image(tmp_path):
    object_at = np.zeros((8, 4), dtype=bool)
    object_at[2:5, 1:3] = True
    Image.new("RGB", (4, 8)).save(tmp_path / "a.png")
    Image.fromarray(object_at[..., None] * np.array([0, 0, 1], dtype=np.uint8)).save(tmp_path / "mask.png")
    record = Record("a.png", tmp_path / "a.png", 0, masks=(tmp_path / "mask.png",))
    assert (masks(record, (8, 4))[0].numpy() == object_at).all()
    Image.fromarray(object_at.T).save(tmp_path / "mask.png")
    with pytest.raises(CalmError, match=r"mask\.png: it is 8 x 4 pixels, its image as stored 4 x 8"):
        masks(record, (8, 4))


def test_localization_scores_of_images_include_threshold_1(tmp_path):
    """By hand: the truth is the one pixel that scores 1, and two others score above 0.999, the last threshold but 1."""
    mask, size = np.array([[255, 0], [0, 0]], dtype=np.uint8), (2, 2)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    split = Split("test", (Record("a.png", tmp_path / "a.png", 0, masks=(tmp_path / "mask.png",)),), ("a",), tmp_path)
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "a.png.npy", np.array([[1, 0.9995], [0.9992, 0]], dtype=np.float32))
    result = localization(open_map_folder(tmp_path / "maps", split, size=size), split, size=size, replicates=0)
    assert result.scores == {"a.png": 1.0}
    assert result.figures["pxap"].value == 1.0


def test_localization_scores_boxes_and_masks_together(tmp_path):
    by_box, by_mask = (write_split(tmp_path / kind, kind) for kind in ("boxes", "masks"))
    records = tuple(replace(mask, boxes=box.boxes) for mask, box in zip(by_mask.records, by_box.records, strict=True))
    subject = bright(normalization="minmax", thresholds="even", about={})
    both, boxes, pixels = (
        localization(subject, split, **FAST) for split in (replace(by_mask, records=records), by_box, by_mask)
    )
    assert both.details["truth"] == ["masks", "boxes"]
    assert both.figures["maxboxacc"] == boxes.figures["maxboxacc"]
    assert both.figures["energy_inside"] == pixels.figures["energy_inside"]
    assert both.figures["pxap"] == pixels.figures["pxap"]
    assert both.scores == pixels.scores


def test_localization_released_counting_flatters_maps_of_zeros(tmp_path):
    split = write_split(tmp_path, "masks")
    truth_maps(split, tmp_path / "maps")
    for path in (tmp_path / "maps").rglob("*.npy"):
        scores = np.load(path)
        scores[:, ::2] = 0  # half of the object is missed
        np.save(path, scores)
    subject = open_map_folder(tmp_path / "maps", split, size=SIZE, thresholds="log")
    figures = localization(subject, split, **FAST).figures
    assert figures["pxap_released"].value == pytest.approx(1)
    assert figures["pxap"].value == pytest.approx(0.5, abs=0.05)


def test_localization_of_a_folder_equals_that_of_its_subject(tmp_path):
    split = write_split(tmp_path, "boxes")

    def write(images):
        prediction = Bright(images)
        low, high = images.mean(1).amin((1, 2), True), images.mean(1).amax((1, 2), True)
        kept.extend(((images.mean(1) - low) / (high - low)).numpy())
        return prediction

    kept = []
    model = localization(replace(bright(), predict=write), split, **FAST)
    for record, scores in zip(split.records, kept, strict=True):
        path = tmp_path / "maps" / record.id.replace(".png", ".npy")  # the other way to name them
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, scores)
    folder = localization(open_map_folder(tmp_path / "maps", split, size=SIZE), split, batch_size=3, **FAST)
    assert set(model.figures) - set(folder.figures) == {"top1_localization", "top5_localization"}
    for name, figure in folder.figures.items():
        assert figure == pytest.approx(model.figures[name])
    assert folder.scores == model.scores


def test_scaled_boxes_are_truncated():
    record = Record("a", None, 0, boxes=((10, 3, 99, 74),), size=(100, 75))
    assert scaled_boxes(record, (224, 224)).tolist() == [[22, 8, 221, 221]]


def test_open_map_folder_reports_all_problems_at_once(tmp_path):
    split, folder = write_split(tmp_path, "boxes", count=8), tmp_path / "maps"
    truth_maps(split, folder)
    good = np.load(folder / "images/0.png.npy")
    (folder / "images/0.png.npy").unlink()
    np.save(folder / "images/1.png.npy", good[:-1])
    np.save(folder / "images/2.png.npy", np.where(good > 0, np.nan, good))
    np.save(folder / "images/3.png.npy", good * 255)
    np.save(folder / "images/4.png.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "images/5.png.npy").write_bytes(b"no array")
    np.save(folder / "images/6.npy", good)
    np.save(folder / "images/stranger.npy", good)
    with pytest.raises(CalmError) as caught:
        open_map_folder(folder, split, size=SIZE)
    lines = str(caught.value).splitlines()
    for what in (
        "1 images have no map: save each as <image id>.npy, in folders as the id has them. images/0.png",
        "1 maps have another shape",
        "images/1.png.npy (55, 56)",
        "1 maps hold NaN or infinite values",
        "1 maps leave [0, 1]",
        "images/3.png.npy (0 to 255)",
        "2 files are no array of numbers",
        "1 images have two maps",
        "1 maps belong to no image of the split",
        "images/stranger.npy",
    ):
        assert any(what in line for line in lines), what
    with pytest.raises(CalmError, match="no folder"):
        open_map_folder(tmp_path / "absent", split)


def test_localization_refuses_images_without_truth(tmp_path):
    split = write_split(tmp_path, "boxes")
    bare = [replace(record, boxes=()) for record in split.records]
    with pytest.raises(CalmError, match="neither boxes nor masks"):
        localization(bright(), replace(split, records=tuple(bare)))
    with pytest.raises(CalmError, match=r"1 of 5 images .* no boxes, first images/0.png"):
        localization(bright(), replace(split, records=(bare[0], *split.records[1:])))
    with pytest.raises(CalmError, match="no image"):
        localization(bright(), replace(split, records=()))
    masked = write_split(tmp_path / "m", "masks")
    black = write_split(tmp_path / "black", "masks")
    for record in black.records:
        Image.new("L", (28, 28)).save(record.masks[0])
    with pytest.raises(CalmError, match=r"split 'test', masks such as .*0_mask\.png: no positive pixel"):
        localization(bright(), black, **FAST)
    masked.records[2].masks[0].unlink()
    with pytest.raises(CalmError, match=r"cannot read mask .*2_mask\.png"):
        localization(bright(), masked, **FAST)


def test_localization_reads_the_openimages_layout(tmp_path, capsys):
    """Two instances in one image, one with an ignore mask that overlaps it, and a mask of another size."""
    root, lists = tmp_path / "data", tmp_path / "data/metadata/OpenImages/test"
    lists.mkdir(parents=True)
    generator = np.random.default_rng(3)
    objects = {  # by image: instances as (x, y, width, height) in a 32 x 32 picture, and what to ignore
        "test/01/a.jpg": ([(2, 3, 8, 8), (20, 18, 9, 12)], (16, 0, 16, 20)),
        "test/01/b.jpg": ([(4, 16, 20, 10)], None),
        "test/02/c.jpg": ([(0, 0, 32, 5)], (0, 4, 32, 9)),
    }
    lines, maps, truth = [], [], []
    for name, (instances, ignored) in objects.items():
        path = root / "OpenImages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90, 120, 60)).save(path)
        stem = name.removesuffix(".jpg")

        def write(kind, box, name=stem):
            x, y, width, height = box
            grey = np.zeros((32, 32), dtype=np.uint8)
            grey[y : y + height, x : x + width] = 255
            file = root / "OpenImages" / f"{name}_{kind}.png"
            scale = 2 if kind == "m1" else 1  # masks need not have the picture's size
            Image.fromarray(grey).resize((32 * scale, 32 * scale), Image.Resampling.NEAREST).save(file)
            return file.relative_to(root / "OpenImages"), grey > 0

        drawn = [write(f"m{number}", box) for number, box in enumerate(instances)]
        ignore = write("ignore", ignored) if ignored else ("", np.zeros((32, 32), dtype=bool))
        lines += [f"{name},{file},{ignore[0] if not number else ''}" for number, (file, _) in enumerate(drawn)]
        inside = np.any([grey for _, grey in drawn], axis=0)
        scores = np.where(inside, 0.6, 0.3) + generator.uniform(-0.25, 0.25, (32, 32))
        maps.append(scores.astype(np.float32))
        truth.append(np.where(ignore[1] & ~inside, -1, inside))
        (tmp_path / "maps" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "maps" / f"{name}.npy", np.kron(maps[-1], np.ones((7, 7), dtype=np.float32)))
    (lists / "image_ids.txt").write_text("".join(f"{name}\n" for name in objects))
    (lists / "class_labels.txt").write_text("".join(f"{name},{n}\n" for n, name in enumerate(objects)))
    (lists / "image_sizes.txt").write_text("".join(f"{name},32,32\n" for name in objects))
    (lists / "localization.txt").write_text("".join(f"{line}\n" for line in lines))
    out = tmp_path / "out"
    words = ["--data", str(root), "--maps", str(tmp_path / "maps"), "--out", str(out), "--replicates", "50"]
    assert main(["evaluate", "localization", *words]) == 0, capsys.readouterr().err
    (file,) = (out / "localization").glob("*.json")
    figures = Result.load(file).figures
    counted = np.concatenate([values[where >= 0] for values, where in zip(maps, truth, strict=True)])
    positive = np.concatenate([where[where >= 0] for where in truth]) == 1
    area, last = 0.0, 0.0
    for edge in np.linspace(0, 1, 1001)[::-1]:  # 0, 0.001, ... 1
        reached = counted.astype(np.float64) >= edge
        if reached.any():
            recall = (reached & positive).sum() / positive.sum()
            area += (reached & positive).sum() / reached.sum() * (recall - last)
            last = recall
    assert 0.7 < area < 0.95
    assert figures["pxap"].value == pytest.approx(area, abs=1e-9)
    assert figures["pxap"].low < area < figures["pxap"].high
    inside = [(values[where == 1]).sum() / values[where >= 0].sum() for values, where in zip(maps, truth, strict=True)]
    assert figures["energy_inside"].value == pytest.approx(np.mean(inside), abs=1e-6)
    table = (out / "table.csv").read_text().splitlines()
    assert any(line.startswith("localization,data,test,maps,pxap,") for line in table)
