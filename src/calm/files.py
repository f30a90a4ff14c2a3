"""Read untrusted JSON, YAML, CSV and PyTorch files within size limits; write files atomically; read in threads.

Only regular files are opened, no code in a file is run, and errors are a `CalmError` that names the file. A file takes
its final name when its content is complete. Until then its writer holds a lock (``flock``) on
``.NAME.writing-XXXXXXXX.SUFFIX`` beside it; what a killed writer left is removed by the next writer in that folder.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from calm.errors import CalmError

if sys.platform != "win32":  # there temporary files have no lock, and abandoned ones stay
    import fcntl


MAX_TEXT_BYTES = 16 * 2**20  # largest JSON or CSV file that is read
MAX_YAML_BYTES = 20_000  # largest YAML file
MAX_YAML_NODES = 5_000  # most values of a YAML file, each alias counted as all that it stands for
MAX_YAML_DEPTH = 50  # deepest nesting of brackets in a YAML file; the parser's time grows quickly with it


def open_regular(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """Open a regular file to read its bytes: no folder, pipe or device; ``what`` describes it in messages."""
    place = Path(path)
    try:
        if stat.S_ISREG(place.stat().st_mode):
            return place.open("rb")
        reason = f"it is {'a folder' if place.is_dir() else 'a pipe or device'}, not a file"
    except FileNotFoundError:
        reason = "no such file"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:  # a name with a NUL
        raise CalmError(f"cannot read {what} {str(path)!r}: {error}") from error
    raise CalmError(f"cannot read {what} {path}: {reason}")


def similar_folder(path: Path) -> str:
    """Return, for the message about a missing folder, the name of a similar one beside it; empty if there is none."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def read_text(path: str | os.PathLike[str], what: str = "file", *, max_bytes: int | None = None) -> str:
    """Return the text of a UTF-8 file of at most ``max_bytes`` (`MAX_TEXT_BYTES`), without a byte order mark."""
    limit = MAX_TEXT_BYTES if max_bytes is None else max_bytes
    with open_regular(path, what) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CalmError(f"{what} {path} is larger than {limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalmError(f"{what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Return the content of a JSON file, in which no object has a key twice."""
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CalmError(f"cannot read {what} {path} as JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key[:80]!r} is there twice in one object")
        result[key] = value
    return result


def read_columns(path: str | os.PathLike[str], *, need: Sequence[str] = ()) -> dict[str, list[float]]:
    """Return the columns, ``need`` among them, of a CSV file of numbers (or NaN) whose first line names them."""
    text = read_text(path)
    try:
        names, *rows = [row for row in csv.reader(text.splitlines()) if row] or [[]]
        ragged = [f"row {number} has {len(row)} fields" for number, row in enumerate(rows, 1) if len(row) != len(names)]
        if ragged:
            raise ValueError(f"{ragged[0]}, not {len(names)}")
        columns = [[float(field) for field in column] for column in zip(*rows, strict=True)]
    except (ValueError, csv.Error) as error:
        raise CalmError(f"cannot read file {path} as a table of numbers: {str(error)[:300]}") from error
    missing = [name for name in need if name not in names]
    if missing or len(set(names)) < len(names):
        fault = f"has no column {missing[0]!r}" if missing else "names a column twice"
        raise CalmError(f"file {path} {fault}: its first line is {','.join(names)[:200]!r}")
    if not rows:
        raise CalmError(f"file {path} has no row of numbers")
    return dict(zip(names, columns, strict=True))


def read_yaml(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Return the content of a YAML file of plain values, lists and mappings without a key twice, within the limits."""
    text = read_text(path, what, max_bytes=MAX_YAML_BYTES)
    if max(accumulate((char in "[{") - (char in "]}") for char in text), default=0) > MAX_YAML_DEPTH:
        raise CalmError(f"{what} {path} nests brackets more than {MAX_YAML_DEPTH} deep")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _yaml_size(node, {}) > MAX_YAML_NODES:
            raise CalmError(f"{what} {path} stands for more than {MAX_YAML_NODES:,} values: use fewer aliases")
        return loader.construct_document(node)
    except CalmError:
        raise
    except Exception as error:  # PyYAML's constructors fail in any way: IndexError for an empty !!float
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise CalmError(f"cannot read {what} {path} as YAML: {reason}; mend the file, or write it anew") from error


def _yaml_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Count the values that ``node`` stands for, aliases written out; infinite if it contains itself."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = float("inf")  # until it is known: what contains itself stays infinite
    members: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        members = [member for pair in node.value for member in pair]
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in set(keys) if keys.count(key) > 1]:
            raise ValueError(f"{twice[0][:80]!r} is twice in the mapping of line {node.start_mark.line + 1}")
    elif isinstance(node, yaml.SequenceNode):
        members = node.value
    elif ":" in node.value and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        line = node.start_mark.line + 1
        raise ValueError(f"{node.value!r} in line {line} is a number to base 60 in YAML: put it in quotes")
    sizes[id(node)] = 1 + sum(_yaml_size(member, sizes) for member in members)
    return sizes[id(node)]


_TEXT_PAGES = (b"<!doctype", b"<html", b"version https://git-lfs")


def read_torch(path: Path, what: str) -> Any:
    """Return what ``torch.save`` wrote, tensors (on the CPU) and plain Python values; no code in the file is run.

    A `CalmError` if it is not PyTorch's, larger when unpacked, or damaged (PyTorch compares no checksums of zip files).
    """
    import torch

    try:
        with open_regular(path, what) as file:
            if file.read(256).lstrip().lower().startswith(_TEXT_PAGES):
                raise CalmError(f"{path} is a text page, not the file itself: download it again")
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    # PyTorch stores members uncompressed, but would unpack compressed or overlapping ones.
                    unpacked = sum(member.file_size for member in archive.infolist())
                    if unpacked > file.seek(0, os.SEEK_END) or archive.testzip() is not None:
                        raise ValueError("compressed, or a wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CalmError:
        raise
    except OSError as error:
        raise CalmError(f"cannot read {what} {path}: {error}") from error
    except Exception as error:  # a damaged file can make the restricted unpickler fail in any way
        wanted = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]:.200}, not for weights" if wanted else "damaged or no PyTorch file"
        raise CalmError(f"{path}: no checkpoint that can be read safely: {reason}; nothing in it was run") from error


