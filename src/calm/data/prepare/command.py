"""``calm data prepare``: from published archives to a data set that every command reads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from calm.atomic import remove_abandoned
from calm.complaints import Parser
from calm.data.prepare.cub import prepare_cub
from calm.data.prepare.fetch import place_metadata
from calm.data.prepare.large import name_as_listed, prepare_ilsvrc, prepare_openimages
from calm.data.prepare.sources import list_archives
from calm.data.prepare.staging import Prepared
from calm.data.prepare.tiny_imagenet import prepare_tiny_imagenet
from calm.errors import CalmError, unknown

__all__ = ["DATA_SETS", "main", "prepare"]

DATA_SETS = {"cub": "CUB", "ilsvrc": "ILSVRC", "openimages30k": "OpenImages", "tiny-imagenet": ""}
"""Names of the command, and of the released layout's folders."""

EXAMPLES = """examples:
  calm data prepare cub --from downloads --out .
  calm data prepare tiny-imagenet --from tiny-imagenet-200.zip --out tiny --classes n01443537,n01629819
  calm data prepare ilsvrc --from downloads metadata.zip --out .
  calm data prepare openimages30k --from downloads --out . --metadata_url published"""


def prepare(
    name: str,
    archives: Sequence[str | Path],
    out: str | Path,
    *,
    classes: str = "",
    metadata_url: str = "",
    metadata_sha256: str = "",
    partial: bool = False,
) -> Prepared:
    """Check and unpack archives; a run that was stopped is finished by the same call.

    Args:
        name: key of :data:`DATA_SETS`.
        archives: archives, or folders of them.
        out: gets ``dataset/`` and ``metadata/`` as the released code lays them out; for Tiny ImageNet,
            ``images/``, ``metadata/`` and ``classes.txt``.
        classes: of Tiny ImageNet: WordNet ids separated by commas, or a file of them; empty: all 200.
        metadata_url: https address of an archive of the released metadata, or ``published`` for that of the
            published evaluator. Nothing is fetched without it.
        metadata_sha256: its checksum.
        partial: wrong sizes, checksums and counts are notes and no errors.

    Raises:
        CalmError: see the parts; the message says what to get where.
    """
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    if classes and name != "tiny-imagenet":
        raise CalmError(f"--classes is for tiny-imagenet, not {name}")
    if name == "tiny-imagenet" and metadata_url:
        raise CalmError("--metadata_url: tiny-imagenet has its lists in the archive")
    if metadata_sha256 and not metadata_url:
        raise CalmError("--metadata_sha256 needs --metadata_url")
    found, out = list_archives([Path(path) for path in archives]), Path(out)
    for folder in (out.parent, out / "metadata", *_data_folders(out)):
        remove_abandoned(folder)
    if name == "tiny-imagenet":
        prepared = Prepared(name, out, partial=partial)
        prepare_tiny_imagenet(found, out, prepared, classes)
        return prepared
    released = DATA_SETS[name]
    prepared = Prepared(name, out / "dataset" / released, partial=partial)
    work = {"cub": prepare_cub, "ilsvrc": prepare_ilsvrc, "openimages30k": prepare_openimages}[name]
    work(found, out, prepared)
    place_metadata(released, out, found, prepared, metadata_url, metadata_sha256)
    if name == "ilsvrc":
        name_as_listed(out, prepared)
    return prepared


def _data_folders(out: Path) -> Iterator[Path]:
    """``out/dataset`` and the folders in it: where working folders were, had a run been killed."""
    yield out / "dataset"
    yield from (out / "dataset").glob("*/")


def main(words: Sequence[str]) -> Prepared:
    """Run the command line ``NAME --from ARCHIVES --out DIR``."""
    parser = Parser(
        "calm data prepare",
        description="Check and unpack published archives into a data set that every command reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=list(DATA_SETS), help="data set")
    parser.add_argument(
        "--from", dest="archives", nargs="+", required=True, help="archives, or folders of them"
    )
    parser.add_argument("--out", required=True, help="folder that gets dataset/ and metadata/")
    parser.add_argument("--classes", default="", help="tiny-imagenet: WordNet ids, or a file of them")
    parser.add_argument(
        "--metadata_url",
        default="",
        help="fetch the released metadata: https address of its archive, or 'published' for the one on GitHub",
    )
    parser.add_argument("--metadata_sha256", default="", help="its checksum")
    parser.add_argument("--partial", action="store_true", help="wrong checksums and counts are only noted")
    return prepare(**vars(parser.parse_args(words)))
