"""``calm data prepare``: from published archives to a data set that every command reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from calm.cli.parsing import Parser
from calm.data.prepare import DATA_SETS, Prepared, prepare

__all__ = ["main"]

EXAMPLES = """examples:
  calm data prepare cub --from downloads --out .
  calm data prepare tiny-imagenet --from tiny-imagenet-200.zip --out tiny --classes n01443537,n01629819
  calm data prepare ilsvrc --from downloads metadata.zip --out .
  calm data prepare openimages30k --from downloads --out . --metadata_url published"""


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