_TEMPORARY_NAME = re.compile(r"\..*\.writing-\w{8}(\.[^.]*)?")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_umask = threading.Lock()  # it can only be read by setting it, which two threads must not do at once
_cleaned: set[Path] = set()  # folders in which this process has looked for abandoned files, which once is enough


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, of the same suffix, that takes its name on success and goes on an error.

    Parent folders are made. A folder that cannot be written or a full disk is an OSError with ``path`` as file name.
    """
    with _temporary(Path(path), folder=False) as temporary:
        yield temporary
        with _umask:
            mask = os.umask(0)
            os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)


def working_folder(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Yield an empty folder beside ``path``, which is removed at the end with its content; errors as `atomic_path`."""
    return _temporary(Path(path), folder=True)


def check_writable(folder: Path) -> None:
    """Raise an OSError if nothing can be written to a folder, which is made: before the work, and not after it."""
    with working_folder(folder / "results"):
        pass


@contextmanager
def _temporary(final: Path, *, folder: bool) -> Iterator[Path]:
    final.parent.mkdir(parents=True, exist_ok=True)
    if folder or final.parent.absolute() not in _cleaned:
        _cleaned.add(final.parent.absolute())
        remove_abandoned(final.parent)
    with disk_errors_about(final):
        lock, temporary = _create_locked(final, folder=folder)
        try:
            yield temporary
        finally:
            if folder:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            if lock is not None:
                os.close(lock)


