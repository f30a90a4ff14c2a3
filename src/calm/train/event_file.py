"""A file of events for TensorBoard, written where it is asked to: `SummaryWriter` does it in a thread of its own, which
ends with a traceback, and a message without a file name, when the disk is full."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from calm.atomic import disk_errors_about

__all__ = ["EventFile"]


class EventFile:
    """A new file that grows.

    Args:
        folder: made if it is missing.
        purge_step: events of other files from this step on are hidden; None: none are.

    Raises:
        OSError: from every method, the disk is full: the file is its file name.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        with disk_errors_about(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step=step, summary=scalar(name, value))  # type: ignore[no-untyped-call]

    def image(self, name: str, pixels: Tensor, step: int) -> None:
        """A picture, uint8 RGB, (H, W, 3)."""
        from torch.utils.tensorboard.summary import image

        self._write(step=step, summary=image(name, pixels, dataformats="HWC"))  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Make what was written visible."""
        with disk_errors_about(self.path):
            self._records.flush()

    def close(self) -> None:
        """No more events."""
        with disk_errors_about(self.path):
            self._records.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with disk_errors_about(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
