"""One of several processes that run `calm evaluate` together: a script for test_evaluate_processes.py."""

from __future__ import annotations

import json
import os
import sys

import torch

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = json.loads(sys.argv[1])  # words of a command line, and where its processes meet
    codes = []
    for words, port in tasks:
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(["evaluate", *words]) if words else crash())
    print(f"codes {codes}")
