"""Write files whole or not at all: a name appears only when its content is complete.

What is not complete lies beside the final name, hidden, as ``.NAME.writing-XXXXXXXX.SUFFIX``, and its writer holds a
lock on it (``flock``). A killed writer leaves it behind without the lock: the next one in that folder removes it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calm.errors import CalmError

if sys.platform != "win32":  # there nothing is locked, and nothing that is left behind is removed
    import fcntl

__all__ = [
    "append_line",
    "atomic_path",
    "disk_errors_about",
    "remove_abandoned",
    "working_folder",
    "write_bytes",
    "write_json",
    "write_text",
]

_UNFINISHED = re.compile(r"\..*\.writing-\w{8}(\.[^.]*)?")
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_looked_into: set[str] = set()
"""Folders that this process has rid of what killed ones left: once is enough, and a folder may hold many files."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the final name, on error it vanishes.

    Parent folders are made. The temporary name keeps the suffix, so that writers which choose a format
    by suffix (Pillow, numpy) do as asked.

    Raises:
        OSError: the folder cannot be written, the disk is full: ``path`` is its file name.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _look_into(final.parent)
    with disk_errors_about(final):
        lock, temporary = _claim(final, folder=False)
        try:
            yield temporary
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o666 & ~mask)
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)


@contextmanager
def working_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, on the same disk, which is removed at the end with what is still in it.

    Parent folders are made.

    Raises:
        OSError: the folder cannot be written, the disk is full: ``path`` is its file name.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(final.parent)
    with disk_errors_about(final):
        lock, temporary = _claim(final, folder=True)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Delete what killed writers left in ``folder``, which need not exist; what is being written stays."""
    with suppress(OSError):
        for path in Path(folder).iterdir():
            if _UNFINISHED.fullmatch(path.name):
                with suppress(OSError):
                    _remove_if_free(path)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably (flushed to disk before it takes its name)."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Add a line to a file that grows, such as a log: the one kind that is not written whole."""
    with disk_errors_about(Path(path)), Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _look_into(folder: Path) -> None:
    name = str(folder.absolute())
    if name not in _looked_into:
        _looked_into.add(name)
        remove_abandoned(folder)


def _claim(final: Path, *, folder: bool) -> tuple[int, Path]:
    """A new temporary file or folder beside ``final``, and an open file descriptor whose lock keeps it ours."""
    prefix = f".{final.name if folder else final.stem}.writing-"
    while True:
        if folder:
            name = tempfile.mkdtemp(prefix=prefix, dir=final.parent)
            lock = os.open(os.devnull if sys.platform == "win32" else name, os.O_RDONLY)
        else:
            lock, name = tempfile.mkstemp(prefix=prefix, suffix=final.suffix, dir=final.parent)
            if sys.platform == "win32":  # no open file can be renamed there
                os.close(lock)
                lock = os.open(os.devnull, os.O_RDONLY)
        if _lock(lock, Path(name)):
            return lock, Path(name)
        os.close(lock)


def _lock(lock: int, path: Path) -> bool:
    """Whether ``path`` is still there once it is locked: nobody took it for abandoned in between."""
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks: what is left behind there is never removed
            fcntl.flock(lock, fcntl.LOCK_EX)
    return path.exists()


def _remove_if_free(path: Path) -> None:
    if sys.platform != "win32":
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(lock)


@contextmanager
def disk_errors_about(final: Path) -> Iterator[None]:
    """Let what goes wrong with the disk while ``final`` is written be an OSError about it.

    Libraries tell it in their own ways, about a temporary name or about none.
    """
    try:
        yield
    except CalmError:
        raise
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(final)) from error


def _disk_error(error: BaseException) -> int | None:
    """Number of the error of the disk, or of permission, that made a writer fail; None if other files are at fault."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    if told and int(told[1]) in _OF_DISKS:
        return int(told[1])
    cause: BaseException | None = error
    while cause is not None:  # torch.save fails for another reason after the first
        if isinstance(cause, OSError) and cause.errno in _OF_DISKS and _is_unfinished(cause.filename):
            return cause.errno
        cause = cause.__context__
    refused = (
        isinstance(error, PermissionError) and error.filename is not None and _is_unfinished(error.filename)
    )
    return errno.EACCES if refused else None


def _is_unfinished(name: Any) -> bool:
    """Whether it is a temporary name, or below one, or no name at all."""
    return name is None or any(_UNFINISHED.fullmatch(part) for part in Path(os.fsdecode(name)).parts)
