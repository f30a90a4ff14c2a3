"""calm.data.check: everything wrong with a data set in one report."""

from __future__ import annotations

import re
import shutil
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
from data_files import edit, write_broken, write_cub, write_image, write_lines, write_pack
from PIL import Image

from calm import images
from calm.cli import main
from calm.data.check import check, check_splits, drop_bad, load_checked
from calm.data.cues import read_pairs
from calm.data.dataset import ImageDataset
from calm.data.loading import load_splits
from calm.data.records import KINDS, Report
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.files import in_threads
from calm.images import Preprocessing
from calm_birds import write_birds


def _kinds(report: Report) -> list[str]:
    return [problem.kind for problem in report.problems]


def test_check_finds_no_problem_in_a_good_data_set(tmp_path: Path) -> None:
    report = check(write_pack(tmp_path))
    assert report.ok
    assert report.problems == ()
    layout, classes, images = str(report).splitlines()
    assert layout.startswith("layout metadata: metadata/train/image_ids.txt")
    assert classes.startswith("classes: ")
    assert images == "6 train, 2 val, 2 test images: no errors, no warnings"
    assert report.summary["images"] == {"train": 6, "val": 2, "test": 2}
    report.raise_if_bad()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind", ["missing-file", "empty-file", "not-an-image", "truncated", "too-large"])
