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
"""Of each command."""


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_under_its_final_name(
    name: str, undisturbed: Callable[[str], Undisturbed]
) -> None:
    alone = undisturbed(name)
    opened = [Path(path).relative_to(alone.root) for event, path in alone.ended.changes if event == "open"]
    assert opened
    growing = [path for path in opened if set(path.parts) & set(trees.GROWING)]
    assert [
        str(path)
        for path in opened
        if path not in growing and not any(part.startswith(".") for part in path.parts)
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_ends_as_if_it_had_not_been(
    name: str,
    undisturbed: Callable[[str], Undisturbed],
    inputs: Inputs,
    processes: Server,
    trial: Path,
    record_property: Callable[[str, object], None],
) -> None:
    alone = undisturbed(name)
    random_state = random.Random(f"{name} 1")
    kills = at_once = 0
    while kills < KILLS:
        chain = random_state.choice((1, 1, 1, 2, 5))
        told = []
        for _ in range(min(chain, KILLS - kills)):
            if random_state.random() < 0.5:
                moment = {"kill_after": random_state.uniform(0, alone.ended.seconds)}
            else:
                moment = {"kill_at": random_state.randrange(len(alone.ended.changes))}
            told.append(str(moment))
            ended = commands.run(name, inputs, trial, processes, **moment)
            assert not trees.whole(trial), told
            if not ended.killed:
                commands.succeeded(ended)
                break
            kills += 1
        ended = commands.run(name, inputs, trial, processes)
        assert ended.code == 0, (told, ended.text)
        assert not trees.hidden(trial), told
        assert trees.digests(trial) == alone.digests, told
        shutil.rmtree(trial)
        trial.mkdir()
        at_once += len(told) > 1
    record_property("kills", kills)
