"""calm.data.loading: class folders, carved splits, detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import edit, write_cub, write_image, write_lines, write_pack
from hypothesis import given, strategies as st

from calm.data.check import check
from calm.data.loading import (
    carve,
    detect_layout,
    fingerprint,
    has_splits,
    load_split,
    load_splits,
    match_classes,
    open_source,
    summary,
)
from calm.data.records import Record
from calm.errors import CalmError


def _tree(root: Path, images: int = 5, classes: tuple[str, ...] = ("dog", "cat")) -> Path:
    for name in classes:
        for index in range(images):
            write_image(root / name / f"{index}.png", (4, 4), index)
    return root


def test_folder_source_sorts_classes_alphabetically(tmp_path: Path) -> None:
    _tree(tmp_path / "train")
    _tree(tmp_path / "val", 2)
    _tree(tmp_path / "test", 1)
    assert detect_layout(tmp_path) == "folder"
    splits = load_splits(tmp_path)
    assert {split.class_names for split in splits.values()} == {("cat", "dog")}
    assert [len(split.records) for split in splits.values()] == [10, 4, 2]
    assert all(record.path.parent.name == ("cat", "dog")[record.label] for record in splits["train"].records)
    assert splits["test"].records[0].id == "test/cat/0.png"
    assert splits["test"].exif


def test_folder_source_ignores_hidden_and_other_files(tmp_path: Path) -> None:
    _tree(tmp_path, 3)
    for name in ("._0.png", "notes.txt", ".cache/1.png", "Thumbs.db"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"x")
    for name in ("deeper/a.JPG", "b.webp"):
        write_image(tmp_path / "cat" / name)
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    split = load_split(tmp_path, "train", val_fraction=0)
    found = [record.id for record in split.records if record.label == 0]
    assert found == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/b.webp", "cat/deeper/a.JPG"]


def test_load_splits_carves_val_and_test_without_split_folders(tmp_path: Path) -> None:
    splits = load_splits(_tree(tmp_path, 20), val_fraction=0.25)
    ids = {name: {record.id for record in split.records} for name, split in splits.items()}
    assert {name: split.class_counts() for name, split in splits.items()} == {
        "train": (10, 10),
        "val": (5, 5),
        "test": (5, 5),
    }
    assert len(ids["train"] | ids["val"] | ids["test"]) == 40
    assert splits["val"].origin == "0.25 of train, by class, seed 0"
    assert splits["train"].origin == "own files without test and val"
    assert load_split(tmp_path, "val", val_fraction=0.25) == splits["val"]
    assert load_split(tmp_path, "val", val_fraction=0.25, seed=1) != splits["val"]


def test_folder_source_refuses_a_class_unknown_to_train(tmp_path: Path) -> None:
    _tree(tmp_path / "train")
    _tree(tmp_path / "test", 1, ("cat", "dogs"))
    with pytest.raises(CalmError, match=r"unknown class folder 'dogs' in .*test; .*did you mean 'dog'"):
        load_split(tmp_path, "test")


@pytest.mark.parametrize("classes", [("cat",), ()])
def test_folder_source_refuses_a_single_class(tmp_path: Path, classes: tuple[str, ...]) -> None:
    _tree(tmp_path / "train", 2, classes)
    (tmp_path / "train").mkdir(exist_ok=True)
    with pytest.raises(CalmError, match="two class folders or more, found"):
        load_split(tmp_path, "train", layout="folder")


records = st.dictionaries(st.text(min_size=1), st.integers(0, 4), min_size=1, max_size=60).map(
    lambda labels: [Record(name, Path(name), label) for name, label in labels.items()]
)


@given(records, st.floats(0.01, 0.99), st.integers(0, 3), st.randoms())
def test_carve_is_a_stratified_partition_whatever_the_order(listed, fraction, seed, random) -> None:
    rest, part = carve(listed, fraction, seed, "val")
    assert sorted((*rest, *part), key=lambda r: r.id) == sorted(listed, key=lambda r: r.id)
    for label in {record.label for record in listed}:
        total = sum(record.label == label for record in listed)
        carved = sum(record.label == label for record in part)
        assert carved == min(max(round(fraction * total), 1), total - 1)
    shuffled = random.sample(listed, len(listed))
    assert {r.id for r in carve(shuffled, fraction, seed, "val")[1]} == {r.id for r in part}


def test_carve_for_different_ends_is_independent() -> None:
    listed = [Record(str(index), Path(str(index)), 0) for index in range(40)]
    parts = [{record.id for record in carve(listed, 0.5, 0, salt)[1]} for salt in ("val", "test")]
    assert 3 < len(parts[0] & parts[1]) < 17


@given(st.integers(2, 30), st.floats(0.05, 0.45))
def test_carve_moves_at_most_one_image_for_an_added_one(size: int, fraction: float) -> None:
    listed = [Record(str(index), Path(str(index)), 0) for index in range(size + 1)]
    before = {record.id for record in carve(listed[:-1], fraction, 0, "val")[1]}
    after = {record.id for record in carve(listed, fraction, 0, "val")[1]}
    assert len((before ^ after) - {str(size)}) <= 1


def test_detect_layout_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    (tmp_path / "readme.md").touch()
    with pytest.raises(CalmError) as caught:
        detect_layout(tmp_path)
    message = str(caught.value)
    for words in ("train_test_split.txt", "metadata/train/image_ids.txt", "CLASS/*.jpg", "found: readme.md"):
        assert words in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "unknown split 'valid': allowed are train, val, test, all; did you mean 'val'"),
        ({"layout": "cubs"}, "unknown layout 'cubs': allowed are auto, cub, metadata, folder; did you mean 'cub'"),
        ({"val_fraction": 0.5}, "val_fraction is 0.5"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        (
            {"val_fraction": 0.0, "split": "val"},
            "no image for split 'val'; splits with files of their own: train, test",
        ),
        ({"root": "nowhere"}, r"(?s)no data folder [^ ]*nowhere; give .*\n  folder: train/CLASS/\*.jpg"),
        ({"root": "image"}, r"no data folder [^ ]*image \(did you mean [^ ]*images\?\); give"),
        ({"root": "images.txt"}, "no data folder .*images.txt: it is a file"),
        ({"layout": "cub", "metadata_root": "."}, "the layout 'cub' has no such folder"),
    ],
)
def test_load_split_refuses_wrong_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    write_cub(tmp_path)
    given = {"split": "train", **arguments}
    root = tmp_path / str(given.pop("root", "."))
    with pytest.raises(CalmError, match=message):
        load_split(root, **given)  # type: ignore[arg-type]


def test_load_split_refuses_a_split_that_lost_its_last_record(tmp_path: Path) -> None:
    write_pack(tmp_path)
    write_lines(tmp_path / "metadata/val/image_ids.txt", [])
    with pytest.raises(CalmError, match=r"no image for split .val. \(listed by .*metadata/val/image_ids.txt\)"):
        load_split(tmp_path, "val", strict=False)


def test_load_splits_carves_a_lacking_test_beside_an_own_val(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train": [0, 1] * 10, "val": [0, 1]})
    splits = load_splits(tmp_path)
    assert [len(split.records) for split in splits.values()] == [18, 2, 2]
    assert splits["val"].origin == "own files"


def test_fingerprint_is_the_same_in_another_place_and_order(tmp_path: Path) -> None:
    here, there = (load_split(write_cub(tmp_path / name, masks=True), "train", val_fraction=0) for name in "ab")
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here) == fingerprint(replace(here, records=here.records[::-1]))
    assert len(fingerprint(here)) == 64


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("image_class_labels.txt", "2 1\n", "2 3\n"),
        ("bounding_boxes.txt", "2 2.0 1.0", "2 3.0 1.0"),
        ("classes.txt", "2 002.Bird_2", "2 002.Bird_two"),
        ("train_test_split.txt", "2 1\n", "2 0\n"),
    ],
)
def test_fingerprint_tells_what_changed(tmp_path: Path, file: str, old: str, new: str) -> None:
    before = fingerprint(load_split(write_cub(tmp_path), "train", val_fraction=0))
    edit(tmp_path / file, old, new)
    assert fingerprint(load_split(tmp_path, "train", val_fraction=0)) != before


def test_fingerprint_includes_file_sizes_if_told_to(tmp_path: Path) -> None:
    split = load_split(write_pack(tmp_path), "train")
    plain, sized = fingerprint(split), fingerprint(split, file_sizes=True)
    with split.records[0].path.open("ab") as file:
        file.write(b"!")
    assert fingerprint(split) == plain
    assert fingerprint(split, file_sizes=True) != sized
    split.records[0].path.unlink()
    with pytest.raises(CalmError, match="cannot look at image"):
        fingerprint(split, file_sizes=True)


def test_summary_counts(tmp_path: Path) -> None:
    found = summary(load_split(write_cub(tmp_path, masks=True), "test"))
    assert found.pop("fingerprint")
    assert found == {
        "split": "test",
        "images": 2,
        "classes": 3,
        "class_counts": {"001.Bird_1": 1, "003.Bird_3": 1},
        "with_boxes": 2,
        "with_masks": 2,
        "origin": "own files",
    }


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("Training Testing", ["train", "test"]),
        ("train VALID", ["train", "val"]),
        ("val test", ["val", "test"]),
        ("test", ["test"]),
        ("train dev testing", ["train", "val", "test"]),
    ],
)
def test_folder_source_takes_the_usual_names_of_splits(tmp_path: Path, folders: str, splits: list[str]) -> None:
    for folder in folders.split():
        _tree(tmp_path / folder, 3)
    source = open_source(tmp_path)
    assert list(source.splits) == splits
    for name, folder in zip(splits, folders.split(), strict=True):
        split = source.read(name)
        assert split.class_names == ("cat", "dog")
        assert {record.id.split("/")[0] for record in split.records} == {folder}
    taken = ", ".join(f"{folder}/ is {name}" for name, folder in zip(splits, folders.split(), strict=True))
    assert f"splits: {taken}" in check(tmp_path).description


def test_folder_source_takes_a_class_called_train_for_a_class(tmp_path: Path) -> None:
    _tree(tmp_path, 3, ("bus", "car", "train"))
    assert load_split(tmp_path, "train").class_names == ("bus", "car", "train")
    assert "splits: no folders of splits, so all images are train" in check(tmp_path).description


def test_folder_source_refuses_two_folders_of_a_split(tmp_path: Path) -> None:
    for folder in ("train", "val", "valid"):
        _tree(tmp_path / folder)
    with pytest.raises(CalmError, match=r"val and .*valid are both the split 'val': rename or remove one"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize("folders", [(), ("train", "val", "test"), ("test",)])
def test_load_split_reads_all_images(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders or (".",):
        _tree(tmp_path / folder)
    assert has_splits(tmp_path) == bool(folders)
    split = load_split(tmp_path, "all")
    assert split.name == "all"
    assert split.class_counts() == (5 * max(len(folders), 1),) * 2
    assert len({record.id for record in split.records}) == len(split.records)


def test_folder_source_sorts_numbers_by_value(tmp_path: Path) -> None:
    names = tuple(map(str, range(12)))
    split = load_split(_tree(tmp_path, 2, names), "train")
    assert split.class_names == names
    assert all(record.id.startswith(f"{record.label}/") for record in split.records)
    assert "classes: 0, 1, 2 and 9 more, in the order of their numbers" in check(tmp_path).description


def test_folder_source_follows_links_but_not_in_a_circle(tmp_path: Path) -> None:
    _tree(tmp_path / "photos", 3)
    _tree(tmp_path, 2, ("more",))
    write_image(tmp_path / "more" / "deeper" / "2.png")
    cat = tmp_path / "photos" / "cat"
    (cat / "more").symlink_to(tmp_path / "more")
    (cat / "again").symlink_to(tmp_path / "photos")
    (tmp_path / "more" / "deeper" / "up").symlink_to(cat)
    split = load_split(tmp_path / "photos", "all")
    cats = [record.id for record in split.records if record.label == 0]
    assert cats == [f"cat/{name}.png" for name in ("0", "1", "2", "more/0", "more/1", "more/deeper/2")]
    (cat / "lost.png").symlink_to(tmp_path / "nowhere")
    (cat / "self.png").symlink_to("self.png")
    (cat / "self").symlink_to("self")
    problems = check(tmp_path / "photos").errors
    assert [(problem.kind, problem.record) for problem in problems] == [
        ("missing-file", "cat/lost.png"),
        ("missing-file", "cat/self.png"),
    ]


def test_folder_source_counts_the_files_that_are_not_read(tmp_path: Path) -> None:
    _tree(tmp_path, 2)
    for name in (
        "a.heic",
        "b.HEIC",
        "notes.txt",
        "._0.png",
        ".DS_Store",
        "@eaDir/0.png/SYNOFILE_THUMB_M.jpg",
        "Thumbs.db",
    ):
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).touch()
    write_image(tmp_path / "cat/3.jpg").rename(tmp_path / "cat/3.jfif")
    split = load_split(tmp_path, "all")
    assert split.class_counts() == (3, 2)
    (problem,) = split.problems
    assert (problem.kind, problem.is_error) == ("not-read", False)
    assert problem.message == "2 .heic, 1 hidden .png, 1 hidden .jpg, 1 .txt"


def test_detect_layout_counts_the_endings_of_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.heic").touch()
    with pytest.raises(CalmError, match=r"endings of files: \.heic \(2\); read are .*\.jpg.*: turn other"):
        detect_layout(tmp_path)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("ab", "ab", (0, 1)),
        ("ab", "ba", (1, 0)),
        ("abcd", "db", (3, 1)),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], (0, 1, 3, 2)),  # sorted as text, sorted by value
        ("0123", "13", (1, 3)),
    ],
)
def test_match_classes_by_name(model: Sequence[str], data: Sequence[str], expected: tuple[int, ...]) -> None:
    assert match_classes(model, data, model="M", data="D") == expected


@pytest.mark.parametrize(("model", "data", "unnamed"), [("012", "abc", "M"), ("abc", "012", "D"), ("123", "012", "D")])
def test_match_classes_by_number_says_so(model: str, data: str, unnamed: str) -> None:
    with pytest.warns(UserWarning, match=f"^{unnamed} has no names"):
        assert match_classes(model, data, model="M", data="D") == (0, 1, 2)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("ab", "ac", "only in D: c\n  only in M: b"),
        ("ab", "AB", "names differ in upper and lower case"),
        ("abc", "01", "M knows 3 classes, D has 2"),
        ("0123", "ab", "M knows 4 classes, D has 2"),
        ("abcdefgh", "ab1234567", "only in D: 1, 2, 3, 4, 5 and 2 more\n  only in M: c, d, e, f, g and 1 more"),
        ("aab", "ab", "only in D: a\n"),
    ],
)
def test_match_classes_tells_whose_names_are_which(model: str, data: str, message: str) -> None:
    with pytest.raises(CalmError) as caught:
        match_classes(model, data, model="M", data="D")
    assert message in str(caught.value)
