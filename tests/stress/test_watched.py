"""Nothing but what the user named is written, read or contacted."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from stress import commands
from stress.commands import NAMES, Inputs, Undisturbed
from stress.processes import Server, environment
from stress_counts import FULL

import calm

pytestmark = [pytest.mark.stress, pytest.mark.slow]

LIBRARIES = [str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, *calm.__path__, *sys.path) if path]
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/var/cache/fontconfig")
"""Where the interpreter, its libraries and the system look on their own: processors, memory, time zone, fonts."""
CACHES = {f"calm-{os.getuid()}", f"torchinductor_{getpass.getuser()}"}
"""Folders among temporary files: matplotlib's (`calm.files`) and the PyTorch compiler's."""
MORE: dict[str, Callable[[Inputs, Path], list[str]]] = {
    "attribute": lambda inputs, out: [
        "attribute",
        *("--model", str(inputs.model), str(next((inputs.birds / "images").rglob("*.jpg"))), "--out", str(out)),
    ],
    "report": lambda inputs, out: ["report", str(inputs.evaluated), "--out", str(out / "report.html")],
    "data check": lambda inputs, out: ["data", "check", str(inputs.birds)],
}
"""Further commands, of which nothing is asked but this."""


def outside(paths: Iterable[str], allowed: Sequence[object]) -> list[str]:
    """Those of the paths that lie neither in nor at one of the allowed places."""
    places = [Path(os.fspath(place)).resolve() for place in map(str, allowed)]
    return [path for path in paths if not any(Path(path).resolve().is_relative_to(place) for place in places)]


def read_by(name: str, inputs: Inputs) -> list[Path]:
    """What the user names to a command to read."""
    model = inputs.root / "trained"
    return {
        "train": [inputs.birds],
        "evaluate": [inputs.birds, model],
        "birds": [],
        "prepare": [inputs.archives],
        "convert": [inputs.released],
        "attribute": [inputs.birds, model],
        "report": [inputs.birds, model, inputs.evaluated],
        "data check": [inputs.birds],
    }[name]


def test_importing_every_command_asks_nobody_and_leaves_the_home_alone(processes: Server, ground: Path) -> None:
    seen = processes.at_import
    temporary = ground / "server" / "tmp"
    assert outside((path for _, path in seen.changes), [temporary]) == []
    assert outside(seen.reads, [temporary, *LIBRARIES, *SYSTEM]) == []
    assert seen.contacts == ()


@pytest.mark.parametrize("name", [*NAMES, *(MORE if FULL else ["data check"])])
def test_a_command_touches_only_what_it_was_given(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, ground: Path, trial: Path
) -> None:
    caches = [ground / "server" / "tmp" / cache for cache in CACHES]
    if name in NAMES:
        alone = undisturbed(name)
        root, ended = alone.root, alone.ended
    else:
        undisturbed("evaluate")
        root, ended = trial, commands.succeeded(processes.run(MORE[name](inputs, trial / "out")))
    assert outside((path for _, path in ended.changes), [root, *caches]) == []
    assert outside(ended.reads, [root, *read_by(name, inputs), *caches, *LIBRARIES, *SYSTEM]) == []
    assert ended.contacts == ()
    assert outside(map(str, processes.surroundings()), caches) == []


@pytest.mark.skipif(not FULL, reason="slow: a process of its own, traced, for each command")
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_sees_a_command_touch_only_what_it_was_given(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, trial: Path
) -> None:
    undisturbed(name)
    around, out = trial / "around", trial / "out"
    surroundings = [around / folder for folder in ("home", "tmp", "cwd")]
    for folder in (around, *surroundings):
        folder.mkdir()
    calls = _traced([sys.executable, "-m", "calm.cli", *commands.words(name, inputs, out)], trial, around)
    caches = [around / "tmp" / cache for cache in CACHES]
    changed, read, asked = [], [], []
    for call, arguments in calls:
        if call in ("connect", "sendto"):
            asked += [arguments] * ("AF_INET" in arguments)
        elif call in ("open", "openat") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT", arguments):
            read += _paths(arguments)
        else:
            changed += _paths(arguments)
    assert [path for path in changed if Path(path).is_relative_to(out)]
    assert [path for path in read if Path(path).is_relative_to(inputs.root)] or not read_by(name, inputs)
    own = [path for path in (*changed, *read) if path == str(trial) or path.startswith(f"{trial}/.out.writing-")]
    assert outside({*changed} - {*own}, [out, *caches, around / "tmp", "/dev"]) == []
    known = [out, *caches, *surroundings, *read_by(name, inputs), *LIBRARIES, *SYSTEM]
    assert outside({*read} - {*own}, known) == []
    assert asked == []
    assert not [*(around / "home").iterdir(), *(around / "cwd").iterdir()]
    assert {path.name for path in (around / "tmp").iterdir()} <= CACHES
    assert {path.name for path in trial.iterdir()} == {"around", "out"}


CALLS = "openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,connect,sendto"


def _traced(command: list[str], folder: Path, around: Path) -> list[tuple[str, str]]:
    """Names and arguments of the calls to the kernel of a command and its children that concern files and addresses:
    those that succeeded, and those to addresses in any case."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    logs = folder / "trace"
    logs.mkdir()
    tracer = ["strace", "-ff", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(logs / "of")]
    ended = subprocess.run(
        [*tracer, *command], env=environment(around), cwd=around / "cwd", capture_output=True, text=True, check=False
    )
    if "Operation not permitted" in ended.stderr:
        pytest.skip("no right to trace a process")
    assert ended.returncode == 0, ended.stderr
    lines = [line for path in logs.iterdir() for line in path.read_text(errors="replace").splitlines()]
    shutil.rmtree(logs)
    calls = [re.match(r"(\w+)\((.*)\) += (-?\d+)", line) for line in lines]
    return [(call[1], call[2]) for call in calls if call and (int(call[3]) >= 0 or call[1] in ("connect", "sendto"))]


def _paths(arguments: str) -> list[str]:
    """The paths in a call's arguments; a relative one follows the folder it is relative to."""
    found = re.findall(r'(?:\w+<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments)
    return [str(Path(folder, name)) for folder, name in found]