def test_check_reports_a_bad_image_with_its_path(
    tmp_path: Path, kind: str, decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # from which on Pillow warns
    write_pack(tmp_path)
    broken = write_broken(tmp_path / "broken")[kind]
    target = tmp_path / "images/train/2.png"
    target.unlink()
    if broken.exists():
        shutil.copy(broken, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check(tmp_path, decode=decode)
    (problem,) = [problem for problem in report.errors if problem.kind != "size-mismatch"]
    assert (problem.kind, problem.split, problem.file) == (kind, "train", target)
    assert problem.record == "images/train/2.png"
    for words in (KINDS[kind].title, KINDS[kind].fix, str(target), problem.message):
        assert words in str(report)


LABELS, BOXES, IDS, SIZES = "class_labels.txt", "localization.txt", "image_ids.txt", "image_sizes.txt"


@pytest.mark.parametrize(
    ("file", "old", "new", "kind", "line", "words"),
    [
        (LABELS, "2.png,0", "2.png,cat", "label-not-integer", 3, "'cat' for images/train/2.png"),
        (LABELS, "2.png,0", "2.png,1.0", "label-not-integer", 3, "'1.0'"),
        (LABELS, "2.png,0", "2.png,2", "label-range", 3, "2 for images/train/2.png: classes are 0 .. 1"),
        (LABELS, "2.png,0", "2.png,-1", "label-range", 3, "-1 for"),
        (LABELS, "2.png,0", "2.png 0", "malformed-line", 3, "needs 2 fields"),
        (LABELS, "images/train/2.png,0\n", "", "no-label", 3, "images/train/2.png has no line"),
        (LABELS, "2.png,0\n", "2.png,0\nimages/train/2.png,1\n", "contradiction", 4, "line 3 says 0"),
        (LABELS, "2.png,0\n", "2.png,0, 1\n", "several-labels", 3, "2.png,0,1"),
        (LABELS, "2.png,0\n", "2.png,0\nimages/train/2.png,0\n", "repeated-line", 4, "images/train/2.png,0"),
        (IDS, "images/train/2.png\n", "", "unlisted-id", 3, "images/train/2.png is not in image_ids.txt"),
        (IDS, "2.png\n", "2.png\nimages/train/1.png\n", "duplicate-id", 4, "listed before in line 2"),
        (IDS, "images/train/2.png", "images/../../2.png", "bad-path", 3, "images/../../2.png"),
        (IDS, "images/train/2.png", "/images/train/2.png", "bad-path", 3, "/images/train/2.png"),
        (BOXES, "2.png,1,1,5,4", "2.png,5,1,1,4", "box-inverted", 3, "5,1,1,4"),
        (BOXES, "2.png,1,1,5,4", "2.png,1,1,8,4", "box-outside", 3, "the image is 8 x 6 pixels"),
        (BOXES, "2.png,1,1,5,4", "2.png,-1,1,5,4", "box-outside", 3, "-1,1,5,4"),
        (BOXES, "2.png,1,1,5,4", "2.png,1,1,1,4", "box-thin", 3, "1,1,1,4"),
        (BOXES, "2.png,1,1,5,4", "2.png,1,1,5.5,4", "malformed-line", 3, "in whole pixels"),
        (BOXES, "2.png,1,1,5,4", "2.png,1,1,5", "malformed-line", 3, "in whole pixels"),
        (BOXES, "2.png,1,1,5,4", "2.png,../m.png,", "malformed-line", 3, "as relative paths"),
        (BOXES, "train/2.png,1,1,5,4", "train/9.png,1,1,5,4", "unlisted-id", 3, "images/train/9.png"),
        (SIZES, "2.png,8,6", "2.png,0,6", "malformed-line", 3, "'0,6'"),
        (SIZES, "2.png,8,6", "2.png,8", "malformed-line", 3, "needs 3 fields"),
    ],
)
def test_check_reports_a_bad_line_with_file_line_and_value(
    tmp_path: Path, file: str, old: str, new: str, kind: str, line: int, words: str
) -> None:
    write_pack(tmp_path)
    path = tmp_path / "metadata/train" / file
    edit(path, old, new)
    report = check(tmp_path)
    found = [problem for problem in report.problems if problem.kind == kind and problem.file.name != "x"]
    places = {(problem.file.name, problem.line) for problem in found}
    where = IDS if kind == "no-label" else file
    assert (where, line) in places or kind == "unlisted-id", report
    assert any(words in problem.message for problem in found), report
    assert report.ok == (KINDS[kind].severity == "warning")
    for words in (KINDS[kind].title, KINDS[kind].fix, found[0].place):
        assert words in str(report)


def test_check_reports_a_wrong_label_once(tmp_path: Path) -> None:
    write_pack(tmp_path)
    edit(tmp_path / "metadata/val/class_labels.txt", "0.png,0", "0.png,zero")
    assert [problem.kind for problem in check(tmp_path).errors] == ["label-not-integer"]


def test_left_out_counts_lines_of_no_image(tmp_path: Path) -> None:
    write_cub(tmp_path)
    with (tmp_path / "images.txt").open("a") as file:
        file.write("x y\nz\n")
    report = check(tmp_path)
    assert report.left_out("train") == len(report.errors) == 2


def test_check_reports_a_stated_size_that_differs_from_the_file(tmp_path: Path) -> None:
    write_pack(tmp_path)
    edit(tmp_path / "metadata/val/image_sizes.txt", "0.png,8,6", "0.png,6,8")
    (problem,) = check(tmp_path).problems
    assert problem.kind == "size-mismatch"
    assert "is 8 x 6 pixels, stated is 6 x 8" in problem.message


def test_check_compares_boxes_with_the_files_without_stated_sizes(tmp_path: Path) -> None:
    write_pack(tmp_path)
    (tmp_path / "metadata/val/image_sizes.txt").unlink()
    edit(tmp_path / "metadata/val/localization.txt", "0.png,1,1,5,4", "0.png,1,1,5,6")
    (problem,) = check(tmp_path).problems
    assert (problem.kind, problem.record) == ("box-outside", "images/val/0.png")


def test_check_reports_missing_and_unreadable_masks(tmp_path: Path) -> None:
    write_pack(tmp_path)
    write_image(tmp_path / "masks/good.png")
    (tmp_path / "masks/bad.png").write_text("<html>")
    write_lines(
        tmp_path / "metadata/val/localization.txt",
        ["images/val/0.png,masks/good.png,masks/gone.png", "images/val/1.png,masks/bad.png,"],
    )
    report = check(tmp_path)
    assert _kinds(report) == ["missing-mask", "missing-mask"]
    assert {problem.file.name for problem in report.errors} == {"gone.png", "bad.png"}
    assert report.bad_ids("val") == {"images/val/0.png", "images/val/1.png"}


def test_check_splits_reports_an_image_in_two_splits_for_train(tmp_path: Path) -> None:
    write_pack(tmp_path)
    for file, line in ((IDS, "images/test/0.png"), (LABELS, "images/test/0.png,0")):
        path = tmp_path / "metadata/train" / file
        path.write_text(path.read_text() + line + "\n")
    splits = load_splits(tmp_path)
    report = check_splits(splits)
    (problem,) = report.errors
    assert (problem.kind, problem.split) == ("two-splits", "train")
    assert "is in train and in test" in problem.message
    assert len(drop_bad(splits["train"], report).records) == 6
    assert len(drop_bad(splits["test"], report).records) == 2


def test_check_finds_images_of_two_splits_through_links_and_copies(tmp_path: Path) -> None:
    for index in range(8):
        write_image(tmp_path / "train" / "ab"[index % 2] / f"{index}.png", (8, 8), index)
    first = tmp_path / "train/a/0.png"
    for path in ("test/a/copy.png", "val/a/copy.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(first.read_bytes())
    (tmp_path / "val/a/link.png").symlink_to(tmp_path / "train/b/1.png")
    other = tmp_path / "test/a/of the same length.png"
    other.write_bytes(first.read_bytes()[:-1] + b"x")
    report = check(tmp_path, decode=False)
    found = {(problem.kind, problem.split, problem.record) for problem in report.problems if problem.kind in KINDS}
    assert {entry for entry in found if entry[0] in ("two-splits", "copy")} == {
        ("two-splits", "train", "train/b/1.png"),
        ("copy", "train", "train/a/0.png"),
        ("copy", "val", "val/a/copy.png"),
    }
    assert f"is in train, and the same content in test as {tmp_path / 'test/a/copy.png'}" in str(report)


def test_train_data_of_several_labels_are_refused_with_the_reason(tmp_path: Path) -> None:
    for index in range(60):
        write_image(tmp_path / "train" / "ab"[index % 2] / f"{index}.png", (8, 8), index)
    for split in ("val", "test"):
        for name in "ab":
            write_image(tmp_path / split / name / "0.png", (8, 8), 100 + 2 * (split == "val") + (name == "a"))
    for index in range(0, 44, 2):
        shutil.copy(tmp_path / "train" / "a" / f"{index}.png", tmp_path / "train" / "b" / f"copy {index}.png")
        if index == 2:
            _, report = load_checked(tmp_path)
            assert [problem.kind for problem in report.problems] == ["two-classes"] * 2
            assert f"the same content as {tmp_path / 'train/a/2.png'}" in str(report)
    with pytest.raises(CalmError, match=r"22 of 82 images of .* several classes.*gives each image one class"):
        load_checked(tmp_path)
    (tmp_path / "labels.csv").touch()
    for split in ("train", "val", "test"):
        shutil.rmtree(tmp_path / split)
    with pytest.raises(CalmError, match=r"labels\.csv: such annotations .*gives each image one class"):
        load_checked(tmp_path)


def test_check_finds_a_linked_folder_that_is_a_split_again(tmp_path: Path) -> None:
    for index in range(4):
        write_image(tmp_path / "train" / "ab"[index % 2] / f"{index}.png", (8, 8), index)
    (tmp_path / "test").symlink_to("train")
    report = check(tmp_path)
    assert [(problem.kind, problem.split) for problem in report.errors] == [("two-splits", "train")] * 4
    with pytest.raises(CalmError, match="a test image seen in training is a leak"):
        load_checked(tmp_path)


def test_load_checked_reports_a_class_that_lost_its_images(tmp_path: Path) -> None:
    for index in range(9):
        write_image(tmp_path / ("train", "val", "test")[index // 3] / "abc"[index % 3] / "0.png", (8, 8), index)
    (tmp_path / "train/b/0.png").rename(tmp_path / "train/b/0.heic")
    _, report = load_checked(tmp_path)
    text = report.text(1)
    for line in (
        "splits: train/ is train, val/ is val, test/ is test",
        "2 train, 3 val, 3 test images: no errors, 2 warnings",
        "1 of 3 classes have no image in train: b",
        f"[train] {tmp_path / 'train'}: 1 .heic",
    ):
        assert line in text


def test_check_warns_of_classes_without_images(tmp_path: Path) -> None:
    report = check(write_cub(tmp_path))
    assert report.ok
    assert _kinds(report) == ["empty-class", "empty-class"]
    assert "1 of 3 classes have no image in train: 002.Bird_2" in str(report)
    assert "present_classes_only" in str(report)
    assert not check(tmp_path, present_classes_only=True).problems


def test_load_checked_raises_all_problems_at_once(tmp_path: Path) -> None:
    write_pack(tmp_path)
    (tmp_path / "images/train/0.png").unlink()
    (tmp_path / "images/train/1.png").write_bytes(b"")
    edit(tmp_path / "metadata/train/class_labels.txt", "2.png,0", "2.png,9")
    edit(tmp_path / "metadata/test/localization.txt", "1.png,1,1,5,4", "1.png,1,1,5,9")
    with pytest.raises(CalmError) as caught:
        load_checked(tmp_path)
    for words in ("4 errors", "0.png", "0 bytes", "9 for images/train/2.png", "1,1,5,9", "--skip-bad"):
        assert words in str(caught.value)


def test_report_shows_a_few_problems_of_a_kind(tmp_path: Path) -> None:
    write_pack(tmp_path, {"train": [0, 1] * 40})
    shutil.rmtree(tmp_path / "images")
    text = str(check(tmp_path))
    assert "missing image (80)" in text
    assert "... and 75 more" in text
    assert len(text.splitlines()) < 15


def test_load_checked_leaves_bad_images_out_and_counts_them(tmp_path: Path) -> None:
    write_pack(tmp_path)
    (tmp_path / "images/train/0.png").unlink()
    edit(tmp_path / "metadata/train/class_labels.txt", "1.png,0", "1.png,x")
    edit(tmp_path / "metadata/train/localization.txt", "4.png,1,1,5,4", "4.png,1,1,0,4")
    edit(tmp_path / "metadata/train/localization.txt", "5.png,1,1,5,4", "5.png,1,1,1,4")
    splits, report = load_checked(tmp_path, skip_bad=True)
    assert [record.id[-5:] for record in splits["train"].records] == ["2.png", "3.png", "5.png"]
    assert {name: report.left_out(name) for name in splits} == {"train": 3, "val": 0, "test": 0}
    assert report.summary["left_out"]["train"] == 3
    assert splits["train"].problems == ()
    ImageDataset(splits["train"], eval_transform(Preprocessing((4, 4))), cache=True)


def test_load_checked_raises_if_no_image_is_left(tmp_path: Path) -> None:
    write_pack(tmp_path)
    shutil.rmtree(tmp_path / "images/val")
    with pytest.raises(CalmError, match="no image of split 'val' is without an error"):
        load_checked(tmp_path, skip_bad=True)


def test_check_splits_reports_problems_of_carved_splits_once(tmp_path: Path) -> None:
    """What is wrong in the lists of train is not said again for the split carved from it."""
    write_cub(tmp_path)
    edit(tmp_path / "image_class_labels.txt", "1 1\n", "1 77\n")
    report = check_splits(load_splits(tmp_path, strict=False, val_fraction=0.3))
    assert _kinds(report).count("label-range") == 1


def test_check_shows_progress_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pack(tmp_path)
    check(tmp_path, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    check(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "checking images" in err


def test_check_changes_nothing(tmp_path: Path) -> None:
    write_pack(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    filters = list(warnings.filters)
    check(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(warnings.filters) == filters


def test_check_names_the_flag_of_other_bands_and_bits(tmp_path: Path) -> None:
    for number, (split, name) in enumerate(product(("train", "test"), "ab")):
        (tmp_path / split / name).mkdir(parents=True)
        values = np.full((6, 7, 13), 290 + number, np.uint16)
        tifffile.imwrite(tmp_path / split / name / "0.tif", values, photometric="minisblack", planarconfig="contig")
    report = check(tmp_path)
    assert _kinds(report) == ["other-bands"] * 4
    assert "train with --reading.channels 13" in str(report)
    report = check(tmp_path, channels=13)
    assert report.ok
    assert _kinds(report) == ["other-depth"] * 2
    assert "the highest value of 2 is 293: read them by --reading.bits 9" in str(report)
    assert not check(tmp_path, channels=13, bits=9).problems


def test_check_reports_floating_point_images_but_not_such_masks(tmp_path: Path) -> None:
    write_cub(tmp_path, masks=True)
    mask = sorted((tmp_path / "segmentations").rglob("*.png"))[0]
    Image.open(mask).convert("F").save(mask, format="TIFF")
    assert check(tmp_path).ok
    for channels, shape in ((3, (6, 7)), (13, (13, 6, 7))):
        for name in "ab":
            (tmp_path / f"{channels}" / "train" / name).mkdir(parents=True)
            path = tmp_path / f"{channels}" / "train" / name / "0.tif"
            tifffile.imwrite(path, np.full(shape, ord(name), np.float32), photometric="minisblack")
        assert _kinds(check(tmp_path / f"{channels}", channels=channels)) == ["floating-point"] * 2


def test_check_warns_of_no_depth_that_is_used(tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / "train" / name / "8 bits.png", seed=ord(name))
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    assert not check(tmp_path).problems
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "train" / "a" / "0.tif")
    (problem,) = check(tmp_path).problems
    assert "the highest value of 2 is 70,000: read them by --reading.bits 17" in problem.message


def test_check_reports_a_mask_of_another_shape_than_its_image(tmp_path: Path) -> None:
    write_cub(tmp_path, masks=True)
    mask = sorted((tmp_path / "segmentations").rglob("*.png"))[0]
    Image.open(mask).transpose(Image.Transpose.ROTATE_90).save(mask)
    (problem,) = check(tmp_path).errors
    assert (problem.kind, problem.file) == ("missing-mask", mask)
    assert "its image as stored" in problem.message


def test_kinds_are_all_produced_by_these_tests() -> None:
    """A kind nobody can produce would be dead; a kind nobody tests would be unproven."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_data_*.py"))
    missing = [kind for kind in KINDS if not re.search(rf'"{kind}"', text)]
    assert not missing


def test_check_explains_a_split_without_any_good_line(tmp_path: Path) -> None:
    write_pack(tmp_path)
    write_lines(tmp_path / "metadata/val/class_labels.txt", ["images/val/0.png,a", "images/val/1.png,b"])
    with pytest.raises(CalmError, match=r"(?s)'a' for images/val/0.png.*'b' for images/val/1.png"):
        check(tmp_path)


def test_check_refuses_less_than_one_thread(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="workers is 0"):
        check(write_pack(tmp_path), workers=0)
    assert check(tmp_path, workers=1).ok


def test_in_threads_keeps_the_order_and_passes_errors_on() -> None:
    assert list(in_threads(lambda number: number * 2, range(3000))) == list(range(0, 6000, 2))
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 // number, range(3)))


# Files of cue localization


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    write_birds(tmp_path / "birds", species=4, images_per_species=2, test_fraction=0.5, size=64)
    return tmp_path / "birds"


def test_check_counts_the_pairs_of_cue_localization(birds: Path) -> None:
    report = check(birds)
    assert report.ok
    layout, classes, cues, images = str(report).splitlines()
    assert layout.startswith("layout cub: images.txt, ")
    assert re.fullmatch(r"classes: (\S+, ){2}\S+ and 1 more", classes)
    pairs = {count: len(read_pairs(birds, (count,))) for count in range(1, 8)}
    assert sum(pairs.values()) == 6
    said = ", ".join(f"{number} in {count}" for count, number in pairs.items() if number)
    assert (
        cues == "cue localization: 15 parts in 7 groups, 312 attributes; pairs of classes by differing groups: " + said
    )
    assert images == "4 train, 4 test images: no errors, no warnings"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("parts/part_locs.txt", r"\A1 1 .*", "1 1 x 2 1", "part_locs.txt:1: '1 1 x 2 1' is not"),
        ("parts/part_locs.txt", r"\A1 1 .*", "99 1 1 2 1", "part_locs.txt:1: no image 99 in images.txt"),
        ("attributes/attributes.txt", r"\A1 ", "2 ", "attributes.txt:1: '2 has_"),
        ("attributes/class_attribute_labels_continuous.txt", r"\A.*\n", "", "describes 3 classes, the data set has 4"),
        ("parts/groups.yaml", "", "[]", "needs a list of 1 to 31 groups"),
    ],
)  # fmt: skip
def test_check_cue_files_reports_wrong_files(
    birds: Path, file: str, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = birds / file
    text = path.read_text() if path.exists() else ""
    path.write_text(re.sub(old, new, text, count=1))
    (problem,) = check(birds).problems
    assert (problem.kind, problem.is_error) == ("cue-file", True)
    assert message in problem.message
    assert main(["data", "check", str(birds)]) == 1
    said = capsys.readouterr().out
    assert message in said
    assert "cue localization: " not in said


def test_check_cue_files_accepts_parts_without_attributes(birds: Path) -> None:
    shutil.rmtree(birds / "attributes")
    report = check(birds)
    assert report.problems == ()
    assert "no cue localization: there is parts/ but no attributes/" in report.description
    shutil.rmtree(birds / "parts")
    assert not any("cue" in line for line in check(birds).description)
