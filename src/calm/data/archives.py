"""Published archives: where they are to be had, their checksums, and how they are unpacked, whole and within limits."""

from __future__ import annotations

import hashlib
import http.client
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from calm.errors import CalmError
from calm.files import atomic_path, working_folder

MAX_BYTES, MAX_METADATA_BYTES, MAX_FILES = 400 * 1024**3, 8 * 1024**3, 3_000_000
"""Limits on the bytes (of metadata, too) and files of an unpacked archive: a small file must not fill the disk."""

MAX_DOWNLOAD, TIMEOUT = 2 * 1024**3, 30.0
"""Limits of a download: its bytes, and the seconds without an answer."""


class Published(NamedTuple):
    """A published archive."""

    patterns: str  # of its file name in lower case, separated by spaces
    where: str  # to get it, for people
    md5: str = ""
    url: str = ""  # of the archive itself, if `calm data prepare` can fetch it


_CALTECH, _IMAGENET = "https://data.caltech.edu/records", "https://image-net.org (account)"
_WSOL = "https://github.com/clovaai/wsolevaluation"

PUBLISHED: dict[str, Published] = {
    "cub": Published(
        "cub_200_2011.*", f"{_CALTECH}/65de6-vp158 (CUB_200_2011.tgz)", "97eceeb196236b17998738112f37df78"
    ),
    "cub-segmentations": Published(
        "segmentations.*", f"{_CALTECH}/w9d68-gec53 (segmentations.tgz)", "4d47ba1228eae64f2fa547c47bc65255"
    ),
    "cubv2": Published("cubv2.*", f"{_WSOL} (CUBV2)"),
    "ilsvrc-train": Published("ilsvrc2012_img_train.tar", _IMAGENET, "1d675b47d978889d74fa0da5fadfb00e"),
    "ilsvrc-val": Published("ilsvrc2012_img_val.tar", _IMAGENET, "29b22e2961454d5413ddabcf34fc5622"),
    "imagenetv2": Published(
        "imagenetv2* imagenet-v2* val2.*", "https://github.com/modestyachts/ImageNetV2 (imagenetv2-threshold0.7.tar.gz)"
    ),
    "openimages": Published("*openimages* train.* val.* test.*", f"{_WSOL} (OpenImages30k)"),
    "tiny-imagenet": Published(
        "tiny-imagenet-200.*", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
    ),
    "metadata": Published(
        "*metadata* wsolevaluation*",
        f"{_WSOL} (folder metadata)",
        url=f"{_WSOL}/archive/e9972606b18064ea886f098f2b5b29b9ade75f09.zip",
    ),
}


@dataclass
class Prepared:
    """The result of a preparation."""

    name: str  # of the data set
    root: Path  # folder to give to ``calm data check`` and to training
    metadata_root: Path | None = None  # its ``--metadata_root``; None where none is needed
    partial: bool = False  # whether wrong counts are notes instead of errors
    counts: dict[str, int] = field(default_factory=dict)  # of what is there
    notes: list[str] = field(default_factory=list)  # what is missing, and where to get it

    def expect(self, what: str, count: int, expected: int, where: str = "") -> None:
        """Store a count, and `complain` if it is not the expected one."""
        self.counts[what] = count
        if count != expected:
            self.complain(f"{count:,} {what}, expected {expected:,}{where and f'; {where}'}")

    def complain(self, message: str) -> None:
        """Note what is wrong with a partial preparation; raise a CalmError if it is not partial."""
        if not self.partial:
            raise CalmError(f"{self.name}: {message} (--partial prepares what is there)")
        self.notes.append(message)

    def __str__(self) -> str:
        lists = f" --metadata_root {self.metadata_root}" if self.metadata_root else ""
        counts = (f"  {count:,} {what}\n" for what, count in self.counts.items())
        notes = (f"  note: {note}\n" for note in self.notes)
        return "".join([f"{self.name}: {self.root}\n", *counts, *notes, f"next: calm data check {self.root}{lists}"])


