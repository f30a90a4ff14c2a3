"""What the fault suite's tests share: a server of processes, the inputs, an undisturbed run of each command."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from stress import commands, trees
from stress.commands import Inputs, Undisturbed
from stress.processes import Server, server

RESULTS = {"train": "trained", "evaluate": "evaluated", "birds": "drawn", "prepare": "prepared", "convert": "converted"}
"""Where the undisturbed runs have their output."""


@pytest.fixture(scope="session")
def ground() -> Iterator[Path]:
    """A folder that every user may look into, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="calm-stress-")).resolve()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def processes(ground: Path) -> Iterator[Server]:
    (ground / "server").mkdir()
    with server(ground / "server") as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(processes: Server, inputs: Inputs) -> Callable[[str], Undisturbed]:
    @cache
    def of(name: str) -> Undisturbed:
        if name == "evaluate":
            of("train")
        root = inputs.root / RESULTS[name]
        root.mkdir()
        ended = commands.succeeded(commands.run(name, inputs, root, processes))
        assert not trees.broken(root)
        assert not trees.hidden(root)
        return Undisturbed(name, root, ended, trees.digests(root))

    return of


@pytest.fixture(scope="session")
def inputs(ground: Path) -> Inputs:
    made = Inputs(ground / "inputs")
    made.root.mkdir()
    made.make()
    return made


@pytest.fixture
def trial(ground: Path) -> Iterator[Path]:
    """A new folder for a run."""
    folder = Path(tempfile.mkdtemp(dir=ground, prefix="trial-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
