"""What each of several processes that run `calm evaluate` together does, for test_evaluate_processes.py."""

from __future__ import annotations

import os

from calm.cli import main
from calm.evaluate.distributed import all_gather, process_group, rank


def crash() -> int:
    """What a programmer's mistake in the second process does to both."""
    try:
        with process_group():
            all_gather(0)
            if rank() == 1:
                raise KeyError("lost")
            all_gather(1)
    except SystemExit as stop:
        return int(str(stop.code))
    return 0


def run(tasks: list[tuple[list[str], int]]) -> None:
    """Run command lines, each with the port where its processes meet."""
    codes = []
    for words, port in tasks:
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(["evaluate", *words]) if words else crash())
    print(f"codes {codes}")
