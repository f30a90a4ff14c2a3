"""``calm evaluate``: benchmarks of trained models, as tables with intervals.

The flags of ``calm evaluate``. Without PyTorch, so that the help page need not wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from calm.cli.parsing import Parser
from calm.config import REPLICATES, Explain, Fill, Order
from calm.data.loading import LAYOUTS
from calm.evaluate.registry import BENCHMARKS

if TYPE_CHECKING:
    from calm.evaluate.result import Result

__all__ = ["flags", "main"]

_EXAMPLES = """examples:
  calm evaluate cue-localization --model runs/calm runs/cam --data birds
  calm evaluate cue-localization --model runs/calm --data birds --method joint posterior gradcam
  calm evaluate all --model runs/calm --data CUB_200_2011 --out tables
  calm evaluate remove-and-classify --model runs/calm --data birds --fill blur --fractions 0.05 0.1 0.2
  calm evaluate localization --maps my-maps --data birds
  torchrun --nproc_per_node 2 -m calm.cli evaluate all --model runs/calm --data birds   # two processes
"""


def flags() -> Parser:
    """The command's parser."""
    listed = "\n".join(f"  {name:<20} {row.line}" for name, row in BENCHMARKS.items())
    apart = " and ".join(name for name, row in BENCHMARKS.items() if not row.in_all)
    parser = Parser(
        prog="calm evaluate",
        description="Benchmark models and their explanations. Prints a table, and writes table.json, table.csv,"
        " table.md and a file for each result; a result that is there already is not computed again.\n\n"
        f"benchmarks:\n{listed}\n  {'all':<20} those that the data set has annotation for, without {apart},"
        f"\n{'':<23}which take many passes of each image",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", help="one of the above")
    add("--model", nargs="+", action="extend", default=[], help="run folders, saved models or hub ids")
    add(
        "--maps",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        help="localization: folders of .npy maps of any method, 224x224, in [0, 1], named by image id",
    )
    add("--data", type=Path, required=True, help="folder of the data set")
    add(
        "--method",
        "--map_kind",
        nargs="+",
        action="extend",
        help="map kinds of the models and other attribution methods; by default each model's main maps. A map kind"
        " is asked of those models that have it",
    )
    add("--split", default="test", help="train, val or test (default: test)")
    add("--layout", default="auto", help=f"{', '.join(LAYOUTS)}, or auto to look (default: auto)")
    add("--metadata_root", type=Path, help="folder of the metadata lists, where they are not with the images")
    add(
        "--norm",
        choices=("max", "minmax", "clipping"),
        help="of the maps; by default clipping for CALM's own",
    )
    add("--thresholds", choices=("even", "log"), help="by default log for CALM's own maps, even for others")
    add("--steps", type=int, help="of integrated-gradients (default: 50)")
    add("--samples", type=int, help="of smoothgrad and its kin (default: 50)")
    add("--fill", choices=get_args(Fill), help=f"what erased pixels become (default: zero){_of('fill')}")
    add(
        "--fractions",
        nargs="+",
        type=float,
        help=f"shares of erased pixels, ascending (default: 0.1 0.3 0.5 0.7 0.9){_of('fractions')}",
    )
    add(
        "--explain",
        choices=get_args(Explain),
        help=f"whose map ranks the pixels (default: label){_of('explain')}",
    )
    add("--points", type=int, help=f"steps from no pixel to all (default: 20){_of('points')}")
    add("--images", type=int, help=f"how many, spread over the split (default: 200){_of('images')}")
    add(
        "--order",
        choices=get_args(Order),
        help=f"one stage after another, from the head down, or all at once (default: cascading){_of('order')}",
    )
    add(
        "--out",
        type=Path,
        help="keeps all results (`calm report` shows them) and the tables of the last call; default: RUN/evaluation for"
        " one model folder, else ./evaluation",
    )
    add("--batch_size", type=int, default=32, help="images of one forward pass (default: 32)")
    add("--workers", type=int, default=0, help="processes that read images (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    add("--replicates", type=int, default=REPLICATES, help=f"bootstrap samples (default: {REPLICATES})")
    add("--seed", type=int, default=0, help="of bootstrap and random masks (default: 0)")
    return parser


def _of(option: str) -> str:
    """For the end of a flag's help: which benchmarks read it."""
    return f"; {' and '.join(name for name, row in BENCHMARKS.items() if option in row.options)}"


def main(words: Sequence[str]) -> list[Result]:
    """`calm evaluate`: `calm.evaluate.command.evaluate`, or its help."""
    asked = flags().parse_args(["--help"] if {"-h", "--help"} & set(words) else list(words))
    from calm.evaluate.command import evaluate  # here, so that a help page need not wait for PyTorch

    return evaluate(asked)
