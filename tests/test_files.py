"""calm.files: limits of untrusted files; files that appear whole or not at all; what a killed writer left."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import Fork
from PIL import Image
from safetensors.torch import save_file

from calm import files
from calm.errors import CalmError
from calm.files import (
    ahead,
    atomic_path,
    held_alone,
    in_threads,
    open_regular,
    read_columns,
    read_json,
    read_text,
    read_torch,
    read_yaml,
    remove_abandoned,
    use_temporary_caches,
    working_folder,
    write_bytes,
    write_json,
    write_text,
)


def hold(path: Path) -> None:
    with held_alone(path, "", ""):
        time.sleep(60)


def test_held_alone_refuses_another_process_until_that_is_killed(tmp_path):
    path = tmp_path / "lock"
    process = Fork(tmp_path / "said", hold, path).process
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    with (
        pytest.raises(CalmError, match=rf"^it is used by process {process.pid} on \S+: wait$"),
        held_alone(path, "it is used by", "wait"),
    ):
        raise AssertionError("held twice")
    process.kill()
    process.join()
    with held_alone(path, "it is used by", "wait"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


# Limits of what is read. Each test lowers our limit and gives a small, harmless file that is over it.


@pytest.fixture
def written(tmp_path: Path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "given.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_open_regular_refuses_a_device_whose_content_might_never_end(tmp_path):
    (tmp_path / "device").symlink_to(os.devnull)
    with pytest.raises(CalmError, match=r"cannot read list .*device: it is a pipe or device"):
        open_regular(tmp_path / "device", "list")
    with pytest.raises(CalmError, match="it is a folder"):
        open_regular(tmp_path)
    with pytest.raises(CalmError, match="no such file"):
        open_regular(tmp_path / "nowhere")


def test_read_text_refuses_a_file_that_would_fill_the_memory(written, monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 10)
    assert read_text(written("ten bytes.")) == "ten bytes."
    with pytest.raises(CalmError, match=r"given\.txt is larger than 10 bytes"):
        read_text(written("eleven byte"))
    with pytest.raises(CalmError, match=r"given\.txt is larger than 10 bytes"):
        read_json(written('"eleven by"'))


def test_read_json_refuses_a_key_that_is_there_twice(written):
    with pytest.raises(CalmError, match=r"given\.txt as JSON: 'a' is there twice"):
        read_json(written('{"b": {"a": 1, "a": 2}}'))
    assert read_json(written('\ufeff{"a": [1]}')) == {"a": [1]}


def test_read_columns_returns_numbers_by_name(written):
    assert read_columns(written("a,b\n1,2\n\n3,0.5\n"), need=("b",)) == {"a": [1, 3], "b": [2, 0.5]}


def test_read_yaml_refuses_aliases_that_expand_to_more_values_than_the_limit(written, monkeypatch):
    monkeypatch.setattr(files, "MAX_YAML_NODES", 9)
    assert read_yaml(written("a: &x [1, 2]\nb: *x\n")) == {"a": [1, 2], "b": [1, 2]}
    with pytest.raises(CalmError, match=r"given\.txt stands for more than 9 values"):
        read_yaml(written("a: &x [1, 2]\nb: *x\nc: *x\n"))


def test_read_yaml_refuses_brackets_deeper_than_the_parser_reads_quickly(written, monkeypatch):
    monkeypatch.setattr(files, "MAX_YAML_DEPTH", 2)
    assert read_yaml(written("[[], [1]]")) == [[], [1]]
    with pytest.raises(CalmError, match=r"given\.txt nests brackets more than 2 deep"):
        read_yaml(written("[[[]]]"))


def test_read_yaml_refuses_a_long_file_before_it_is_parsed(written, monkeypatch):
    monkeypatch.setattr(files, "MAX_YAML_BYTES", 5)
    with pytest.raises(CalmError, match=r"given\.txt is larger than 5 bytes"):
        read_yaml(written("a: 123"))


def test_read_yaml_runs_no_code(written, tmp_path):
    with pytest.raises(CalmError, match="could not determine a constructor"):
        read_yaml(written(f"!!python/object/apply:io.open [{tmp_path / 'marker'}, w]"))
    assert not (tmp_path / "marker").exists()


def test_read_torch_refuses_an_archive_that_is_larger_unpacked(tmp_path):
    """PyTorch writes no compressed archive, but reads one into as much memory as it claims."""
    torch.save({"a": torch.zeros(4000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for member in whole.infolist():
            small.writestr(member.filename, whole.read(member))
    assert read_torch(tmp_path / "whole.pt", "weights")["a"].shape == (4000,)
    with pytest.raises(CalmError, match=r"small\.pt"):
        read_torch(tmp_path / "small.pt", "weights")


# Atomic writing


def test_write_json_writes_null_for_a_number_that_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"a": (float("nan"), 1), 2: [{"b": float("-inf")}, "NaN"]})
    assert read_json(tmp_path / "a.json") == {"a": [None, 1], "2": [{"b": None}, "NaN"]}
    assert "NaN," not in (tmp_path / "a.json").read_text()


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
    monkeypatch.setattr(files, "_cleaned", set())


@pytest.fixture
def writer(tmp_path: Path):
    """Another process amid writing a file and filling a folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_atomic_path_keeps_the_former_file_on_an_error(tmp_path):
    write_text(tmp_path / "a.txt", "former")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as temporary:
        _ = temporary.write_text("half") / 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "former"}


