"""Processes forked from one that has imported everything: importing takes longer than what tests do in them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["calm.cli.train", "calm.train.run", "calm.evaluate.runner", "calm.evaluate.erasing"])


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that ended it) and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


class Fork:
    """A process that calls ``function(*arguments)``, in one thread and with warnings as errors."""

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, **environment: object) -> None:
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        self.outputs = (folder / f"stdout{number}", folder / f"stderr{number}")
        for path in self.outputs:
            path.touch()
        words = {name: str(value) for name, value in environment.items()}
        self.process: BaseProcess = FORKS.Process(target=_call, args=(function, arguments, words, self.outputs))
        self.process.start()

    def end(self, timeout: float = 300) -> Ended:
        """Wait for its end; after the timeout, in seconds, it is killed."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        return Ended(self.process.exitcode, *(path.read_text() for path in self.outputs))


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    # A data loader's workers are forked, as in a command: the server's would not see that this process was killed.
    multiprocessing.set_start_method("fork", force=True)
    import torch
    from torchmetrics.utilities import prints

    torch.set_num_threads(1)
    prints.rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))  # read when it was imported
    warnings.simplefilter("error", append=True)  # after the filters that importing has set
    function(*arguments)
