"""Unpack a tar or zip archive that nobody vouches for: whole, below one folder, within limits."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from calm.errors import CalmError

__all__ = ["Limits", "check_digest", "is_archive", "unpack"]

SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to, so that a small file cannot fill the disk.

    Attributes:
        bytes: of all files together.
        files: members.
    """

    bytes: int = 400 * 1024**3
    files: int = 3_000_000


def is_archive(path: Path) -> bool:
    """Whether the name says that it is an archive :func:`unpack` reads."""
    return path.name.lower().endswith(SUFFIXES)


def check_digest(path: Path, algorithm: str, expected: str) -> str:
    """What is wrong with a file's digest (hexadecimal); empty if nothing is."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    return (
        "" if found == expected.lower() else f"{path}: {algorithm} is {found}, the published one {expected}"
    )


def unpack(
    path: Path,
    folder: Path,
    *,
    limits: Limits | None = None,
    wanted: Callable[[str], bool] | None = None,
) -> int:
    """Unpack an archive below ``folder``, which is made; file modes and owners are not kept.

    Args:
        path: tar (plain, gzip, bzip2, xz) or zip.
        folder: an existing or new folder.
        limits: of the unpacked files.
        wanted: whether a member is unpacked, by its name; all are checked.

    Returns:
        The number of files written.

    Raises:
        CalmError: the archive is missing, empty, cut short or damaged; a member is a link or a device, leaves
            ``folder``, or is there twice; a limit is passed.
    """
    if not path.is_file():
        raise CalmError(f"{path} is no file")
    if path.stat().st_size == 0:
        raise CalmError(f"{path} is empty: download it again")
    folder.mkdir(parents=True, exist_ok=True)
    limits = limits or Limits()
    keep = wanted or (lambda name: True)
    try:
        if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
            return _unzip(path, folder, limits, keep)
        return _untar(path, folder, limits, keep)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        OSError,
        NotImplementedError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, not a damaged archive
            raise
        raise CalmError(f"{path} is damaged, cut short or no archive ({error}): download it again") from error


@dataclass
class _Tally:
    """Checks members as they come: names, doubles, totals."""

    archive: Path
    limits: Limits
    seen: set[str]
    bytes: int = 0

    def admit(self, name: str, size: int) -> PurePosixPath:
        """The member's path below the folder."""
        place = PurePosixPath(name)
        if "\\" in name or "\0" in name or place.is_absolute() or ".." in place.parts or ":" in name[:2]:
            raise CalmError(f"{self.archive}: member {name!r} leaves the folder: archive refused")
        if str(place) in self.seen:
            raise CalmError(f"{self.archive}: member {name!r} is there twice: archive refused")
        self.seen.add(str(place))
        self.bytes += size
        if self.bytes > self.limits.bytes:
            raise CalmError(
                f"{self.archive} unpacks to more than {self.limits.bytes:,} bytes: archive refused"
            )
        if len(self.seen) > self.limits.files:
            raise CalmError(f"{self.archive} has more than {self.limits.files:,} files: archive refused")
        return place


def _untar(path: Path, folder: Path, limits: Limits, wanted: Callable[[str], bool]) -> int:
    tally, written = _Tally(path, limits, set()), 0
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg():
                raise CalmError(f"{path}: member {member.name!r} is a link or device: archive refused")
            tally.admit(member.name, member.size)
            if wanted(member.name):
                archive.extract(member, folder, set_attrs=False, filter="data")
                if (folder / member.name).stat().st_size != member.size:
                    raise tarfile.ReadError(f"{member.name} ends early")
                written += 1
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass  # to the end of the stream, whose checksum is compared there
    _complete(path)
    return written


def _complete(path: Path) -> None:
    """Raise for a plain tar without its end: a download that stopped exactly between two members."""
    with path.open("rb") as file:
        if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            return  # compressed: the stream's own end was read
        file.seek(-min(1024, path.stat().st_size), 2)
        if file.read().strip(b"\0"):
            raise tarfile.ReadError("the end of the archive is missing")


def _unzip(path: Path, folder: Path, limits: Limits, wanted: Callable[[str], bool]) -> int:
    tally, written = _Tally(path, limits, set()), 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            mode = stat.S_IFMT(member.external_attr >> 16)
            if mode not in (0, stat.S_IFREG):
                raise CalmError(f"{path}: member {member.filename!r} is a link or device: archive refused")
            if member.flag_bits & 1:
                raise CalmError(f"{path}: member {member.filename!r} is encrypted")
            place = tally.admit(member.filename, member.file_size)
            if wanted(member.filename):
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)  # stops at the size the directory states
                written += 1
    return written