def _create_locked(final: Path, *, folder: bool) -> tuple[int | None, Path]:
    """Create a temporary file or folder beside ``final``; return the file descriptor that locks it, and its path."""
    prefix = f".{final.name if folder else final.stem}.writing-"
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        else:
            file, name = tempfile.mkstemp(prefix=prefix, suffix=final.suffix, dir=final.parent)
            os.close(file)
            path = Path(name)
        lock = _lock(path, wait=True)
        if path.exists():  # else another process took it for abandoned before it was locked
            return lock, path


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder, and return the file descriptor that holds the lock; None where that is not possible."""
    if sys.platform == "win32":
        return None
    with suppress(OSError), ExitStack() as on_error:  # locked by another process, or a file system without locks
        lock = os.open(path, os.O_RDONLY)
        on_error.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        on_error.pop_all()
        return lock
    return None


@contextmanager
def held_alone(path: Path, what: str, fix: str) -> Iterator[None]:
    """Hold a file during the block for this process alone, which it then names; a killed process lets go of it.

    Where the file system has no locks, this does nothing.

    Raises:
        CalmError: Another process holds it: ``what``, the process, and ``fix``.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            if sys.platform != "win32":
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would go on holding
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise CalmError(f"{what} {file.read(300).strip() or 'another process'}: {fix}") from error
        except OSError:  # no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Delete what killed writers left in ``folder``, which need not exist; files being written stay."""
    with suppress(OSError):
        for path in Path(folder).iterdir():
            if _TEMPORARY_NAME.fullmatch(path.name) and (lock := _lock(path, wait=False)) is not None:
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                os.close(lock)


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to ``path`` atomically, and flush it to the disk before it takes its name."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically. Numbers that are not finite become null."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON, on one line without ``indent``. Numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Append a line to a file that grows, such as a log; such files alone are not written atomically."""
    with disk_errors_about(Path(path)), Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


@contextmanager
def disk_errors_about(final: Path) -> Iterator[None]:
    """Turn errors of the disk, which libraries report in many ways, into an OSError about ``final``."""
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, CalmError) else _disk_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(final)) from error


def _disk_error(error: BaseException) -> int | None:
    """Return the errno of a full or read-only disk that made a writer fail; None if another file is at fault."""
    if (match := re.search(r"\(os error (\d+)\)", str(error))) and int(match[1]) in _DISK_ERRORS:  # safetensors
        return int(match[1])
    cause: BaseException | None = error
    while cause is not None:  # torch.save raises another error after the disk's
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS and _is_temporary(cause.filename or ""):
            return cause.errno
        cause = cause.__context__
    refused = isinstance(error, PermissionError) and error.filename and _is_temporary(error.filename)
    return errno.EACCES if refused else None


def _is_temporary(name: str | bytes) -> bool:
    """Return whether ``name`` is a temporary path or below one, or empty."""
    return not name or any(_TEMPORARY_NAME.fullmatch(part) for part in Path(os.fsdecode(name)).parts)


def use_temporary_caches() -> None:
    """Let matplotlib cache in ``TMPDIR/calm-UID``, and not in the user's home, unless ``MPLCONFIGDIR`` is set."""
    if "MPLCONFIGDIR" in os.environ or sys.platform == "win32":
        return
    with suppress(OSError):  # nowhere to write: matplotlib warns, and makes its list each time
        folder = Path(tempfile.gettempdir(), f"calm-{os.getuid()}")
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        # matplotlib's settings could name code to run: a folder that others may write is not used.
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
        os.environ["MPLCONFIGDIR"] = str(folder) if own else tempfile.mkdtemp(prefix=f"{folder.name}-")


S = TypeVar("S")
T = TypeVar("T")


def processors() -> int:
    """Return how many processors this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[S], T], items: Sequence[S], workers: int | None = None) -> Iterator[T]:
    """Yield ``function`` of each item, in order, computed in threads: by default two per processor.

    Raises:
        CalmError: ``workers`` below 1.
    """
    if workers is not None and workers < 1:
        raise CalmError(f"workers is {workers}: give 1 or more threads")
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), 1024):  # which bounds the memory of results that wait
            yield from pool.map(function, items[start : start + 1024])


def ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[S], T],
    items: Iterable[S],
    *,
    depth: int,
    size: Callable[[S], int],
    limit: int,
) -> Iterator[T]:
    """Yield ``function`` of each item, in order, computed in a pool's threads before it is asked for.

    At most ``depth`` items are being computed or wait, and of more than one those whose ``size`` sums to ``limit`` at
    most. What ``function`` raises is raised here in its turn.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    for item in items:
        own = size(item)
        while waiting and (len(waiting) >= depth or sum(each for each, _ in waiting) + own > limit):
            yield waiting.popleft()[1].result()
        waiting.append((own, pool.submit(function, item)))
    while waiting:
        yield waiting.popleft()[1].result()
