"""Small archives of the published structure become data sets that ``calm data check`` passes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from test_data_prepare_archives import make_tar, make_zip

from calm.cli import main
from calm.data import archives, load_splits, prepare as sets
from calm.data.archives import PUBLISHED, check_digest
from calm.data.check import check
from calm.data.cues import read_class_attributes
from calm.data.prepare import prepare
from calm.errors import CalmError


def picture(side: int = 16, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if kind == "JPEG" else "L", (side, side), 200).save(file, kind)
    return file.getvalue()


def cub_archives(folder: Path) -> Path:
    names = [f"00{c}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 2) for i in (1, 2)]
    lines = {
        "images.txt": [f"{n} {name}" for n, name in enumerate(names, 1)],
        "classes.txt": ["1 001.Bird_1", "2 002.Bird_2"],
        "image_class_labels.txt": ["1 1", "2 1", "3 2", "4 2"],
        "train_test_split.txt": ["1 1", "2 0", "3 1", "4 0"],
        "bounding_boxes.txt": [f"{n} 1.0 2.0 8.0 9.0" for n in range(1, 5)],
        "attributes/class_attribute_labels_continuous.txt": ["80 20", "20 80"],
    }
    files = {f"CUB_200_2011/{name}": "\n".join([*rows, ""]).encode() for name, rows in lines.items()}
    files |= {f"CUB_200_2011/images/{name}": picture() for name in names}
    files["attributes.txt"] = b"1 has_bill_shape::curved\n2 has_bill_shape::hooked\n"
    folder.mkdir()
    make_tar(folder / "CUB_200_2011.tgz", files)
    masks = {f"segmentations/{name[:-4]}.png": picture(kind="PNG") for name in names}
    make_tar(folder / "segmentations.tgz", masks)
    return folder


def any_md5(path: Path, algorithm: str, expected: str) -> str:
    """The made archives are not the published ones: their MD5 is not compared, a given SHA-256 is."""
    return "" if algorithm == "md5" else check_digest(path, algorithm, expected)


def test_prepare_cub_puts_attribute_names_and_segmentations_in_place(tmp_path):
    source = cub_archives(tmp_path / "from")
    prepared = prepare("cub", [source], tmp_path / "out", partial=True)
    base = tmp_path / "out" / "dataset" / "CUB"
    assert prepared.root == base
    assert (base / "attributes" / "attributes.txt").is_file()
    assert read_class_attributes(base)[1].tolist() == [[True, False], [False, True]]
    assert len(list((base / "segmentations").rglob("*.png"))) == 4
    assert check(base).ok
    assert "md5" in str(prepared)
    assert "4 images, expected 11,788" in str(prepared)
    again = prepare("cub", [source], tmp_path / "out", partial=True)
    assert again.counts == prepared.counts


def test_prepare_cub_refuses_another_checksum_or_count_and_leaves_nothing(tmp_path, monkeypatch):
    source = cub_archives(tmp_path / "from")
    with pytest.raises(CalmError, match=r"md5 is .*data\.caltech\.edu"):
        prepare("cub", [source], tmp_path / "out")
    monkeypatch.setattr(archives, "check_digest", any_md5)
    with pytest.raises(CalmError, match="4 images, expected 11,788"):
        prepare("cub", [source], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jpg"))
    for name, value in {"CUB_IMAGES": 4, "CUB_CLASSES": 2, "CUB_ATTRIBUTES": 2, "CUB_PAIRS": {1: 1}}.items():
        monkeypatch.setattr(sets, name, value)
    (source / "segmentations.tgz").unlink()
    prepared = prepare("cub", [source], tmp_path / "out")
    assert any("segmentations.tgz" in note for note in prepared.notes)


def test_prepare_names_an_absent_archive_with_its_address(tmp_path):
    make_zip(tmp_path / "other.zip", {"a": b"x"})
    for name, address in {"cub": "data.caltech.edu", "tiny-imagenet": "cs231n", "ilsvrc": "image-net.org"}.items():
        with pytest.raises(CalmError, match=address):
            prepare(name, [tmp_path / "other.zip"], tmp_path / "out")
    with pytest.raises(CalmError, match="does not exist"):
        prepare("cub", [tmp_path / "nothing"], tmp_path / "out")


def tiny_archive(path: Path, train: int = 5, test: int = 2) -> Path:
    wnids = ["n00000003", "n00000001", "n00000002"]
    files = {
        "wnids.txt": "\n".join(wnids).encode(),
        "words.txt": b"".join(f"{w}\tthing {w[-1]}, stuff\n".encode() for w in wnids),
    }
    held = []
    for place, wnid in enumerate(wnids):
        names = [f"{wnid}_{i}.JPEG" for i in range(train)]
        boxes = "".join(f"{name}\t{i}\t1\t9\t{i + 5}\n" for i, name in enumerate(names))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = boxes.encode()
        files |= {f"train/{wnid}/images/{name}": picture() for name in names}
        held += [(f"val_{11 - place - 3 * i}.JPEG", wnid, i) for i in range(test)]
    files["val/val_annotations.txt"] = "".join(f"{n}\t{w}\t0\t{i}\t7\t15\n" for n, w, i in held).encode()
    files |= {f"val/images/{name}": picture() for name, *_ in held}
    return make_zip(path, {f"tiny-imagenet-200/{name}": data for name, data in files.items()})


def test_prepare_tiny_imagenet_writes_the_metadata_format(tmp_path, monkeypatch):
    for name, value in {"TINY_TRAIN": 3, "TINY_VAL": 2, "TINY_TEST": 2}.items():
        monkeypatch.setattr(sets, name, value)
    archive = tiny_archive(tmp_path / "tiny-imagenet-200.zip")
    out = tmp_path / "pack"
    prepare("tiny-imagenet", [archive], out, classes="n00000002,n00000003", partial=True)
    assert (out / "classes.txt").read_text() == "0 n00000002 thing 2, stuff\n1 n00000003 thing 3, stuff\n"
    assert (out / "metadata/val/localization.txt").read_text().splitlines() == [
        f"images/val/{w}/{w}_{i}.JPEG,{i},1,9,{i + 5}" for w in ("n00000002", "n00000003") for i in (3, 4)
    ]
    assert (out / "metadata/test/localization.txt").read_text().splitlines() == [
        "images/test/n00000002/val_6.JPEG,0,1,7,15",
        "images/test/n00000002/val_9.JPEG,0,0,7,15",
        "images/test/n00000003/val_8.JPEG,0,1,7,15",
        "images/test/n00000003/val_11.JPEG,0,0,7,15",
    ]
    assert (out / "metadata/train/localization.txt").read_text() == "\n"
    assert (
        (out / "metadata/train/image_sizes.txt")
        .read_text()
        .startswith("images/train/n00000002/n00000002_0.JPEG,16,16\n")
    )
    assert check(out).ok
    assert {name: len(split.records) for name, split in load_splits(out, ("train", "val", "test")).items()} == {
        "train": 6,
        "val": 4,
        "test": 4,
    }
    with pytest.raises(CalmError, match="other classes"):
        prepare("tiny-imagenet", [archive], out, classes="n00000001", partial=True)
    with pytest.raises(CalmError, match="2 classes, expected 200"):  # all of them are asked for
        prepare("tiny-imagenet", [archive], out)
    prepare("tiny-imagenet", [archive], tmp_path / "again", classes=str(out / "classes.txt"), partial=True)
    assert (tmp_path / "again/classes.txt").read_text() == (out / "classes.txt").read_text()


@pytest.mark.parametrize("classes", ["n00000009", "goldfish", "n00000001,n00000001"])
def test_prepare_tiny_imagenet_refuses_unknown_classes(tmp_path, classes):
    archive = tiny_archive(tmp_path / "tiny-imagenet-200.zip")
    with pytest.raises(CalmError, match="class"):
        prepare("tiny-imagenet", [archive], tmp_path / "out", classes=classes, partial=True)
    assert not (tmp_path / "out").exists()


def test_read_classes_accepts_as_many_as_there_are():
    """Together they are longer than the name of a file can be."""
    ids = [f"n{number:08d}" for number in range(200)]
    assert sets.read_classes(",".join(ids)) == ids
    with pytest.raises(CalmError, match="no WordNet id"):
        sets.read_classes(",".join([*ids, "cat"]))


def lists(name: str, images: dict[str, str]) -> dict[str, bytes]:
    files = {}
    for split, image in images.items():
        base = f"metadata/{name}/{split}"
        files[f"{base}/image_ids.txt"] = f"{image}\n".encode()
        files[f"{base}/class_labels.txt"] = f"{image},0\n".encode()
        files[f"{base}/image_sizes.txt"] = f"{image},16,16\n".encode()
    return files


@pytest.fixture
def ilsvrc(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(archives, "check_digest", any_md5)
    monkeypatch.setattr(sets, "ILSVRC", {"train": 1, "val": 1, "val2": 1})
    source = tmp_path / "from"
    source.mkdir()
    inner = make_tar(tmp_path / "n01440764.tar", {"n01440764_1.JPEG": picture()}, "w").read_bytes()
    make_tar(source / "ILSVRC2012_img_train.tar", {"n01440764.tar": inner}, "w")
    make_tar(source / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": picture()}, "w")
    make_tar(source / "imagenetv2-top.tar.gz", {"imagenetv2-top-format-val/0/0.jpeg": picture()})
    return source


ILSVRC_IDS = {
    "train": "train/n01440764/n01440764_1.JPEG",
    "val": "val2/0/0.jpeg",
    "test": "val/ILSVRC2012_val_00000001.JPEG",
}


def test_prepare_ilsvrc_puts_images_where_the_released_lists_look(tmp_path, ilsvrc):
    make_zip(ilsvrc / "metadata.zip", lists("ILSVRC", ILSVRC_IDS))
    prepared = prepare("ilsvrc", [ilsvrc], tmp_path / "out")
    assert (tmp_path / "out/dataset/ImageNetV2/val2/0/0.jpeg").is_file()
    assert prepared.metadata_root == tmp_path / "out/metadata/ILSVRC"
    assert check(prepared.root, metadata_root=prepared.metadata_root).ok


def test_place_metadata_fetches_from_an_address_with_its_checksum(tmp_path, ilsvrc):
    archive = make_zip(tmp_path / "lists.zip", lists("ILSVRC", ILSVRC_IDS))
    url, digest = archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(CalmError, match="sha256 is"):
        prepare("ilsvrc", [ilsvrc], tmp_path / "out", metadata_url=url, metadata_sha256="0" * 64)
    assert not (tmp_path / "out/metadata/ILSVRC").exists()
    prepared = prepare("ilsvrc", [ilsvrc], tmp_path / "out", metadata_url=url, metadata_sha256=digest)
    assert check(prepared.root, metadata_root=prepared.metadata_root).ok
    assert [path.name for path in (tmp_path / "out/metadata").iterdir()] == ["ILSVRC"]
    again = prepare("ilsvrc", [ilsvrc], tmp_path / "out", metadata_url=url)
    assert f"nothing fetched from {url}: the lists are in {prepared.metadata_root}" in "".join(again.notes)
    at_hand = make_zip(ilsvrc / "metadata.zip", lists("ILSVRC", ILSVRC_IDS))
    other = prepare("ilsvrc", [ilsvrc], tmp_path / "other", metadata_url=url)
    assert f"nothing fetched from {url}: {at_hand} was taken" in other.notes


HASHED = f"0/{'af' * 20}.jpeg"


def test_name_as_listed_renames_images_named_by_hashes(tmp_path, ilsvrc):
    """Today's archives of ImageNetV2 and the mapping that the published lists have for them."""
    make_tar(ilsvrc / "imagenetv2-top.tar.gz", {f"imagenetv2-top-format-val/{HASHED}": picture()})
    prepared = prepare("ilsvrc", [ilsvrc], tmp_path / "out")
    assert any("named by hashes" in note for note in prepared.notes)
    mapping = {"metadata/ILSVRC/val/mapping.txt": f"0/0.jpeg, {HASHED}\n0/1.jpeg, {HASHED}\n".encode()}
    make_zip(ilsvrc / "metadata.zip", lists("ILSVRC", ILSVRC_IDS) | mapping)
    other = tmp_path / "out/dataset/ImageNetV2/val2/0" / f"{'b' * 40}.jpeg"
    other.write_bytes(picture())
    notes = prepare("ilsvrc", [ilsvrc], tmp_path / "out", partial=True).notes
    assert any(f"has no name for 1 images, the first is {other}" in note for note in notes)
    other.unlink()
    for _ in range(2):
        prepared = prepare("ilsvrc", [ilsvrc], tmp_path / "out")
        assert [path.name for path in (tmp_path / "out/dataset/ImageNetV2/val2/0").iterdir()] == ["0.jpeg"]
    assert check(prepared.root, metadata_root=prepared.metadata_root).ok


