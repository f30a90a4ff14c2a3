"""Run the benchmarks that benchmarks/README.md names, and put what they print into it.

A benchmark is a script of this folder that prints Markdown. README.md says where its output goes and with which
arguments it is run, between two comments:

    <!-- bench: boxes.py --maps 3 -->
    (replaced by the output, and a line with the command, the day and the machine)
    <!-- end -->

Ratios that are more than 10 percent worse than in the last tag's README.md (without a tag: in the last commit's) are
named at the end. Everything else in the file is left as it is. The file is written anew, whole, after each script that
succeeds; a script that fails leaves its old tables, and makes the exit status 1 after the others have run. One thread,
unless OMP_NUM_THREADS says otherwise.

Run: python benchmarks/run.py [TOPIC ...]      (TOPIC: boxes, ...; default: all, in the order of the file)
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calm.errors import CalmError, unknown
from calm.files import write_text

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"<!-- bench: (?P<command>[^\n]*?) -->\n(?P<output>.*?)<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Topic:
    """A place in README.md that holds the output of a benchmark."""

    command: str

    @property
    def name(self) -> str:
        """The name of the script without ``.py``, by which TOPIC selects it."""
        return Path(shlex.split(self.command)[0]).stem


def topics(text: str) -> list[Topic]:
    """Return the marked places in order.

    Raises:
        CalmError: there is none, or a beginning without an end.
    """
    marked = [Topic(match["command"]) for match in BLOCK.finditer(text)]
    begun = len(re.findall("<!-- bench: ", text))
    if not marked or len(marked) != begun:
        raise CalmError(f"{len(marked)} of {begun} '<!-- bench: SCRIPT -->' marks are followed by '<!-- end -->'")
    return marked


def replaced(text: str, topic: Topic, output: str) -> str:
    """Return the text with a topic's output in its place."""

    def block(match: re.Match[str]) -> str:
        if match["command"] != topic.command:
            return match[0]
        return f"<!-- bench: {topic.command} -->\n{output.strip()}\n<!-- end -->"

    return BLOCK.sub(block, text)


LOWER, HIGHER = re.compile(r"\bover\b(?!.*, m?s$)"), re.compile(r" / |faster")
OTHERS = ("straightforward", ", pytorch-grad-cam", ", Captum")
"""Rows of other programs, which may become slower."""


def ratios(table: str) -> dict[tuple[str, ...], float]:
    """Return the ratios in Markdown tables, by the table's number, the row's words and the column's heading; lower is
    better.

    They are the values of columns "... over ...", and the inverses of those of columns "... / ..." and "... faster".

    >>> ratios("| way | ms | time over limit |\\n| --- | ---: | ---: |\\n| ours | 617 | 1.44 |\\n")
    {('1', 'ours', 'time over limit'): 1.44}
    """
    found: dict[tuple[str, ...], float] = {}
    headings: list[str] = []
    number_of_table = 0
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    for cells, following in zip(rows, [*rows[1:], [""]], strict=False):
        if set(following[0]) == {"-"}:
            headings, number_of_table = cells, number_of_table + 1
        numbers = [re.fullmatch(r"([+-]?\d+(?:\.\d+)?)( %)?", cell) for cell in cells]
        words = [c for i, (c, n) in enumerate(zip(cells, numbers, strict=True)) if i == 0 or (i == 1 and not n)]
        for heading, number in zip(headings, numbers, strict=False):
            lower = LOWER.search(heading)
            if number and (lower or HIGHER.search(heading)) and not any(name in " ".join(words) for name in OTHERS):
                value = 1 + float(number[1]) / 100 if number[2] else float(number[1])
                if value > 0:
                    found[str(number_of_table), *words, heading] = value if lower else 1 / value
    return found


def regressions(before: str, after: str) -> list[str]:
    """Return a line for each ratio of a topic's tables that is more than 10 percent worse than it was."""
    old = ratios(before)
    return [
        f"{', '.join(name[1:])}: {value / old[name]:.2f} times what it was"
        for name, value in ratios(after).items()
        if name in old and value > 1.1 * old[name]
    ]


def last_release(folder: Path) -> tuple[str, str]:
    """Return the last tag, or HEAD if there is none, and README.md as it was then; empty if that cannot be read."""
    git = ["git", "-C", str(folder)]
    tag = subprocess.run([*git, "describe", "--tags", "--abbrev=0"], capture_output=True, text=True).stdout.strip()
    page = subprocess.run([*git, "show", f"{tag or 'HEAD'}:./README.md"], capture_output=True, text=True)
    return tag or "HEAD", page.stdout if page.returncode == 0 else ""


def run(topic: Topic, folder: Path) -> str:
    """Run a topic's script and return its output below a line with command, day, machine and seconds.

    Raises:
        CalmError: the script failed, or printed nothing.
    """
    from measure import machine

    script, *arguments = shlex.split(topic.command)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(folder / script), *arguments], capture_output=True, text=True, cwd=folder.parent
    )
    if done.returncode or not done.stdout.strip():
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise CalmError(f"{topic.name}: exit status {done.returncode}; its old tables are left\n{last}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    line = f"`python benchmarks/{topic.command}`, {today}, {machine()}; {time.monotonic() - began:.0f} s."
    line = textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)
    return f"{line}\n\n{done.stdout.strip()}"


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run the selected topics and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topic", nargs="*")
    wanted = parser.parse_args(arguments).topic
    page = folder / "README.md"
    try:
        every = topics(page.read_text(encoding="utf-8"))
        names = [topic.name for topic in every]
        for name in wanted:
            if name not in names:
                raise unknown("topic", name, names)
    except CalmError as error:
        print(f"{page}: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed, worse = [], []
    release, old_page = last_release(folder)
    before = {match["command"]: match["output"] for match in BLOCK.finditer(old_page)}
    for topic in every:
        if wanted and topic.name not in wanted:
            continue
        print(f"{topic.command} ...", file=sys.stderr, flush=True)
        try:
            output = run(topic, folder)
        except CalmError as error:
            print(error, file=sys.stderr)
            failed.append(topic.name)
            continue
        print(output + "\n", flush=True)
        worse += [f"{topic.name}: {line}" for line in regressions(before.get(topic.command, ""), output)]
        # Read again: a script takes minutes, in which somebody may have edited the prose.
        write_text(page, replaced(page.read_text(encoding="utf-8"), topic, output))
    if worse:
        print(f"slower than in the tables of {release}, by ratio:", *worse, sep="\n  ", file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
