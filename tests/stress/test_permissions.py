"""Where a command must not write or read, it says so in one line and leaves everything as it was."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stress import commands, trees
from stress.commands import NAMES, Inputs, Undisturbed, refused, some
from stress.disks import mounted, size_of
from stress.processes import Server

pytestmark = [pytest.mark.stress, pytest.mark.slow]

DENIED, READ_ONLY = os.strerror(errno.EACCES), os.strerror(errno.EROFS)


@contextmanager
def forbidden(folder: Path, mode: int) -> Iterator[None]:
    """Take permissions away from a folder and all below it."""
    former = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path in reversed(former):
        path.chmod(former[path] & mode)
    try:
        yield
    finally:
        for path, before in former.items():
            path.chmod(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_must_not_be_written_gets_nothing(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    undisturbed(name)
    with forbidden(trial, 0o555):
        refused(commands.run(name, inputs, trial, processes, powerless=True), DENIED, str(trial))
    assert not list(trial.iterdir())


@pytest.mark.parametrize("name", some("train", "evaluate"))
def test_an_output_that_must_not_be_written_stays_as_it_was_and_is_completed_when_it_may(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    alone = undisturbed(name)
    assert commands.run(name, inputs, trial, processes, kill_at=int(0.7 * len(alone.ended.changes))).killed
    before = {path: path.stat().st_mtime_ns for path in trial.rglob("*") if path.is_file()}
    with forbidden(trial, 0o555):
        refused(commands.run(name, inputs, trial, processes, powerless=True), DENIED, str(trial))
    assert {path: path.stat().st_mtime_ns for path in trial.rglob("*") if path.is_file()} == before
    commands.succeeded(commands.run(name, inputs, trial, processes))
    assert trees.digests(trial) == alone.digests


@pytest.mark.parametrize("name", some("birds", "prepare"))
def test_a_disk_that_is_mounted_for_reading_stays_as_it_was(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    alone = undisturbed(name)
    with mounted(trial / "disk", 3 * size_of(alone.root) + (4 << 20)) as disk:
        root = disk.root
        assert commands.run(name, inputs, root, processes, kill_at=int(0.7 * len(alone.ended.changes))).killed
        before = trees.finished(root)
        with disk.read_only():
            refused(commands.run(name, inputs, root, processes), READ_ONLY, str(root))
        assert trees.finished(root) == before
        commands.succeeded(commands.run(name, inputs, root, processes))
        assert trees.digests(root) == alone.digests


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["out", "parent"])
def test_a_file_where_a_folder_should_be_is_told_and_kept(
    name: str, place: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    undisturbed(name)
    file = trial / "out" if place == "out" else trial / "parent"
    file.write_text("mine\n")
    root = trial if place == "out" else file
    refused(commands.run(name, inputs, root, processes), "", str(file))
    assert [path.read_text() for path in trial.iterdir()] == ["mine\n"]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("train", "birds"),
        ("train", "birds/images.txt"),
        ("evaluate", "birds"),
        ("evaluate", "birds/images.txt"),
        ("evaluate", "trained/out/best/calm.json"),
        ("evaluate", "trained/out/best/model.safetensors"),
        ("prepare", "archives"),
        ("prepare", "archives/CUB_200_2011.tgz"),
        ("convert", "resnet50.pth.tar"),
    ],
)
def test_an_input_that_must_not_be_read_is_named(
    name: str, hidden: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    undisturbed(name)
    trial.chmod(0o777)
    with forbidden(inputs.root / hidden, 0):
        refused(commands.run(name, inputs, trial, processes, powerless=True), DENIED, str(inputs.root / hidden))
    assert not trees.hidden(trial)
    assert not [path for path in trial.rglob("*") if path.is_file()]


def test_a_benchmark_whose_annotation_must_not_be_read_is_left_out_and_the_file_named(
    undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    undisturbed("evaluate")
    points = inputs.birds / "parts" / "part_locs.txt"
    with forbidden(points, 0):
        ended = commands.succeeded(commands.run("evaluate", inputs, trial, processes, powerless=True))
    assert "cue-localization is left out: " in ended.text
    assert str(points) in ended.text
    assert not (trial / "out" / "cue-localization").exists()


def test_an_image_that_must_not_be_read_is_named(
    undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    trial.chmod(0o777)
    image = next(iter(sorted((inputs.birds / "images").rglob("*.jpg"))))
    with forbidden(image, 0):
        ended = commands.run("train", inputs, trial, processes, powerless=True)
    assert ended.code == 2
    assert "Traceback" not in ended.text
    assert image.name in ended.text
    assert DENIED in ended.text
    shutil.rmtree(trial / "out", ignore_errors=True)