@pytest.mark.parametrize("line", [f"../../0.jpeg, {HASHED}", f"0/0.jpeg {HASHED}", "0/0.jpeg, ../x.jpeg"])
def test_name_as_listed_refuses_a_mapping_that_names_other_files(tmp_path, ilsvrc, line):
    make_tar(ilsvrc / "imagenetv2-top.tar.gz", {f"imagenetv2-top-format-val/{HASHED}": picture()})
    mapping = {"metadata/ILSVRC/val/mapping.txt": line.encode()}
    make_zip(ilsvrc / "metadata.zip", lists("ILSVRC", ILSVRC_IDS) | mapping)
    with pytest.raises(CalmError, match=r"mapping\.txt:1"):
        prepare("ilsvrc", [ilsvrc], tmp_path / "out")


def test_place_metadata_fetches_the_published_lists_by_name(tmp_path, ilsvrc, monkeypatch):
    """The published archive is that of the whole repository: one folder, named by the commit."""
    inside = {f"wsolevaluation-e99726/{name}": data for name, data in lists("ILSVRC", ILSVRC_IDS).items()}
    archive = make_zip(tmp_path / "repository.zip", inside)
    published = PUBLISHED["metadata"]
    assert urlsplit(published.url).scheme == "https"
    monkeypatch.setitem(PUBLISHED, "metadata", published._replace(url=archive.as_uri()))
    prepared = prepare("ilsvrc", [ilsvrc], tmp_path / "out", metadata_url="published")
    assert check(prepared.root, metadata_root=prepared.metadata_root).ok


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost/x.zip", "only https"),
        ("https://localhost:1/x.zip", "without a network"),
        ("https://local host/x.zip", "cannot fetch"),
        ("https://localhost:port/x.zip", "cannot fetch"),
    ],
)
def test_download_explains_an_address_that_cannot_be_fetched(tmp_path, ilsvrc, url, message):
    with pytest.raises(CalmError, match=message):
        prepare("ilsvrc", [ilsvrc], tmp_path / "out", metadata_url=url)


