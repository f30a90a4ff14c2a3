"""The readers on real photographs, where the environment variable CALM_SAMPLE_DATA names the folder of sample data."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import calm
from calm.data.check import check
from calm.data.cues import read_part_points, read_segmentation
from calm.data.loading import load_split, load_splits
from calm.evaluate.cue_localization import read_cue_data
from calm.images import image_size

SAMPLES = os.environ.get("CALM_SAMPLE_DATA")
pytestmark = pytest.mark.skipif(not SAMPLES, reason="CALM_SAMPLE_DATA is not set")
ROOT = Path(SAMPLES or ".")
CUB27 = ROOT / "cub27"


def test_load_splits_reads_tiny_imagenet() -> None:
    splits = load_splits(ROOT / "tiny-imagenet-20")
    assert [len(split.records) for split in splits.values()] == [9000, 1000, 1000]
    assert {split.class_counts() for split in splits.values()} == {(450,) * 20, (50,) * 20}
    assert splits["train"].class_names[0] == "goldfish"
    assert not any(record.boxes for record in splits["train"].records)
    for name in ("val", "test"):
        boxes = [box for record in splits[name].records for box in record.boxes]
        assert len(boxes) == 1000
        assert max(map(max, boxes)) == 63
    report = check(ROOT / "tiny-imagenet-20", decode=False)
    assert report.ok
    assert {problem.kind for problem in report.problems} == {"box-thin"}
    assert len(report.problems) == 6


def test_load_splits_reads_five_classes_of_cub() -> None:
    splits = load_splits(ROOT / "cub5", ("train", "test"), val_fraction=0)
    assert [len(split.records) for split in splits.values()] == [50, 147]
    assert {split.num_classes for split in splits.values()} == {200}
    assert {record.label for record in splits["train"].records} == {0, 2, 3, 8, 9}
    assert splits["test"].records[0].boxes == ((60, 27, 385, 331),)
    report = check(ROOT / "cub5")
    assert report.ok
    assert {problem.kind for problem in report.problems} == {"empty-class"}
    present = load_splits(ROOT / "cub5", present_classes_only=True)
    assert present["train"].num_classes == 5
    # The attributes are of all 200 classes, which `calm evaluate cue-localization` refuses as well.
    (problem,) = check(ROOT / "cub5", present_classes_only=True).problems
    assert problem.message == "describes 200 classes, the data set has 5"


def test_load_splits_reads_27_classes_of_cub() -> None:
    splits = load_splits(CUB27, ("train", "test"), val_fraction=0)
    assert [len(split.records) for split in splits.values()] == [810, 739]
    assert {split.num_classes for split in splits.values()} == {200}
    present = load_split(CUB27, "test", present_classes_only=True)
    assert present.num_classes == 27
    assert min(present.class_counts()) > 0


def test_check_takes_masks_of_the_test_images_of_cub27_alone() -> None:
    report = check(CUB27, decode=False)
    kinds = Counter(problem.kind for problem in report.problems)
    assert kinds == {"empty-class": 2}
    splits = load_splits(CUB27, ("train", "test"), val_fraction=0)
    assert [sum(bool(record.masks) for record in split.records) for split in splits.values()] == [0, 739]
    assert "15 parts in 7 groups, 312 attributes" in str(report)


def test_read_cue_data_finds_the_pairs_of_cub27() -> None:
    split = load_split(CUB27, "test")
    labels = {record.label for record in split.records}
    data = read_cue_data(split, CUB27)
    complete = [pair for pair in data.pairs if {pair.first, pair.second} <= labels]
    assert Counter(len(pair.groups) for pair in complete) == {1: 7, 2: 18, 3: 12}
    single = {data.groups[pair.groups[0]].name for pair in complete if len(pair.groups) == 1}
    assert single == {"head"}
    images = torch.tensor(sorted(data.samples)[:8])
    regions = data.regions(split.records, images)
    assert ((regions >= 0).flatten(1).any(1)).all()


def test_visible_points_of_cub27_lie_mostly_on_the_bird() -> None:
    records = load_split(CUB27, "test").records[::40]
    points = read_part_points(CUB27).select(record.id for record in records)
    inside = []
    for number, record in enumerate(records):
        width, height = image_size(record.path) or (0, 0)
        mask = read_segmentation(record.masks[0], (height, width))
        x, y = points.xy[number, points.visible[number]].long().T
        inside.append(mask[y.clamp(0, height - 1), x.clamp(0, width - 1)].float().mean())
    assert torch.stack(inside).mean() > 0.7  # the masks are GrabCut's; some miss a tail or a leg


def test_a_model_explains_photographs_of_cub27() -> None:
    records = load_split(CUB27, "test", present_classes_only=True).records[::150]
    model = calm.create_model("small_resnet", 27, preprocessing=calm.Preprocessing(size=(96, 96))).eval()
    images = model.preprocess([record.path for record in records])
    labels = torch.tensor([record.label for record in records])
    with torch.no_grad():
        output = model(images)
    assert images.shape == (len(records), 3, 96, 96)
    maps = output.attribute(labels, kind="joint")
    torch.testing.assert_close(maps.sum((1, 2)), output.probs[torch.arange(len(records)), labels])
