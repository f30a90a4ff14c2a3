"""Files appear whole or not at all, and what a killed writer left is removed by the next one, and only that."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from calm import files
from calm.errors import CalmError
from calm.files import atomic_path, remove_abandoned, working_folder, write_bytes, write_text

HOLD = """
import sys, time
from calm.files import atomic_path, working_folder
with atomic_path(sys.argv[1] + "/table.csv") as file, working_folder(sys.argv[1] + "/set") as folder:
    file.write_text("half")
    (folder / "half").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_looked_into", set())


@pytest.fixture
def writer(tmp_path: Path):
    """Another process amid writing a file and filling a folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_an_error_amid_writing_leaves_the_former_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "former")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as temporary:
        _ = temporary.write_text("half") / 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "former"}


def test_what_another_process_is_writing_stays(tmp_path, writer):
    write_text(tmp_path / "other.txt", "x")
    remove_abandoned(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert [name[:9] for name in names] == [".set.writ", ".table.wr", "other.txt"]


def test_what_a_killed_process_was_writing_is_removed_by_the_next_writer_in_the_folder(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "other.txt", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_hidden_files_of_others_are_never_removed(tmp_path):
    for name in (".gitignore", ".table.abcdefgh.csv", ".writing-abcdefgh", "x.writing-abcdefgh.csv"):
        (tmp_path / name).touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_there_has_nothing_abandoned(tmp_path):
    remove_abandoned(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_told_with_the_final_name(tmp_path, number):
    with pytest.raises(OSError, match=r"a\.txt") as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a.txt"))
    assert not list(tmp_path.iterdir())


def test_an_error_about_another_file_is_not_renamed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_a_file_has_the_permissions_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_working_folder_is_gone_at_the_end_and_what_was_moved_out_stays(tmp_path):
    with working_folder(tmp_path / "set") as folder:
        (folder / "result").mkdir()
        (folder / "rest").touch()
        (folder / "result").rename(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def save_with_torch(path, tensor):
    with path.open("wb") as file:
        torch.save(tensor, file)


@pytest.mark.parametrize(
    "save",
    [
        save_with_torch,
        lambda path, tensor: save_file({"a": tensor}, path),
        lambda path, tensor: Image.fromarray(tensor.reshape(1000, 1000).byte().numpy()).save(path),
    ],
    ids=["torch", "safetensors", "Pillow"],
)
def test_a_library_that_fails_at_a_full_disk_fails_with_the_final_name(tmp_path, save):
    tensor = torch.rand(1_000_000) * 255
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"large.*a\.png") as caught,
            atomic_path(tmp_path / "a.png") as temporary,
        ):
            save(temporary, tensor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_the_user_stays_one_while_a_folder_is_filled(tmp_path):
    with pytest.raises(CalmError, match="damaged"), working_folder(tmp_path / "set"):
        raise CalmError("archive is damaged")
    assert not list(tmp_path.iterdir())