def test_prepare_openimages_merges_images_and_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "OPENIMAGES", {"train": 1, "val": 1, "test": 1})
    images = {f"OpenImages/{s}/01/{s}.jpg": picture() for s in ("train", "val", "test")}
    one = make_zip(tmp_path / "OpenImages_images.zip", images)
    two = make_zip(tmp_path / "OpenImages_masks.zip", {"val/01/val_m0.png": picture(kind="PNG")})
    prepared = prepare("openimages30k", [one, two], tmp_path / "out")
    assert sorted(path.name for path in prepared.root.rglob("*.*")) == [
        "test.jpg",
        "train.jpg",
        "val.jpg",
        "val_m0.png",
    ]


def test_prepare_command_says_what_it_did_and_what_is_next(tmp_path, capsys):
    source = cub_archives(tmp_path / "from")
    assert main(["data", "prepare", "cub", "--from", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "--partial" in capsys.readouterr().err
    words = ["data", "prepare", "cub", "--from", str(source), "--out", str(tmp_path / "out"), "--partial"]
    assert main(words) == 0
    assert "next: calm data check" in capsys.readouterr().out


def test_download_stops_at_the_limit(tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(bytes(1001))
    monkeypatch.setattr(archives, "MAX_DOWNLOAD", 1000)
    with pytest.raises(CalmError, match="more than metadata has"):
        archives.download((tmp_path / "big").as_uri(), tmp_path / "got")
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


def test_prepare_finishes_a_run_that_was_stopped(tmp_path, ilsvrc, monkeypatch):
    unpack = sets.unpack

    def stops_at_val(path, *rest):
        if "val" in path.name:
            raise KeyboardInterrupt
        return unpack(path, *rest)

    monkeypatch.setattr(sets, "unpack", stops_at_val)
    with pytest.raises(KeyboardInterrupt):
        prepare("ilsvrc", [ilsvrc], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/dataset/ILSVRC").iterdir()] == ["train"]
    monkeypatch.setattr(sets, "unpack", unpack)
    counts = prepare("ilsvrc", [ilsvrc], tmp_path / "out").counts
    assert counts == {"train images": 1, "val images": 1, "val2 images": 1}