def test_remove_abandoned_keeps_what_another_process_is_writing(tmp_path, writer):
    write_text(tmp_path / "other.txt", "x")
    remove_abandoned(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert [name[:9] for name in names] == [".set.writ", ".table.wr", "other.txt"]


def test_atomic_path_removes_what_a_killed_process_left_in_the_folder(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "other.txt", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_remove_abandoned_keeps_hidden_files_of_others(tmp_path):
    for name in (".gitignore", ".table.abcdefgh.csv", ".writing-abcdefgh", "x.writing-abcdefgh.csv"):
        (tmp_path / name).touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_remove_abandoned_accepts_a_missing_folder(tmp_path):
    remove_abandoned(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_atomic_path_reports_a_full_disk_by_the_final_name(tmp_path, number):
    with pytest.raises(OSError, match=r"a\.txt") as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a.txt"))
    assert not list(tmp_path.iterdir())


def test_atomic_path_passes_on_an_error_about_another_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_write_bytes_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_working_folder_is_removed_and_what_was_moved_out_stays(tmp_path):
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
def test_atomic_path_reports_a_librarys_full_disk_by_the_final_name(tmp_path, save):
    tensor = torch.rand(1_000_000) * 255
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"large.*a\.png") as caught, atomic_path(tmp_path / "a.png") as temporary:
            save(temporary, tensor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_working_folder_passes_on_a_calm_error(tmp_path):
    with pytest.raises(CalmError, match="damaged"), working_folder(tmp_path / "set"):
        raise CalmError("archive is damaged")
    assert not list(tmp_path.iterdir())


# Caches of libraries


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MPLCONFIGDIR", "")  # so that what a test sets is taken back
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"calm-{os.getuid()}"


def test_use_temporary_caches_takes_one_folder_for_a_user(mine, monkeypatch):
    use_temporary_caches()
    assert os.environ["MPLCONFIGDIR"] == str(mine)
    assert mine.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("MPLCONFIGDIR")
    use_temporary_caches()
    assert os.environ["MPLCONFIGDIR"] == str(mine)


def test_use_temporary_caches_trusts_no_link_nor_a_folder_that_others_may_write(mine, monkeypatch, tmp_path):
    mine.mkdir()
    mine.chmod(0o777)
    use_temporary_caches()
    assert os.environ["MPLCONFIGDIR"].startswith(f"{mine}-")
    mine.rmdir()
    (tmp_path / "elsewhere").mkdir()
    mine.symlink_to(tmp_path / "elsewhere")
    monkeypatch.delenv("MPLCONFIGDIR")
    use_temporary_caches()
    assert os.environ["MPLCONFIGDIR"].startswith(f"{mine}-")


def test_use_temporary_caches_keeps_what_the_user_has_chosen(mine, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    use_temporary_caches()
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert not mine.exists()


def test_use_temporary_caches_sets_nothing_without_a_place_to_write(mine, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    use_temporary_caches()
    assert "MPLCONFIGDIR" not in os.environ


def test_ahead_keeps_the_order_and_stays_within_depth_and_limit() -> None:
    """Each item waits for the one before, as far as that is in flight."""
    started: list[int] = []
    finished = 0

    def work(item: int) -> int:
        started.append(item)
        return -item

    sizes = [1, 1, 1, 5, 1, 9, 1, 1, 1, 1]
    with ThreadPoolExecutor(2) as pool:
        results = ahead(pool, work, range(10), depth=3, size=sizes.__getitem__, limit=5)
        for result in results:
            assert result == -finished
            finished += 1
            # What may have been submitted when this one was given: it, and what fits beside.
            assert max(started) <= finished - 1 + 3
            beside = sizes[finished : max(started) + 1]
            assert len(beside) <= 1 or sum(beside) <= 5
    assert finished == 10
    assert sorted(started) == list(range(10))


def test_ahead_raises_an_error_in_its_turn() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = ahead(pool, lambda item: 1 // item, [1, 1, 0, 1], depth=4, size=lambda _: 0, limit=1)
        assert [next(results), next(results)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_atomic_path_in_threads_leaves_the_umask(tmp_path: Path) -> None:
    before, interval = os.umask(0o027), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread gives way between any two steps
    try:
        list(in_threads(lambda i: write_bytes(tmp_path / str(i), b""), range(500), 8))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        sys.setswitchinterval(interval)
        assert os.umask(before) == 0o027
