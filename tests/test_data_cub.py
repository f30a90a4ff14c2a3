"""calm.data.cub: the official folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from data_files import edit, write_cub, write_image
from hypothesis import given, settings, strategies as st

from calm.data.check import check
from calm.data.cub import CUB_FILES, corners
from calm.data.loading import detect_layout, load_split, load_splits
from calm.errors import CalmError


def test_cub_source_reads_the_official_folder(tmp_path: Path) -> None:
    assert detect_layout(write_cub(tmp_path)) == "cub"
    train = load_split(tmp_path, "train", val_fraction=0)
    test = load_split(tmp_path, "test")
    assert [record.label for record in train.records] == [0, 0, 2, 2]
    assert [record.id for record in test.records] == ["001.Bird_1/Bird_1_2.jpg", "003.Bird_3/Bird_3_2.jpg"]
    assert test.records[0].path == tmp_path / "images/001.Bird_1/Bird_1_2.jpg"
    assert test.class_names == ("001.Bird_1", "002.Bird_2", "003.Bird_3")
    assert test.records[0].boxes == ((2, 1, 12, 6),)
    assert test.records[0].size == (20, 10)
    assert test.records[0].masks == ()
    assert not test.exif


def test_cub_source_reads_segmentations_as_masks(tmp_path: Path) -> None:
    test = load_split(write_cub(tmp_path, masks=True), "test")
    assert test.records[0].masks == (tmp_path / "segmentations/001.Bird_1/Bird_1_2.png",)
    test.records[0].masks[0].unlink()
    report = check(tmp_path)
    assert [problem.kind for problem in report.errors] == ["missing-mask"]


@pytest.mark.parametrize(
    ("official", "size", "published"),
    [
        ((60.0, 27.0, 325.0, 304.0), (500, 335), (60, 27, 385, 331)),
        ((1.0, 2.0, 499.0, 286.0), (500, 335), (1, 2, 499, 288)),  # one over the edge
        ((5.0, 127.0, 496.0, 131.0), (500, 275), (5, 127, 499, 258)),  # two over the edge
        ((0.0, 67.0, 212.0, 163.0), (500, 322), (0, 67, 212, 230)),
    ],
)
def test_corners_equal_those_of_the_published_metadata(
    official: tuple[float, float, float, float], size: tuple[int, int], published: tuple[int, int, int, int]
) -> None:
    """Four images of the official file, and the same four in the published evaluator's localization.txt."""
    assert corners(official, size) == published


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.integers(0, size[0] - 1),
            st.integers(0, size[1] - 1),
            st.integers(0, size[0]),
            st.integers(0, size[1]),
        )
    )
)
def test_corners_clips_only_a_small_overhang(case: tuple[tuple[int, int], int, int, int, int]) -> None:
    (width, height), left, top, w, h = case
    x0, y0, x1, y1 = corners((left, top, w, h), (width, height))
    assert (x0, y0) == (left, top)
    assert x1 == (left + w if not width <= left + w <= width + 1 else width - 1)
    assert y1 == (top + h if not height <= top + h <= height + 1 else height - 1)


def test_load_splits_keeps_only_present_classes(tmp_path: Path) -> None:
    splits = load_splits(write_cub(tmp_path), present_classes_only=True)
    assert {split.class_names for split in splits.values()} == {("001.Bird_1", "003.Bird_3")}
    assert {record.label for record in splits["train"].records} == {0, 1}
    for split in splits.values():
        for record in split.records:
            assert record.id.startswith(split.class_names[record.label])
    alone = load_split(tmp_path, "test", present_classes_only=True)
    assert alone == splits["test"]


@pytest.mark.parametrize(
    ("file", "old", "new", "kind", "words"),
    [
        ("image_class_labels.txt", "3 1\n", "", "no-label", "image number 3 (001.Bird_1/Bird_1_2.jpg)"),
        ("image_class_labels.txt", "3 1\n", "3 4\n", "label-range", "4 for image number 3"),
        ("image_class_labels.txt", "3 1\n", "3 0\n", "label-range", "classes are 1 .. 3"),
        ("image_class_labels.txt", "3 1\n", "3 x\n", "label-not-integer", "'x' for image number 3"),
        ("train_test_split.txt", "3 0\n", "3 2\n", "no-split", "has '2', allowed are 1 (train) and 0 (test)"),
        ("train_test_split.txt", "3 0\n", "", "no-split", "is not there"),
        ("images.txt", "Bird_1_2.jpg", "Bird_1_2.jpg\nx y", "malformed-line", "'x y' is not"),
        ("images.txt", "Bird_1_2.jpg", "Bird_1_1.jpg\n9 001.Bird_1/Bird_1_2.jpg", "no-split", "number 9"),
        ("images.txt", "3 001.Bird_1/", "3 ../../", "bad-path", "../../Bird_1_2.jpg"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "3 2.0 1.0 10.0", "malformed-line", "needs 4 numbers"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "3 2.0 1.0 10.0 nan", "malformed-line", "needs 4 numbers"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "3 2.0 1.0 20.0 5.0", "box-outside", "2,1,22,6"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "3 2.0 1.0 -1.0 5.0", "box-inverted", "2,1,1,6"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "", "no-box", "image number 3"),
        ("bounding_boxes.txt", "3 2.0 1.0 10.0 5.0", "3 2.0 1.0 0.0 5.0", "box-thin", "2,1,2,6"),
        ("image_class_labels.txt", "3 1\n", "3 1\n77 1\n", "unlisted-id", "image number 77"),
    ],
)
def test_cub_source_reports_each_wrong_line_with_its_file(
    tmp_path: Path, file: str, old: str, new: str, kind: str, words: str
) -> None:
    write_cub(tmp_path)
    edit(tmp_path / file, old, new)
    found = [problem for problem in check(tmp_path).problems if problem.kind == kind]
    assert len(found) == 1, check(tmp_path)
    assert words in found[0].message
    assert found[0].file.name == (file if kind not in ("no-split",) else "images.txt")


def test_cub_source_reports_an_image_listed_twice(tmp_path: Path) -> None:
    write_cub(tmp_path)
    edit(tmp_path / "images.txt", "2 001.Bird_1/Bird_1_1.jpg", "2 001.Bird_1/Bird_1_0.jpg")
    (problem,) = check(tmp_path).errors
    assert (problem.kind, problem.line) == ("duplicate-id", 2)
    edit(tmp_path / "images.txt", "3 001.Bird_1/Bird_1_2.jpg", "3 003.Bird_3/Bird_3_0.jpg")
    assert [problem.kind for problem in check(tmp_path).errors] == ["duplicate-id", "two-splits"]


def test_detect_layout_suggests_a_folder_inside(tmp_path: Path) -> None:
    write_cub(tmp_path / "CUB_200_2011")
    write_image(tmp_path / "loose.jpg")
    with pytest.raises(
        CalmError, match=r"(?s)no known data layout.*found: CUB_200_2011/, loose.jpg.*did you mean .*CUB_200"
    ):
        load_split(tmp_path, "train")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*CUB_FILES, "bounding_boxes.txt"]), st.text("0123 .-x/\n\t٣", max_size=60))
def test_cub_source_reads_any_text_without_failing(file: str, text: str) -> None:
    """Whatever a file says, the answer is a report or an error for the user."""
    with TemporaryDirectory() as folder:
        root = write_cub(Path(folder))
        (root / file).write_text(text)
        with suppress(CalmError):
            report = check(root)
            assert report.problems or file == "bounding_boxes.txt"
