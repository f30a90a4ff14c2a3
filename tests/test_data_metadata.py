"""calm.data.metadata: the four text files, class names, and the released layout."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from data_files import edit, write_image, write_lines, write_pack
from hypothesis import HealthCheck, given, settings, strategies as st

from calm.data.cub import names_from_folders, read_names
from calm.data.loading import load_split, load_splits
from calm.data.metadata import IMAGE_ROOTS, MetadataSource, read_ids, read_labels, read_localization, read_sizes
from calm.data.records import ProblemLog, whole_number
from calm.errors import CalmError

part = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1).filter(
    lambda text: text not in (".", "..")
)
names = st.lists(part, min_size=1, max_size=3).map("/".join)
corner = st.integers(0, 500)


def test_load_split_reads_labels_boxes_sizes_and_names(tmp_path: Path) -> None:
    split = load_split(write_pack(tmp_path), "val")
    assert split.class_names == ("cat", "dog")
    first, second = split.records
    assert first.id == "images/val/0.png"
    assert first.path == tmp_path / "images/val/0.png"
    assert (first.label, second.label) == (0, 1)
    assert first.boxes == ((1, 1, 5, 4),)
    assert first.size == (8, 6)
    assert (split.exif, split.origin, split.problems) == (False, "own files", ())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        names,
        st.tuples(
            st.integers(0, 9),
            st.integers(1, 2000),
            st.integers(1, 2000),
            st.lists(st.tuples(corner, corner, corner, corner), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_readers_of_lists_read_what_is_written(
    images: dict[str, tuple[int, int, int, list[tuple[int, ...]]]], end: str
) -> None:
    """Ids with commas, quotes and letters of any script; any line end; blank lines."""
    with TemporaryDirectory() as folder:
        root = Path(folder)

        def write(name: str, lines: list[str]) -> Path:
            (root / name).write_bytes("".join(line + end for line in lines).encode())
            return root / name

        log = ProblemLog("val")
        ids = read_ids(write("ids", list(images)), log)
        labels = read_labels(write("l", [f"{k},{v[0]}" for k, v in images.items()]), log)
        sizes = read_sizes(write("s", [f"{k},{v[1]},{v[2]}" for k, v in images.items()]), log)
        lines = [",".join(map(str, (k, *box))) for k, v in images.items() for box in v[3]]
        boxes, masks = read_localization(write("b", lines), log)
    assert not log.problems
    assert list(ids) == list(images)
    assert {k: line.value for k, line in labels.items()} == {k: v[0] for k, v in images.items()}
    assert {k: line.value for k, line in sizes.items()} == {k: v[1:3] for k, v in images.items()}
    assert not masks
    found = {k: [box.value for box in entry] for k, entry in boxes.items()}
    assert found == {k: v[3] for k, v in images.items() if v[3]}


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_readers_of_lists_read_any_text_without_failing(text: str) -> None:
    """Whatever the file says, every line that is not blank is read or reported."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "file.txt")
        path.write_bytes(text.encode())
        with path.open(encoding="utf-8-sig", newline=None) as file:
            lines = sum(bool(line.strip()) for line in file)
        for read in (read_ids, read_labels, read_sizes, read_localization):
            log = ProblemLog("val")
            found = read(path, log)
            of_lines = [entry for lists in found for entry in lists.values()] if isinstance(found, tuple) else [found]
            count = len(log.problems) + sum(map(len, of_lines))
            assert count == lines


def test_whole_number_ignores_every_white_space_of_regular_expressions() -> None:
    """A file separator is white space for `re`, and not for `int`."""
    assert whole_number("\x1c 2") == 2
    assert whole_number("2\x1c3") is None


