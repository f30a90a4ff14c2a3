"""Processor seconds of the tests, by file and test, beside those of an older commit. Prints Markdown.

Both commits are unpacked below ``build/suite`` and tested with the libraries of this environment, the older one first:
user and system seconds of each test, with the processes that it started, without coverage. The commit of this side is
HEAD: what is not committed is not tested. Tests are the same if their files and names are. A test that fails counts.
What a test leaves to the fork server (tests/forks.py) is in no line: compare files that do not use it.

Run: python benchmarks/suite.py COMMIT [PYTEST WORDS ...]     (-n 2, tests/test_model.py, -k name, ...; default: all)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import measure
import pytest

ROOT = Path(__file__).resolve().parent.parent
OUT = "CALM_SUITE_SECONDS"
"""Environment variable: the file that the plugin of a tested process appends to, one line of JSON a test."""


def spent() -> float:
    """Seconds of the processor that this process and its ended children took."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """As a plugin of the tested process: note what a test takes, its fixtures included."""
    before = spent()
    result = yield
    with Path(os.environ[OUT]).open("a") as file:
        file.write(json.dumps([item.nodeid, spent() - before]) + "\n")
    return result


def seconds(commit: str, words: list[str]) -> tuple[dict[str, float], float]:
    """Test a commit; return the seconds of each test, and of the whole command with all imports."""
    digits = subprocess.check_output(["git", "rev-parse", "--short=12", commit], cwd=ROOT, text=True).strip()
    folder = ROOT / "build" / "suite" / digits
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", digits], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    out = folder.with_suffix(".jsonl")
    out.unlink(missing_ok=True)
    path = os.pathsep.join(map(str, (folder / "src", Path(__file__).parent)))
    before = spent()
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path, OUT: str(out)}, stdout=sys.stderr)
    if not out.exists():
        raise SystemExit(f"{digits}: no test was run (pytest's exit status {done.returncode})")
    return dict(map(json.loads, out.read_text().splitlines())), spent() - before


def by_file(tests: Mapping[str, float]) -> dict[str, float]:
    """Return the sums of the tests of each file."""
    sums: dict[str, float] = defaultdict(float)
    for name, taken in tests.items():
        sums[name.partition("::")[0]] += taken
    return sums


def report(old: Mapping[str, float], new: Mapping[str, float], totals: tuple[float, float], commit: str) -> str:
    """Return the tables: sums, files, and the dearest tests of the new side."""
    both = old.keys() & new.keys()
    files_old, files_new = (by_file({name: side[name] for name in both}) for side in (old, new))
    rows = {
        "the command, with imports": totals,
        f"tests of both ({len(both)})": (sum(files_old.values()), sum(files_new.values())),
        f"all tests ({len(old)}, {len(new)})": (sum(old.values()), sum(new.values())),
        **{
            f"`{name}`": (files_old[name], taken)
            for name, taken in sorted(files_new.items(), key=lambda file: -file[1])
        },
    }
    table = [[name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}" if a else ""] for name, (a, b) in rows.items()]
    dearest = sorted(new.items(), key=lambda pair: -pair[1])[:20]
    return "\n\n".join(
        [
            measure.table(["tests", f"{commit}, s", "HEAD, s", "HEAD over it"], table),
            measure.table(["dearest tests of HEAD", "s"], [[f"`{name}`", f"{taken:.1f}"] for name, taken in dearest]),
        ]
    )


def main() -> None:
    """Test both commits and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    options, words = parser.parse_known_args()
    (old, all_old), (new, all_new) = (seconds(commit, words) for commit in (options.commit, "HEAD"))
    print(report(old, new, (all_old, all_new), options.commit))


if __name__ == "__main__":
    main()
