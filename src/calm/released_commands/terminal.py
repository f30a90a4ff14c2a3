"""How a released command ends and what it says: on the terminal, and in the experiment's log.log."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from calm.errors import CalmError
from calm.released_commands.flags import Flags, parse

__all__ = ["RULE", "Log", "run"]

RULE = "=" * 59


class Log:
    """Prints lines, and appends them to a file from the moment that its folder exists.

    A command that fails before it has made the experiment's folder leaves nothing behind.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def __call__(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self._waiting += line + "\n"
        if self.path.parent.is_dir():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
            self._waiting = ""


def run(prog: str, command: Callable[[Flags], None]) -> int:
    """Run a released command on the process's arguments.

    Returns:
        The exit code: 0; 2 after a mistake of the user's, which is printed without a traceback; 130 after Ctrl-C.
    """
    try:
        command(parse(prog))
    except (CalmError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues an unfinished training", file=sys.stderr)
        return 130
    return 0
