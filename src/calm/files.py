"""Where libraries keep their caches while a command runs: among temporary files, not in the user's home.

matplotlib, which torchmetrics imports, keeps a list of fonts and would write it below ``~/.cache`` and make
``~/.config/matplotlib``; PyTorch's compiler makes ``torchinductor_USER`` among temporary files on its own. Weights
that a command is asked to download lie where the hubs' clients put them (``TORCH_HOME``, ``HF_HOME``).

Open files that nobody vouches for: regular files only, JSON, YAML, CSV of bounded size that mean what they seem to.

Nothing in a file is run, and a small file never becomes a large one in memory.

Write files whole or not at all: a name appears only when its content is complete.

What is not complete lies beside the final name, hidden, as ``.NAME.writing-XXXXXXXX.SUFFIX``, and its writer holds a
lock on it (``flock``). A killed writer leaves it behind without the lock: the next one in that folder removes it.

Read a file that ``torch.save`` wrote, and that nobody vouches for: nothing in it is run.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import pickletools
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, BinaryIO

import yaml

from calm.errors import CalmError

__all__ = [
    "append_line",
    "atomic_path",
    "caches_among_temporary_files",
    "disk_errors_about",
    "open_regular",
    "read_columns",
    "read_json",
    "read_text",
    "read_torch",
    "read_yaml",
    "remove_abandoned",
    "working_folder",
    "write_bytes",
    "write_json",
    "write_text",
]

MOST_JSON = 16 * 2**20
"""Bytes of a JSON file, at most."""

MOST_YAML = 20_000
"""Bytes of a YAML file, at most."""

MOST_NODES = 5_000
"""Values in a YAML file, at most, each alias counted as what it stands for."""


DEEPEST = 50
"""Brackets within brackets in a YAML file, at most: the parser needs seconds for hundreds."""


def open_regular(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """Open a file to read its bytes. Never waits: a pipe or device is no file.

    Args:
        path: the file.
        what: what it is, for the message.

    Raises:
        CalmError: it is missing, a folder, a pipe, a device, a loop of links, or not readable.
    """
    place = Path(path)
    try:
        if not stat.S_ISREG(place.stat().st_mode):
            kind = "a folder" if place.is_dir() else "a pipe or device"
            raise CalmError(f"cannot read {what} {path}: it is {kind}, not a file")
        return place.open("rb")
    except FileNotFoundError as error:
        raise CalmError(f"cannot read {what} {path}: no such file") from error
    except OSError as error:
        raise CalmError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, CalmError):
            raise
        raise CalmError(f"cannot read {what} {str(path)!r}: {error}") from error  # a name with a NUL


def read_text(path: str | os.PathLike[str], what: str = "file", *, most: int = MOST_JSON) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes; a byte order mark is dropped.

    Raises:
        CalmError: see `open_regular`; or the file is larger, or not UTF-8.
    """
    with open_regular(path, what) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CalmError(f"{what} {path} is larger than {most:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalmError(f"{what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """The content of a JSON file.

    Raises:
        CalmError: see `read_text`; or it is no JSON, nests too deeply, or an object has a name twice.
    """
    try:
        return json.loads(read_text(path, what), object_pairs_hook=_object)
    except CalmError:
        raise
    except (ValueError, RecursionError) as error:
        raise CalmError(f"cannot read {what} {path} as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is there twice in one object")
        found[name] = value
    return found


def read_columns(
    path: str | os.PathLike[str], what: str = "file", *, need: Sequence[str] = ()
) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers whose first line names them; nan is a number here.

    Args:
        path: the file.
        what: what it is, for messages.
        need: columns that it must have.

    Raises:
        CalmError: see `read_text`; or a column of ``need`` is missing, a name is twice there, a row has more or fewer
            fields than there are names or a field that is no number, or there is no row.
    """
    text = read_text(path, what)
    try:
        names, *rows = [row for row in csv.reader(text.splitlines()) if row] or [[]]
        lacking = [name for name in need if name not in names]
        if lacking or len(set(names)) < len(names):
            fault = f"has no column {lacking[0]!r}" if lacking else "names a column twice"
            raise CalmError(f"{what} {path} {fault}: its first line is {','.join(names)[:200]!r}")
        if not rows:
            raise CalmError(f"{what} {path} has no row of numbers")
        for number, row in enumerate(rows, start=1):
            if len(row) != len(names):
                raise ValueError(f"row {number} has {len(row)} fields, not {len(names)}")
        return {name: [float(row[place]) for row in rows] for place, name in enumerate(names)}
    except CalmError:
        raise
    except (ValueError, csv.Error) as error:
        raise CalmError(f"cannot read {what} {path} as a table of numbers: {str(error)[:300]}") from error


def read_yaml(path: str | os.PathLike[str], what: str = "file") -> Any:
    """The content of a YAML file: plain values, lists and mappings.

    Raises:
        CalmError: see `read_text`; or it is no YAML, has a tag that asks for an object, nests too deeply, has a key
            twice in one mapping, or aliases that stand for more than `MOST_NODES` values.
    """
    text = read_text(path, what, most=MOST_YAML)
    if max(accumulate((character in "[{") - (character in "]}") for character in text), default=0) > DEEPEST:
        raise CalmError(f"{what} {path} nests brackets more than {DEEPEST} deep")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise CalmError(f"{what} {path} stands for more than {MOST_NODES:,} values: write fewer aliases")
        return loader.construct_document(node)
    except CalmError:
        raise
    except Exception as error:  # PyYAML's makers of values fail in any way: IndexError for an empty !!float
        raise CalmError(f"cannot read {what} {path} as YAML: {error}") from error


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values ``node`` stands for, aliases written out; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known: who asks meanwhile asks from inside
        members: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            members = [member for pair in node.value for member in pair]
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ValueError(f"{twice[:80]!r} is twice in the mapping of line {node.start_mark.line + 1}")
        elif isinstance(node, yaml.SequenceNode):
            members = node.value
        sizes[id(node)] = 1 + sum(_size(member, sizes) for member in members)
    return sizes[id(node)]


if sys.platform != "win32":  # there nothing is locked, and nothing that is left behind is removed
    import fcntl


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


MOST_SHARED = 45
"""Times that a pickle may use a tuple again: no more than 3 ** 15 tuples in all come of so many."""

_OLD_PICKLES = 5
"""The format before the zip format: magic number, version, machine, content, keys of the storages."""


def read_torch(path: Path, what: str, *, map_location: Any = "cpu") -> Any:
    """Tensors and plain Python values of a file.

    Args:
        path: the file, in PyTorch's zip format or in the one before it.
        what: what it is, for messages.
        map_location: where the tensors go, as for ``torch.load``.

    Raises:
        CalmError: naming the file: it is missing, no file of PyTorch's, damaged (the zip format has checksums),
            compressed, or asks for anything but tensors and plain values.
    """
    import torch

    try:
        with open_regular(path, what) as file:
            start = file.read(256).lstrip().lower()
            if start.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
                raise CalmError(
                    f"{path} is a text page, not the file itself: download it again, and look at its size"
                )
            _check_pickles(file)
        return torch.load(path, map_location=map_location, weights_only=True)
    except CalmError:
        raise
    except OSError as error:
        raise CalmError(f"cannot read {what} {path}: {error}") from error
    except Exception as error:  # a damaged file can make the restricted unpickler fail in any way
        asked = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        why = (
            f"it asks for {asked[1]:.200}, which weights do not need"
            if asked
            else "it is damaged or no PyTorch file"
        )
        raise CalmError(
            f"{path} is not a checkpoint that can be read safely: {why}; nothing in it was run"
        ) from error


def _check_pickles(file: BinaryIO) -> None:
    """Look at the pickles before anything is made of them.

    Raises:
        ValueError: an archive with a wrong checksum, which PyTorch does not compare; one that would be larger unpacked
            than it is (PyTorch does not compress, but unpacks); more than `MOST_SHARED` uses of tuples made before.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(_OLD_PICKLES):
            _check_shared(file)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type for member in members):
            raise ValueError("compressed")
        if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
            raise ValueError("members that overlap")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} has a wrong checksum")
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as pickled:
                    _check_shared(pickled)


def _check_shared(file: IO[bytes]) -> None:
    """Raise for a pickle that builds tuples of tuples of tuples, each from the last one twice: a few bytes more double
    the time to look one up in a dict. Optimisers share a tuple or two."""
    tuples: set[object] = set()
    made, uses, memorized = "", 0, 0
    for code, argument, _ in pickletools.genops(file):
        if "PUT" in code.name or code.name == "MEMOIZE":
            place = memorized if code.name == "MEMOIZE" else argument
            memorized += 1
            if made.startswith("TUPLE"):
                tuples.add(place)
        elif "GET" in code.name:
            uses += argument in tuples
            if uses > MOST_SHARED:
                raise ValueError("tuples of tuples")
        made = code.name


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