def list_archives(sources: Sequence[Path]) -> list[Path]:
    """Return the archives, of which there must be one or more, among files and directly in folders."""
    archives: list[Path] = []
    suffixes = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
    for source in sources:
        if not source.exists():
            raise CalmError(f"--from {source} does not exist")
        inside = sorted(source.iterdir()) if source.is_dir() else []
        archives += [path for path in inside if path.name.lower().endswith(suffixes)] if source.is_dir() else [source]
    if not archives:
        raise CalmError(f"no archive (.tar, .tgz, .tar.gz, .zip) in --from {' '.join(map(str, sources))}")
    return archives


def find(key: str, archives: Sequence[Path], prepared: Prepared) -> list[Path]:
    """Return the archives that are ``PUBLISHED[key]`` by their names; `Prepared.complain` gets wrong checksums."""
    published = PUBLISHED[key]
    names = published.patterns.split()
    matching = [path for path in archives if any(fnmatch(path.name.lower(), name) for name in names)]
    if key == "openimages":
        matching = [path for path in matching if "metadata" not in path.name.lower()]
    for path in matching:
        if published.md5 and (wrong := check_digest(path, "md5", published.md5)):
            prepared.complain(f"{wrong}: get it from {published.where}")
    return matching


def check_digest(path: Path, algorithm: str, expected: str) -> str:
    """Return what is wrong with a file's digest (hexadecimal); empty if nothing is."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    return "" if digest == expected.lower() else f"{path}: {algorithm} is {digest}, the published one {expected}"


def unpack(
    path: Path, folder: Path, *, max_bytes: int = MAX_BYTES, wanted: Callable[[str], bool] = lambda name: True
) -> int:
    """Unpack a tar (plain, gzip, bzip2, xz) or zip below ``folder``, and return the number of files written.

    All members are checked; those are unpacked whose names are ``wanted``. Modes and owners are not kept.

    Raises:
        CalmError: the archive is missing, empty, truncated or damaged; a member is a link, a device or encrypted, is
            there twice, or leaves ``folder``; a limit is passed.
    """
    if not path.is_file():
        raise CalmError(f"{path} is no file")
    folder.mkdir(parents=True, exist_ok=True)
    size = written = 0
    seen: set[str] = set()
    try:
        is_zip = zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)
        for name, member_size, extract in (_zip_members if is_zip else _tar_members)(path):
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or ":" in name[:2]:
                raise CalmError(f"{path}: member {name!r} leaves the folder: archive refused")
            if name in seen:
                raise CalmError(f"{path}: member {name!r} is there twice: archive refused")
            seen.add(name)
            size += member_size
            if size > max_bytes or len(seen) > MAX_FILES:
                most = f"{max_bytes:,} bytes" if size > max_bytes else f"{MAX_FILES:,} files"
                raise CalmError(f"{path} unpacks to more than {most}: archive refused")
            if wanted(name):
                extract(folder)
                written += 1
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, not a damaged archive
            raise
        raise CalmError(f"{path} is damaged, truncated or no archive ({error}): download it again") from error
    return written


_Members = Iterator[tuple[str, int, Callable[[Path], object]]]  # files: name, bytes, a function that extracts it below


def _tar_members(path: Path) -> _Members:
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isreg() and not member.isdir():
                raise CalmError(f"{path}: member {member.name!r} is a link or device: archive refused")
            if member.isreg():
                yield member.name, member.size, partial(archive.extract, member, set_attrs=False, filter="data")
        while archive.fileobj is not None and archive.fileobj.read(1 << 20):
            pass  # the checksum of a compressed stream is compared at its end
    # A plain tar that was cut between two members lacks the zeros at its end, which tarfile does not miss.
    with path.open("rb") as file:
        if file.read(2) not in (b"\x1f\x8b", b"BZ", b"\xfd7"):
            file.seek(-min(1024, path.stat().st_size), 2)
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("the end of the archive is missing")


def _zip_members(path: Path) -> _Members:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise CalmError(f"{path}: member {member.filename!r} is a link or device: archive refused")
            if member.flag_bits & 1:
                raise CalmError(f"{path}: member {member.filename!r} is encrypted")
            if not member.is_dir():
                yield member.filename, member.file_size, partial(archive.extract, member)


@contextmanager
def staged(final: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a working folder, removed at the end, and ``result`` in it, to be filled, which then becomes ``final``."""
    with working_folder(final) as work:
        result = work / "result"
        yield work, result
        if not result.is_dir():
            raise CalmError(f"nothing was found for {final}")
        result.replace(final)


