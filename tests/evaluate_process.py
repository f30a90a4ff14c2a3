"""One of several processes that run `calm evaluate` together: a script for test_evaluate_processes.py."""

from __future__ import annotations

import json
import os
import sys

import torch

from calm.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = json.loads(sys.argv[1])  # words of a command line, and where its processes meet
    codes = []
    for words, port in tasks:
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(["evaluate", *words]))
    print(f"codes {codes}")
