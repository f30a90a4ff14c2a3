"""What an archive may not do to the folder it is unpacked in."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from calm.data import archives
from calm.data.archives import staged, unpack
from calm.errors import CalmError


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


MAKERS = {"tgz": make_tar, "zip": make_zip}


@pytest.mark.parametrize("kind", MAKERS)
def test_unpack_returns_files_as_they_were_packed(tmp_path, kind):
    files = {"a/b.txt": b"one", "c.bin": bytes(range(256)) * 300}
    path = MAKERS[kind](tmp_path / f"x.{kind}", files)
    assert unpack(path, tmp_path / "out") == 2
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside", "C:/outside", "a\\..\\outside"])
def test_unpack_refuses_members_that_leave_the_folder(tmp_path, kind, name):
    path = MAKERS[kind](tmp_path / f"x.{kind}", {name: b"x"})
    with pytest.raises(CalmError, match="leaves the folder"):
        unpack(path, tmp_path / "out" / "in")
    assert not list(tmp_path.rglob("outside"))


def test_unpack_refuses_a_member_that_is_there_twice(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for data in (b"1", b"2"):
            member = tarfile.TarInfo("a")
            member.size = 1
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(CalmError, match="'a' is there twice"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_unpack_refuses_links_and_devices(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, "target"
        archive.addfile(member)
    with pytest.raises(CalmError, match="link or device"):
        unpack(tmp_path / "x.tar", tmp_path / "out")


def test_unpack_refuses_a_link_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc")
    with pytest.raises(CalmError, match="link or device"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", MAKERS)
def test_unpack_refuses_more_bytes_or_files_than_the_limits(tmp_path, kind, monkeypatch):
    """The limits keep a small archive from filling the disk."""
    path = MAKERS[kind](tmp_path / f"x.{kind}", {"a": bytes(1001), "more": b"x"})
    with pytest.raises(CalmError, match="more than 1,000 bytes"):
        unpack(path, tmp_path / "out", max_bytes=1000)
    monkeypatch.setattr(archives, "MAX_FILES", 1)
    with pytest.raises(CalmError, match="more than 1 files"):
        unpack(path, tmp_path / "out2")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_unpack_refuses_a_truncated_archive(tmp_path, mode, share):
    noise = bytes((i * i * 31 + i // 7) % 251 for i in range(40_000))
    path = make_tar(tmp_path / "x.tar", {f"{i}": noise for i in range(3)}, mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CalmError, match="download it again"):
        unpack(path, tmp_path / "out")


def test_unpack_refuses_a_tar_cut_between_two_members(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a": b"x" * 512, "b": b"y" * 512}, "w")
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(CalmError, match="end of the archive is missing"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("cut", [4, 9])
def test_unpack_refuses_a_gzip_without_its_checksum(tmp_path, cut):
    path = make_tar(tmp_path / "x.tgz", {"a": b"x" * 512})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CalmError, match="download it again"):
        unpack(path, tmp_path / "out")


def test_unpack_refuses_a_damaged_zip_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", b"needle" * 10)
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(b"needle", b"noodle", 1))
    with pytest.raises(CalmError, match="download it again"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"<html>login</html>"])
def test_unpack_refuses_a_file_that_is_no_archive(tmp_path, data):
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(CalmError, match="download it again"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


def test_staged_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "data"

    def fail() -> None:
        with staged(final) as (_, result):
            result.mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".data.writing-abcdefgh" / "result").mkdir(parents=True)  # a killed run
    (tmp_path / ".data.writing-abcdefgh" / "result" / "half").touch()
    with staged(final) as (_, result):
        result.mkdir()
        (result / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in final.iterdir()] == ["whole"]