def folder_of(file: str, work: Path, archive: Path, what: str) -> Path:
    """Return the first folder in which an archive that was unpacked in ``work`` has a file, if it is ``what``."""
    if path := min(work.rglob(file), default=None):
        return path.parent
    raise CalmError(f"{archive} has no {file}: it is not {what}")


def merge(source: Path, target: Path) -> None:
    """Move all files below ``source`` to the same places below ``target``, where none of them may be."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        if place.exists():
            raise CalmError(f"{path.relative_to(source)} is in two archives")
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def place_metadata(name: str, out: Path, archives: Sequence[Path], prepared: Prepared, url: str, sha256: str) -> None:
    """Copy the released lists of a data set (CUB, ILSVRC, OpenImages) to ``out/metadata/name``.

    They come from an archive at hand or from ``url`` (``published``: that of `PUBLISHED`); else a note asks for them.
    """
    final = out / "metadata" / name
    matching = [] if final.exists() else find("metadata", archives, prepared)
    if url and (final.exists() or matching):
        reason = f"{matching[0]} was taken" if matching else f"the lists are in {final} (delete it to fetch them)"
        prepared.notes.append(f"nothing fetched from {url}: {reason}")
    if not final.exists():
        if not (matching or url):
            put = f"put metadata.zip from {PUBLISHED['metadata'].where} into --from"
            prepared.notes.append(f"no metadata lists: {put}, or give --metadata_url published to fetch it")
            return
        with staged(final) as (work, result):
            archive = matching[0] if matching else work / "download"
            if not matching:
                download(PUBLISHED["metadata"].url if url == "published" else url, archive, sha256)
            unpack(archive, work / "all", max_bytes=MAX_METADATA_BYTES, wanted=lambda file: name in file.split("/"))
            lists = f"{name}/train/image_ids.txt"
            folder_of(lists, work / "all", archive, "the released metadata").parent.replace(result)
    prepared.metadata_root = final


def download(url: str, target: Path, sha256: str = "") -> None:
    """Fetch a file, atomically, from an https:// or file:// address, and compare its checksum unless that is empty.

    Raises:
        CalmError: another kind of address, no network, an error of the server, no answer for `TIMEOUT` seconds, more
            than `MAX_DOWNLOAD` bytes, another checksum.
    """
    scheme = urlsplit(url).scheme
    if scheme not in ("https", "file"):
        raise CalmError(f"--metadata_url {url}: only https:// (or file://) addresses are fetched")
    try:
        with atomic_path(target) as temporary:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, temporary.open("wb") as file:
                if urlsplit(answer.url).scheme != scheme:
                    raise CalmError(f"{url} leads to {answer.url}, which is not {scheme}")
                length = int(answer.headers.get("Content-Length") or 0)
                while part := answer.read(1 << 20):
                    file.write(part)
                    if max(length, file.tell()) > MAX_DOWNLOAD:
                        raise CalmError(f"{url} has more than {MAX_DOWNLOAD:,} bytes: more than metadata has")
            if length and temporary.stat().st_size != length:
                raise CalmError(f"{url}: the download was cut short: try again")
            if sha256 and (wrong := check_digest(temporary, "sha256", sha256)):
                raise CalmError(f"{url}: {wrong}")
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        advice = "without a network, download it elsewhere and put it into --from"
        raise CalmError(f"cannot fetch {url} ({error}): {advice}") from error
