"""File systems that are full or must not be written, where this process has the right to make them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A small file system in memory.

    Attributes:
        root: where it is mounted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def leave(self, free: int) -> None:
        """Fill it, so that this many bytes are free."""
        there = shutil.disk_usage(self.root).free
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, there - free)

    def empty(self) -> None:
        """Make room again."""
        self._ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Refuse every write."""
        subprocess.run(["mount", "-o", "remount,ro", self.root], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.root], check=True)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Disk]:
    """A disk of ``size`` bytes at ``folder``; the test is skipped where it cannot be mounted."""
    folder.mkdir()
    options = f"size={size},mode=0755"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no right to mount a small disk: {mount.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


def size_of(root: Path) -> int:
    """Bytes that the files below a folder take, each once however many names it has."""
    files = {path.stat().st_ino: path.stat() for path in root.rglob("*")}
    return sum(512 * status.st_blocks for status in files.values())