def test_load_split_reads_masks_and_the_ignore_mask(tmp_path: Path) -> None:
    write_pack(tmp_path)
    write_lines(
        tmp_path / "metadata/val/localization.txt",
        [
            "images/val/0.png,masks/0_a.png,masks/0_ignore.png",
            "images/val/0.png,masks/0_b.png,",
            "images/val/1.png,masks/1_a.png,",
        ],
    )
    first, second = load_split(tmp_path, "val").records
    assert first.masks == (tmp_path / "masks/0_a.png", tmp_path / "masks/0_b.png")
    assert first.ignore == tmp_path / "masks/0_ignore.png"
    assert second.masks == (tmp_path / "masks/1_a.png",)
    assert second.ignore is None
    assert not first.boxes


def test_load_splits_accepts_absent_or_blank_sizes_and_localization(tmp_path: Path) -> None:
    write_pack(tmp_path)
    (tmp_path / "metadata/train/image_sizes.txt").unlink()
    (tmp_path / "metadata/train/localization.txt").write_text("\n")
    (tmp_path / "metadata/val/localization.txt").unlink()
    splits = load_splits(tmp_path, ("train", "val"))
    assert {record.size for record in splits["train"].records} == {None}
    assert not any(record.boxes for split in splits.values() for record in split.records)


@pytest.mark.parametrize("file", ["class_labels.txt", "image_ids.txt"])
def test_load_split_names_a_missing_essential_file(tmp_path: Path, file: str) -> None:
    write_pack(tmp_path)
    (tmp_path / "metadata/val" / file).unlink()
    with pytest.raises(CalmError, match=file if file == "class_labels.txt" else "no image for split 'val'"):
        load_split(tmp_path, "val", val_fraction=0)


def test_load_split_names_a_file_that_is_no_text(tmp_path: Path) -> None:
    write_pack(tmp_path)
    (tmp_path / "metadata/val/image_ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalmError, match=r"val.image_ids\.txt is not UTF-8"):
        load_split(tmp_path, "val")


def test_class_names_come_from_folders_or_are_numbers_without_classes_txt(tmp_path: Path) -> None:
    assert load_split(write_pack(tmp_path, classes=None), "val").class_names == ("0", "1")
    for split, images in (("train", ("b/1.png", "b/2.png", "a/1.png")), ("val", ("x/1.png", "x/2.png", "x/3.png"))):
        lists = tmp_path / "metadata" / split
        write_lines(lists / "image_ids.txt", images)
        write_lines(
            lists / "class_labels.txt", [f"{image},{label}" for image, label in zip(images, (0, 0, 1), strict=True)]
        )
    assert MetadataSource(tmp_path, tmp_path / "metadata").class_names == ("b", "a")


@given(st.dictionaries(names, st.integers(0, 5), min_size=1))
def test_names_from_folders_are_used_only_if_they_tell_the_classes_apart(labels: dict[str, int]) -> None:
    found = names_from_folders(labels)
    folders = {name: PurePosixPath(name).parent.name for name in labels}
    assert len(found) == max(labels.values()) + 1
    if found != tuple(map(str, range(len(found)))):
        assert all(found[label] == folders[name] for name, label in labels.items())
        assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["0 n01443537 goldfish, Carassius auratus", "1 n01629819 newt"], ("goldfish", "newt")),
        (["1 001.Albatross", "2 002.Ani"], ("001.Albatross", "002.Ani")),
        (["1 two words", "0 one, more"], ("one", "two words")),
        (["0 crane, bird", "1 crane, machine"], ("crane, bird", "crane, machine")),
        (["0 n02"], ("n02",)),
    ],
)
def test_read_names_are_short_and_unique(tmp_path: Path, lines: list[str], expected: tuple[str, ...]) -> None:
    write_lines(tmp_path / "classes.txt", lines)
    assert read_names(tmp_path / "classes.txt") == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0 cat", "2 dog"], "1 is missing"),
        (["3 cat", "4 dog"], "the first is 3"),
        (["0 cat", "0 dog"], ":2: class index 0 is given twice"),
        (["0 cat", "1 cat"], "two classes are called 'cat'"),
        (["cat 0"], ":1: 'cat 0' is not 'index name'"),
        ([], "there are none"),
    ],
)
def test_read_names_refuses_wrong_lists_with_the_place(tmp_path: Path, lines: list[str], message: str) -> None:
    write_lines(tmp_path / "classes.txt", lines)
    with pytest.raises(CalmError, match=message):
        read_names(tmp_path / "classes.txt")


