"""The released metadata lists: from an archive at hand, or from an address."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from calm.atomic import atomic_path, working_folder
from calm.data.prepare.archives import Limits, check_digest, unpack
from calm.data.prepare.sources import PUBLISHED, find
from calm.data.prepare.staging import Prepared, staged
from calm.errors import CalmError

__all__ = ["download", "place_metadata"]

LIMITS = Limits(bytes=8 * 1024**3, files=200_000)
LARGEST = 2 * 1024**3
"""Bytes a download may have."""


def place_metadata(
    name: str, out: Path, archives: Sequence[Path], prepared: Prepared, url: str, sha256: str
) -> None:
    """Put the lists of data set ``name`` (CUB, ILSVRC, OpenImages) at ``out/metadata/name``.

    Without an archive or address this is only a note. The address ``published`` stands for that of `PUBLISHED`.

    Raises:
        CalmError: the archive has no such lists; the download fails.
    """
    final = out / "metadata" / name
    if final.exists():
        if url:
            prepared.notes.append(
                f"nothing fetched from {url}: the lists are in {final} (delete it to fetch them)"
            )
    else:
        found = find("metadata", archives, prepared)
        if found:
            if url:
                prepared.notes.append(f"nothing fetched from {url}: {found[0]} was taken")
            _unpack_lists(found[0], final, name)
        elif url:
            with working_folder(final) as folder:
                address = PUBLISHED["metadata"].url if url == "published" else url
                download(address, folder / "download", sha256)
                _unpack_lists(folder / "download", final, name)
        else:
            prepared.notes.append(
                f"no metadata lists: put metadata.zip from {PUBLISHED['metadata'].where} into --from, "
                "or give --metadata_url published to fetch it"
            )
            return
    if final.exists():
        prepared.metadata_root = final


def _unpack_lists(archive: Path, final: Path, name: str) -> None:
    with staged(final) as (work, result):
        unpack(
            archive, work / "all", limits=LIMITS, wanted=lambda member: name in PurePosixPath(member).parts
        )
        lists = next((path.parent.parent for path in sorted(work.rglob("image_ids.txt"))), None)
        if lists is None or lists.name != name:
            raise CalmError(f"{archive} has no {name}/train/image_ids.txt: it is not the released metadata")
        lists.replace(result)


def download(url: str, target: Path, sha256: str = "", *, timeout: float = 30.0) -> None:
    """Fetch a file, atomically.

    Args:
        url: https, or a local file as file://.
        target: where it goes.
        sha256: what the file must have; empty: not compared.
        timeout: seconds without an answer.

    Raises:
        CalmError: another kind of address, no network, an error of the server, more than 2 GiB, another checksum.
    """
    scheme = urlsplit(url).scheme
    if scheme not in ("https", "file"):
        raise CalmError(f"--metadata_url {url}: only https:// (or file://) addresses are fetched")
    try:
        with atomic_path(target) as temporary:
            with urllib.request.urlopen(url, timeout=timeout) as answer, temporary.open("wb") as file:
                if urlsplit(answer.url).scheme != scheme:
                    raise CalmError(f"{url} leads to {answer.url}, which is not {scheme}")
                length = int(answer.headers.get("Content-Length") or 0)
                if length > LARGEST:
                    raise CalmError(f"{url} has {length:,} bytes: more than metadata has")
                while part := answer.read(1 << 20):
                    file.write(part)
                    if file.tell() > LARGEST:
                        raise CalmError(f"{url} has more than {LARGEST:,} bytes: more than metadata has")
            if length and temporary.stat().st_size != length:
                raise CalmError(f"{url}: the download was cut short: try again")
            if sha256 and (wrong := check_digest(temporary, "sha256", sha256)):
                raise CalmError(f"{url}: {wrong}")
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise CalmError(
            f"cannot fetch {url} ({error}): without a network, download it elsewhere and put it into --from"
        ) from error
