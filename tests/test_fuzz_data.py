"""Untrusted and damaged data sets: lists, labels, boxes, attributes, part points, groups, class names, odd trees of
folders. Each is read right, or refused by CalmError that names the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from data_files import write_cub, write_image, write_lines, write_pack
from fuzzing import cases, damaged_text, outcome
from hypothesis import example, given, strategies as st

from calm.data import cues, metadata, records
from calm.data.check import check
from calm.data.cub import read_names
from calm.data.cues import read_class_attributes, read_pairs, read_part_groups, read_part_points
from calm.data.loading import load_splits, summary
from calm.data.records import Split
from calm.errors import CalmError

pytestmark = pytest.mark.stress

WORDS = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "2",
        "3",
        "07",
        "1.5",
        "1e3",
        "1e400",
        "-0.0",
        "nan",
        "inf",
        "-inf",
        "\u0661",
        "½",
        "0x10",
    ),
    *(
        "9" * 18,
        "9" * 30,
        "+1",
        "1_0",
        "true",
        "images/train/0.png",
        "images.txt",
        ".",
        "..",
        "./",
        "/",
        "//",
        "a/..",
        "\0",
    ),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "a\\b",
        "é",
        "\ud800",
        "\ufeff",
        "\u2028",
        "x" * 300,
        "n" * 5000,
        ",",
        ",,,",
        "#",
        "'",
    ),
    *("images", "images/train", "%s", "{}", "001.Bird_1/Bird_1_0.jpg", "~", "$HOME", "\x85", "\x1c", "\r", "\t"),
)


def sane(splits: dict[str, Split], root: Path) -> None:
    """What every later step takes for granted."""
    for name, split in splits.items():
        assert (split.name, len(set(split.class_names))) == (name, split.num_classes)
        assert len({record.id for record in split.records}) == len(split.records) > 0
        for record in split.records:
            assert 0 <= record.label < split.num_classes
            assert record.path.is_relative_to(root)
            assert ".." not in record.path.parts
            for x0, y0, x1, y1 in record.boxes:
                assert 0 <= x0 <= x1
                assert 0 <= y0 <= y1
        assert summary(split)["images"] == len(split.records)


def one_damaged(
    folder: Path, write: Callable[[Path], Path], names: tuple[str, ...], data: st.DataObject
) -> tuple[Path, str]:
    """A data set of which one text file is damaged, and the name of that file."""
    whole, root = folder / "whole", folder / "set"
    if not whole.exists():
        write(whole)
        shutil.copytree(whole, root)
    name = data.draw(st.sampled_from(names))
    for other in names:
        shutil.copyfile(whole / other, root / other)
    (root / name).write_bytes(data.draw(damaged_text((whole / name).read_text(), WORDS)))
    return root, name


def read_splits(root: Path, *names: str) -> None:
    """Refusals name one of ``names``: without any, the folder."""
    wanted = names or (str(root),)
    splits = outcome(partial(load_splits, root, ("train", "test"), val_fraction=0.2), *wanted)
    if splits is not None:
        sane(splits, root)
    report = outcome(partial(check, root, workers=1), *wanted)
    assert report is None or str(report)


METADATA = (
    "classes.txt",
    *(
        f"metadata/{split}/{name}.txt"
        for split in ("train", "test")
        for name in ("image_ids", "class_labels", "image_sizes", "localization")
    ),
)


@cases(80, 1200)
@given(data=st.data())
def test_load_splits_of_damaged_metadata(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "metadata"
    folder.mkdir(exist_ok=True)
    root, name = one_damaged(folder, write_pack, METADATA, data)
    if data.draw(st.booleans()):
        (root / "classes.txt").unlink()
    read_splits(root, name, name.replace("image_sizes", "localization"))  # a box outside of an image said to be small


def write_masked_pack(root: Path) -> Path:
    """A pack whose images have masks, two of one image, and an ignore mask of another."""
    write_pack(root)
    for split in ("train", "test"):
        lists = root / "metadata" / split
        ids = (lists / "image_ids.txt").read_text().split()
        masks = [f"masks/{split}-{index}.png" for index in range(len(ids) + 2)]
        for mask in masks:
            write_image(root / mask)
        ignored = f"{ids[1]},{masks[1]},{masks[-1]}"
        lines = [f"{name},{mask}," for name, mask in zip(ids, masks, strict=False)]
        write_lines(lists / "localization.txt", [lines[0], f"{ids[0]},{masks[-2]},", ignored, *lines[2:]])
    return root


@cases(80, 1200)
@given(data=st.data())
def test_load_splits_of_damaged_masks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "masked"
    folder.mkdir(exist_ok=True)
    lists = ("metadata/train/localization.txt", "metadata/test/localization.txt")
    read_splits(*one_damaged(folder, write_masked_pack, lists, data))


CUB = tuple(f"{name}.txt" for name in ("images", "classes", "image_class_labels", "train_test_split", "bounding_boxes"))


@cases(80, 1200)
@given(data=st.data())
def test_load_splits_of_damaged_cub_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "cub"
    folder.mkdir(exist_ok=True)
    root, name = one_damaged(folder, partial(write_cub, masks=True), CUB, data)
    read_splits(root, name)


def write_cues(root: Path) -> Path:
    """CUB's files of cue localization: 4 attributes of 3 classes, 2 images of 3 parts."""
    write_lines(root / "images.txt", ["1 a/b.jpg", "2 a/c.jpg"])
    names = ["has_bill_shape::curved", "has_wing_color::blue", "has_size::small", "has_eye_color::red"]
    write_lines(root / "attributes" / "attributes.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    rows = ["0.0 2.9 100 50", "60 0 0 49.9", "1 2 3 4"]
    write_lines(root / "attributes" / "class_attribute_labels_continuous.txt", rows)
    write_lines(root / "parts" / "parts.txt", ["1 back", "2 beak", "3 belly"])
    points = [f"{i} {p} {10.0 * p} {20.0 + i} {(i + p) % 2}" for i in (1, 2) for p in (1, 2, 3)]
    write_lines(root / "parts" / "part_locs.txt", points)
    text = "- name: head\n  words: [bill, eye]\n  points: [[2]]\n- name: body\n  words: [wing]\n  points: [[1, 3]]\n"
    (root / "parts" / "groups.yaml").write_text(text)
    return root


CUES = (
    "images.txt",
    "attributes/attributes.txt",
    "attributes/class_attribute_labels_continuous.txt",
    "parts/parts.txt",
    "parts/part_locs.txt",
    "parts/groups.yaml",
)


REFERRING = {"attributes/attributes.txt": CUES[2], "images.txt": CUES[4], "parts/parts.txt": CUES[4]}
"""Where a line that is missing in one file is missed: an error may name either."""


@cases(100, 6600)
@given(data=st.data())
def test_readers_of_cues_on_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "cues"
    folder.mkdir(exist_ok=True)
    root, name = one_damaged(folder, write_cues, CUES, data)
    names = (name, REFERRING.get(name, name))
    found = outcome(partial(read_class_attributes, root), *names)
    if found is not None:
        assert found[1].shape == (len(found[1]), len(found[0]))
    groups = outcome(partial(read_part_groups, root), *names)
    outcome(partial(read_pairs, root, groups=groups or ()), *names)
    points = outcome(partial(read_part_points, root), *names)
    if points is not None:
        assert len(set(points.ids)) == len(points.ids)
        assert torch.isfinite(points.xy).all()


@cases(60)
@given(data=st.data())
def test_read_names_of_damaged_lists(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "names.txt"
    path.write_bytes(data.draw(damaged_text("0 cat, felis\n1 n00000001 dog\n2 001.Crow\n3 a b\n", WORDS)))
    names = outcome(partial(read_names, path), path.name)
    assert names is None or 0 < len(set(names)) == len(names)


NAMES = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.binary(min_size=1, max_size=4).map(os.fsdecode),
    st.sampled_from(["train", "val", "test", ".hidden", "__pycache__", "a.jpg", "CON", "-rf", "a\nb", "a\x1b[31m"]),
)


@cases(40)
@given(classes=st.lists(NAMES, max_size=4), files=st.lists(NAMES, max_size=3))
@example(classes=["a", os.fsdecode(b"\xff")], files=["x"])
@example(classes=["a", "b"], files=[os.fsdecode(b"\xe9")])
def test_load_splits_of_folders_with_odd_names(
    tmp_path_factory: pytest.TempPathFactory, classes: list[str], files: list[str]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    picture = write_image(tmp_path_factory.getbasetemp() / "a.png").read_bytes()
    for name in classes:
        for file in files:
            try:
                (root / "train" / name).mkdir(parents=True, exist_ok=True)
                (root / "train" / name / f"{file}.png").write_bytes(picture)
            except (OSError, ValueError):
                pass  # not every name is possible
    read_splits(root)
    shutil.rmtree(root)


# What was found, and its like


def test_load_splits_refuses_a_path_that_names_nothing(tmp_path: Path) -> None:
    root = write_cub(tmp_path, masks=True)
    (root / "images.txt").write_text("1 .\n2 001.Bird_1/Bird_1_1.jpg\n")
    with pytest.raises(CalmError, match=r"images\.txt:1: \."):
        load_splits(root)


def test_read_part_points_refuses_an_image_listed_twice(tmp_path: Path) -> None:
    write_cues(tmp_path)
    for lines in (["1 a/b.jpg", "1 a/c.jpg"], ["1 a/b.jpg", "2 a/b.jpg"]):
        write_lines(tmp_path / "images.txt", lines)
        with pytest.raises(CalmError, match=r"images\.txt:2"):
            read_part_points(tmp_path)


def test_read_class_attributes_refuses_a_table_of_no_attributes(tmp_path: Path) -> None:
    write_cues(tmp_path)
    for name in ("attributes", "class_attribute_labels_continuous"):
        (tmp_path / "attributes" / f"{name}.txt").write_text("\n")
    with pytest.raises(CalmError, match=r"attributes\.txt lists no attribute"):
        read_class_attributes(tmp_path)


def test_load_splits_never_repeats_a_long_line(tmp_path: Path) -> None:
    root = write_pack(tmp_path)
    (root / "metadata" / "train" / "image_ids.txt").write_text("n" * 900_000)
    with pytest.raises(CalmError) as caught:
        load_splits(root)
    assert len(str(caught.value)) < 20_000


def test_load_splits_refuses_a_line_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit bounds the memory of a file without line ends."""
    monkeypatch.setattr(records, "MAX_LINE", 20)
    with pytest.raises(CalmError, match=r"image_ids\.txt:1: a line of more than 20 characters"):
        read_names(write_lines(tmp_path / "image_ids.txt", ["0 " + "n" * 19]))


def test_load_splits_refuses_a_label_beyond_the_limit_before_it_makes_names_for_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without classes.txt one wrong digit in a label would stand for any number of class names."""
    monkeypatch.setattr(metadata, "MAX_CLASSES", 5)
    root = write_pack(tmp_path, classes=None)
    path = root / "metadata" / "train" / "class_labels.txt"
    path.write_text(path.read_text().replace(",1", ",5"))
    with pytest.raises(CalmError, match=r"class_labels\.txt:4: label 5 of .* more than 5 are not read"):
        load_splits(root)


def test_read_part_points_refuses_more_parts_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of images times parts is allocated from the lengths of two lists."""
    monkeypatch.setattr(cues, "MAX_PARTS", 2)
    with pytest.raises(CalmError, match=r"parts\.txt lists 3 parts: at most 2 are read"):
        read_part_points(write_cues(tmp_path))


def test_read_names_starts_at_0_or_1(tmp_path: Path) -> None:
    write_lines(tmp_path / "classes.txt", ["-1 a", "0 b", "1 c"])
    with pytest.raises(CalmError, match="the first is -1"):
        read_names(tmp_path / "classes.txt")


@pytest.mark.parametrize("line", ["1 1 nan 2 1", "1 1 2 inf 1", "1 1 2e9 1 1", "1 1.5 2 2 1"])
def test_read_part_points_refuses_far_points_and_fractional_parts(tmp_path: Path, line: str) -> None:
    write_cues(tmp_path)
    write_lines(tmp_path / "parts" / "part_locs.txt", [line])
    with pytest.raises(CalmError, match=r"part_locs\.txt:1"):
        read_part_points(tmp_path)


def test_read_names_refuses_a_device(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "cub")
    for name in CUB[:4]:
        (root / name).unlink()
        (root / name).symlink_to(os.devnull)
    with pytest.raises(CalmError, match="pipe or device"):
        read_names(root / "classes.txt")
    with pytest.raises(CalmError, match="known data layout"):
        load_splits(root)