def _released(root: Path, name: str, split: str, folder: str) -> None:
    """One image of class 0 and one of class 1 of a released data set."""
    ids = ["x/a.png", "y/b.png"]
    for image in ids:
        write_image(root / "dataset" / folder / image)
    lists = root / "metadata" / name / split
    write_lines(lists / "image_ids.txt", ids)
    write_lines(lists / "class_labels.txt", ["x/a.png,0", "y/b.png,1"])


@pytest.mark.parametrize(
    ("name", "split", "folder"),
    [
        (name, split, folder)
        for name, by_split in IMAGE_ROOTS.items()
        for split, folders in by_split.items()
        for folder in folders
    ],
)
def test_images_root_finds_the_images_of_each_split_of_the_released_layout(
    tmp_path: Path, name: str, split: str, folder: str
) -> None:
    _released(tmp_path, name, split, folder)
    given = {"metadata_root": tmp_path / "metadata" / name, "val_fraction": 0}
    for root in (tmp_path / "dataset", tmp_path / "dataset" / folder, tmp_path / "dataset" / folder.split("/")[0]):
        loaded = load_split(root, split, **given)  # type: ignore[arg-type]
        assert [record.path for record in loaded.records] == [
            tmp_path / "dataset" / folder / image for image in ("x/a.png", "y/b.png")
        ]
        assert loaded.class_names == ("x", "y")


def test_load_split_finds_the_released_metadata_below_the_root(tmp_path: Path) -> None:
    _released(tmp_path, "CUB", "test", "CUB/images")
    (tmp_path / "dataset").rename(tmp_path / "root")
    (tmp_path / "metadata").rename(tmp_path / "root/metadata")
    assert len(load_split(tmp_path / "root", "test", val_fraction=0).records) == 2
    write_lines(tmp_path / "root/metadata/ILSVRC/test/image_ids.txt", ["a.png"])
    with pytest.raises(CalmError, match=r"several data sets: .*CUB, .*ILSVRC; name one"):
        load_split(tmp_path / "root", "test", val_fraction=0)


def test_images_root_says_where_images_were_looked_for(tmp_path: Path) -> None:
    _released(tmp_path, "ILSVRC", "val", "elsewhere")
    with pytest.raises(CalmError, match=r"none of the ILSVRC val images \(such as x/a.png\)[^$]*dataset/ImageNetV2\n"):
        load_split(tmp_path / "dataset", "val", metadata_root=tmp_path / "metadata/ILSVRC", val_fraction=0)


def test_load_split_refuses_a_metadata_root_without_lists(tmp_path: Path) -> None:
    write_pack(tmp_path)
    with pytest.raises(CalmError, match=r"no train/image_ids.txt .* in .*images"):
        load_split(tmp_path, "val", metadata_root=tmp_path / "images")


def test_load_split_raises_all_wrong_lines_at_once(tmp_path: Path) -> None:
    write_pack(tmp_path)
    edit(tmp_path / "metadata/val/class_labels.txt", "0.png,0", "0.png,cat")
    edit(tmp_path / "metadata/val/localization.txt", "1.png,1,1,5,4", "1.png,1,1,8,4")
    with pytest.raises(CalmError, match=r"(?s)'cat' for images/val/0.png.*box 1,1,8,4 ") as caught:
        load_split(tmp_path, "val")
    assert "--skip-bad" not in str(caught.value)  # a flag of calm train
    loose = load_split(tmp_path, "val", strict=False)
    assert [record.id for record in loose.records] == ["images/val/1.png"]
    assert [problem.kind for problem in loose.problems] == ["label-not-integer", "box-outside"]
