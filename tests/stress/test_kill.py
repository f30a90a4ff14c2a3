"""A command killed at any moment, once or many times, and started again, ends as one that was left alone."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from stress import commands, trees
from stress.commands import NAMES, Inputs, Undisturbed
from stress.processes import Server
from stress_counts import count

pytestmark = [pytest.mark.stress, pytest.mark.slow]

KILLS = count(reduced=2, full=30)
"""Of each command, at least: after a random time, or before a random change to the file system; alone or in a row."""


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_under_its_final_name(name: str, undisturbed: Callable[[str], Undisturbed]) -> None:
    alone = undisturbed(name)
    opened = [Path(path).relative_to(alone.root) for event, path in alone.ended.changes if event == "open"]
    assert opened
    growing = [path for path in opened if set(path.parts) & set(trees.GROWING)]
    assert [
        str(path) for path in opened if path not in growing and not any(part.startswith(".") for part in path.parts)
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_ends_as_if_it_had_not_been(
    name: str, undisturbed: Callable[[str], Undisturbed], inputs: Inputs, processes: Server, trial: Path
) -> None:
    alone = undisturbed(name)
    chance = random.Random(name)
    kills = {"kill_after": 0, "kill_at": 0}
    while sum(kills.values()) < KILLS:
        faults: list[object] = []
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            seconds, change = (chance.uniform(0, alone.ended.seconds), chance.randrange(len(alone.ended.changes)))
            kind, moment = chance.choice((("kill_after", seconds), ("kill_at", change)))
            faults.append({kind: moment})
            ended = commands.run(name, inputs, trial, processes, **{kind: moment})
            assert not trees.broken(trial), faults
            if not ended.killed:  # it had less to do than the undisturbed one
                commands.succeeded(ended)
                break
            kills[kind] += 1
        ended = commands.run(name, inputs, trial, processes)
        assert ended.code == 0, (faults, ended.text)
        assert not trees.hidden(trial), faults
        assert trees.digests(trial) == alone.digests, faults
        shutil.rmtree(trial)
        trial.mkdir()
    print(f"{name}: {kills}")  # pytest -rP shows it
