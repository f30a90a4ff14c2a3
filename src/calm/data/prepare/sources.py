"""The published archives: how they are called, their checksums, and where they are to be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from calm.data.prepare.archives import check_digest, is_archive
from calm.data.prepare.staging import Prepared
from calm.errors import CalmError

__all__ = ["PUBLISHED", "Published", "find", "list_archives"]


@dataclass(frozen=True)
class Published:
    """An archive.

    Attributes:
        patterns: its file names, in lower case, with ``*``.
        where: where to get it.
        md5: published checksum; empty if none is.
        size: published size in bytes; 0 if none is.
        url: of the archive itself, for what `calm data prepare` fetches when it is asked to.
    """

    patterns: tuple[str, ...]
    where: str
    md5: str = ""
    size: int = 0
    url: str = ""


PUBLISHED: dict[str, Published] = {
    "cub": Published(
        ("cub_200_2011.*",),
        "https://data.caltech.edu/records/65de6-vp158 (CUB_200_2011.tgz)",
        "97eceeb196236b17998738112f37df78",
    ),
    "cub-segmentations": Published(
        ("segmentations.*",),
        "https://data.caltech.edu/records/w9d68-gec53 (segmentations.tgz)",
        "4d47ba1228eae64f2fa547c47bc65255",
        39272883,
    ),
    "cubv2": Published(("cubv2.*",), "https://github.com/clovaai/wsolevaluation (CUBV2)"),
    "ilsvrc-train": Published(
        ("ilsvrc2012_img_train.tar",), "https://image-net.org (account)", "1d675b47d978889d74fa0da5fadfb00e"
    ),
    "ilsvrc-val": Published(
        ("ilsvrc2012_img_val.tar",), "https://image-net.org (account)", "29b22e2961454d5413ddabcf34fc5622"
    ),
    "imagenetv2": Published(
        ("imagenetv2*", "imagenet-v2*", "val2.*"),
        "https://github.com/modestyachts/ImageNetV2 (imagenetv2-threshold0.7.tar.gz)",
    ),
    "openimages": Published(
        ("*openimages*", "train.*", "val.*", "test.*"),
        "https://github.com/clovaai/wsolevaluation (OpenImages30k)",
    ),
    "tiny-imagenet": Published(
        ("tiny-imagenet-200.*",),
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
        248100043,
    ),
    "metadata": Published(
        ("*metadata*", "wsolevaluation*"),
        "https://github.com/clovaai/wsolevaluation (folder metadata)",
        url="https://github.com/clovaai/wsolevaluation/archive/e9972606b18064ea886f098f2b5b29b9ade75f09.zip",
    ),
}


def list_archives(sources: Sequence[Path]) -> list[Path]:
    """The archives among files and directly in folders.

    Raises:
        CalmError: a path that does not exist; no archive at all.
    """
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise CalmError(f"--from {source} does not exist")
        found += sorted(filter(is_archive, source.iterdir())) if source.is_dir() else [source]
    if not found:
        raise CalmError(f"no archive (.tar, .tgz, .tar.gz, .zip) in --from {' '.join(map(str, sources))}")
    return found


def find(key: str, archives: Sequence[Path], prepared: Prepared) -> list[Path]:
    """The archives that are ``PUBLISHED[key]``, their size and checksum compared.

    Raises:
        CalmError: size or checksum is wrong, and the preparation is not partial.
    """
    published = PUBLISHED[key]
    found = [
        path for path in archives if any(fnmatch(path.name.lower(), name) for name in published.patterns)
    ]
    if key == "openimages":
        found = [path for path in found if "metadata" not in path.name.lower()]
    for path in found:
        size = path.stat().st_size
        if published.size and size != published.size:
            prepared.complain(
                f"{path} has {size:,} bytes, the published one {published.size:,}: get it from {published.where}"
            )
        elif published.md5 and (wrong := check_digest(path, "md5", published.md5)):
            prepared.complain(f"{wrong}: get it from {published.where}")
    return found
