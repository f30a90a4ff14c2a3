"""Where libraries keep their caches while a command runs: among temporary files, not in the user's home.

matplotlib, which torchmetrics imports, keeps a list of fonts and would write it below ``~/.cache`` and make
``~/.config/matplotlib``; PyTorch's compiler makes ``torchinductor_USER`` among temporary files on its own. Weights
that a command is asked to download lie where the hubs' clients put them (``TORCH_HOME``, ``HF_HOME``).
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["caches_among_temporary_files"]


def caches_among_temporary_files() -> None:
    """Tell matplotlib to use ``TMPDIR/calm-UID``, of this user alone, unless ``MPLCONFIGDIR`` says otherwise."""
    if "MPLCONFIGDIR" not in os.environ and sys.platform != "win32":
        with suppress(OSError):  # nowhere to write: matplotlib warns, and makes the list each time
            os.environ["MPLCONFIGDIR"] = _own_folder(f"calm-{os.getuid()}")


def _own_folder(name: str) -> str:
    """A folder of that name, or of a new one if that is not ours: its settings could name code to run."""
    folder = Path(tempfile.gettempdir(), name)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return str(folder) if ours else tempfile.mkdtemp(prefix=f"{name}-")
