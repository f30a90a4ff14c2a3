"""Processor seconds of an older commit's tests and demo, and of HEAD's beside them. Prints Markdown.

Both commits are unpacked below ``build/suite`` and run with the libraries of this environment, the older one first;
what is not committed is not run. The tests are those that both commits have, by file and name, in one command of
pytest for each side, without coverage; one that fails counts. User and system seconds are of the whole command with
every process that it leaves, fork servers and their children included (Linux). ``--demo`` runs ``calm demo`` as well.

Run: python benchmarks/suite.py COMMIT [--demo] [PYTEST WORDS ...]        (-n 2, tests/test_model.py, ...; default: all)
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOTH = "CALM_SUITE_TESTS"
"""Environment variable: the file with the names of the tests to run, one a line; it is made where it does not exist."""
SUBREAPER = 36
"""Linux's PR_SET_CHILD_SUBREAPER: processes that lose their parent become children of this one."""


class Taken(NamedTuple):
    """What a command took: seconds of the processor, and of the wall."""

    processor: float
    wall: float


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin of the tested process: write the names of its tests, or keep those of the file."""
    names = Path(os.environ[BOTH])
    if not names.exists():
        names.write_text("".join(f"{item.nodeid}\n" for item in items))
    kept = set(names.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def taken(command: list[str], folder: Path, **environment: object) -> Taken:
    """Run a command in a folder, wait for every process that it leaves, and return what all of them took."""
    if ctypes.CDLL(None).prctl(SUBREAPER, 1):
        raise SystemExit("this system cannot wait for what the tests leave: Linux is needed")
    path = os.pathsep.join(map(str, (folder / "src", Path(__file__).parent)))
    words = {name: str(value) for name, value in environment.items()}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path} | words, stdout=sys.stderr)
    wall = time.perf_counter() - began
    try:
        while True:
            os.wait()
    except ChildProcessError:  # none is left
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def unpacked(commit: str) -> Path:
    """The folder below ``build/suite`` with a commit's files."""
    digits = subprocess.check_output(["git", "rev-parse", "--short=12", commit], cwd=ROOT, text=True).strip()
    folder = ROOT / "build" / "suite" / digits
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", digits], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def tests(folders: list[Path], words: list[str]) -> tuple[int, list[Taken]]:
    """Run the tests that all commits have; return how many they are and what each commit's took."""
    pytest_line = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    found = []
    for folder in folders:
        names = folder.with_suffix(".tests")
        names.unlink(missing_ok=True)
        taken([*pytest_line, "--collect-only", "-n", "0", *words], folder, **{BOTH: names})
        if not names.exists():
            raise SystemExit(f"{folder.name}: its tests cannot be collected (see above)")
        found.append(set(names.read_text().splitlines()))
    both = folders[0].with_name("both.tests")
    both.write_text("".join(f"{name}\n" for name in sorted(set.intersection(*found))))
    return len(set.intersection(*found)), [taken([*pytest_line, *words], folder, **{BOTH: both}) for folder in folders]


def demo(folder: Path) -> Taken:
    """Run a commit's demo."""
    out = folder / "demo"
    shutil.rmtree(out, ignore_errors=True)
    line = "import sys; from calm.cli import main; sys.exit(main())"
    return taken([sys.executable, "-c", line, "demo", "--out", str(out)], folder)


def report(rows: dict[str, list[Taken]], commit: str) -> str:
    """Return the table."""
    import measure  # not in the tested processes: it imports PyTorch

    lines = [
        [name, *(f"{side.processor:.0f}" for side in sides), f"{sides[1].processor / sides[0].processor:.2f}"]
        + [f"{side.wall:.0f}" for side in sides]
        for name, sides in rows.items()
    ]
    header = ["command", f"{commit}, processor s", "HEAD, processor s", "ratio", f"{commit}, s", "HEAD, s"]
    return measure.table(header, lines)


def main() -> None:
    """Run both commits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--demo", action="store_true", help="the demo, too")
    options, words = parser.parse_known_args()
    folders = [unpacked(commit) for commit in (options.commit, "HEAD")]
    count, sides = tests(folders, words)
    rows = {f"tests of both ({count})": sides}
    if options.demo:
        rows["`calm demo`"] = [demo(folder) for folder in folders]
    print(report(rows, options.commit))


if __name__ == "__main__":
    main()
