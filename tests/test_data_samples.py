"""The readers on real data, where CALM_SAMPLE_DATA names the folder with the sample packs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calm.data.check import check
from calm.data.loading import load_splits

SAMPLES = os.environ.get("CALM_SAMPLE_DATA")
pytestmark = pytest.mark.skipif(not SAMPLES, reason="CALM_SAMPLE_DATA is not set")
ROOT = Path(SAMPLES or ".")


def test_the_tiny_imagenet_pack_reads() -> None:
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


def test_the_cub_sample_reads() -> None:
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
    assert not check(ROOT / "cub5", present_classes_only=True).problems
