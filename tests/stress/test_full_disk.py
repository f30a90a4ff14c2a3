"""At a full disk a command says so in one line, spoils nothing, and ends well when there is room again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stress import commands, trees
from stress.commands import NAMES, Inputs, Undisturbed, refused, some
from stress.disks import Disk, mounted, size_of
from stress.processes import Server
from stress_counts import FULL

pytestmark = [pytest.mark.stress, pytest.mark.slow]

FREE = [number / 10 for number in (range(0, 10, 2) if FULL else (4,))]
"""Shares of the room that the command needs."""
LARGEST = [number / 10 for number in ((1, 5, 9) if FULL else (5,))]
"""Shares of the largest file that it writes."""
NO_SPACE, TOO_LARGE = os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)
SMALLEST = 4096
"""Bytes: what the command says goes to a file, too, under the same limit."""


@pytest.fixture
def disk(name: str, undisturbed: Callable[[str], Undisturbed], trial: Path) -> Iterator[Disk]:
    needed = size_of(undisturbed(name).root)
    with mounted(trial / "disk", 3 * needed + (4 << 20)) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", FREE)
def test_a_full_disk_is_told_in_one_line_and_the_same_command_ends_well_when_there_is_room(
    name: str, free: float, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, disk: Disk
) -> None:
    alone, root = undisturbed(name), disk.root / "root"
    root.mkdir()
    disk.leave(int(free * size_of(alone.root)))
    refused(commands.run(name, inputs, root, processes), NO_SPACE, str(root / "out"))
    assert not trees.broken(root)
    disk.empty()
    commands.succeeded(commands.run(name, inputs, root, processes))
    assert not trees.hidden(root)
    assert trees.digests(root) == alone.digests


@pytest.mark.parametrize("name", some("evaluate", "birds", without=["convert"]))  # that one finds room: its leavings
def test_what_was_there_before_the_disk_was_full_stays_as_it_was(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, disk: Disk
) -> None:
    alone, root = undisturbed(name), disk.root / "root"
    root.mkdir()
    assert commands.run(name, inputs, root, processes, kill_at=int(0.7 * len(alone.ended.changes))).killed
    before = trees.finished(root)
    disk.leave(0)
    refused(commands.run(name, inputs, root, processes), NO_SPACE, str(root / "out"))
    assert before.items() <= trees.finished(root).items()
    disk.empty()
    commands.succeeded(commands.run(name, inputs, root, processes))
    assert trees.digests(root) == alone.digests


@pytest.mark.parametrize("name", ["convert"])
def test_a_model_is_not_spoiled_by_a_conversion_that_finds_the_disk_full(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, disk: Disk
) -> None:
    root = disk.root / "root"
    root.mkdir()
    commands.succeeded(commands.run(name, inputs, root, processes))
    disk.leave(10 << 20)
    refused(commands.run(name, inputs, root, processes), NO_SPACE, str(root / "out"))
    assert trees.digests(root) == undisturbed(name).digests


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["data", "birds", "--help"]])
def test_standard_output_on_a_full_disk_is_told_in_one_line(words: list[str]) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "calm.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            env=buffered,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (2, f"calm: cannot write to standard output: {NO_SPACE}\n")


@pytest.mark.parametrize("name", some("train", "prepare"))
@pytest.mark.parametrize("largest", LARGEST)
def test_a_limit_of_the_size_of_files_is_told_in_one_line_and_the_same_command_ends_well_without_it(
    name: str, largest: float, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    alone = undisturbed(name)
    limit = max(SMALLEST, int(largest * max(path.stat().st_size for path in alone.root.rglob("*.*"))))
    refused(commands.run(name, inputs, trial, processes, largest=limit), TOO_LARGE, str(trial / "out"))
    assert not trees.broken(trial)
    commands.succeeded(commands.run(name, inputs, trial, processes))
    assert not trees.hidden(trial)
    assert trees.digests(trial) == alone.digests
