"""Each benchmark of `calm evaluate` on birds of CUB's size: seconds and peak memory. Prints a Markdown table.

    python benchmarks/evaluation.py [--full] [--of_each 4 8] [--backbone narrow_resnet] [--size 64]

The data set has CUB's 200 species and 191 pairs of them that differ in one to three part groups, and with ``--full``
its 5,794 test images; else 4 and 8 of each species. Every row is a process of its own, and its memory is the most that
the process held at once, libraries included. What grows with the images is the slope between the smallest and the
largest number of them, and flat is less than 10 MiB for 1,000 images, or less than 60 MiB in all: peaks of cue
localization of 256, 512 and 1,024 images were 1029, 1091 and 1044 MiB, so that 60 more or less tell nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from cub_size import IMAGES, SPECIES, cub_pairs
from measure import clock, table, verdict

import calm
from calm.data import load_split
from calm.data.birds import write_birds
from calm.evaluate.cue_data import read_cue_data
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.runner import Data, run
from calm.evaluate.subject import model_subject

OF_EACH = -(-IMAGES // SPECIES)
"""Most test images of a species in the full size."""
NOISE, SLOPE = 60, 10
"""MiB: what a peak varies by, and the target for 1,000 more images."""
BENCHMARKS = ("classification", "cue-localization", "localization", "remove-and-classify")


def one(name: str, model: Path, root: Path, of_each: int, batch_size: int, out: Path) -> dict[str, float]:
    """Run a benchmark on the first images of each class, as the command does."""
    split = load_split(root, "test")
    of_class = defaultdict(int)
    records = []
    for record in split.records:
        of_class[record.label] += 1
        if of_class[record.label] <= of_each:
            records.append(record)
    split = replace(split, records=tuple(records[:IMAGES]))
    subject = model_subject(calm.load(model))
    began = clock()
    if name == "cue-localization":
        pairs = cub_pairs(read_cue_data(split, root))
        result = cue_localization(subject, split, pairs, batch_size=batch_size)
    else:
        result = run(name, subject, Data.of(split, root), out, batch_size=batch_size)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "images": len(split.records),
        "maps": result.details.get("samples", len(split.records)),
        "seconds": clock() - began,
        "peak": peak / 1024,
    }


def main() -> None:
    """Draw birds, run every benchmark in every size, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="5,794 images too")
    parser.add_argument("--of_each", type=int, nargs="+", default=[4, 8], help="test images of each species")
    parser.add_argument("--backbone", default="narrow_resnet")
    parser.add_argument(
        "--size", type=int, default=64, help="of the images and of the network's input, in pixels"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, model, root, of_each, out = asked.one
        print(json.dumps(one(name, Path(model), Path(root), int(of_each), asked.batch_size, Path(out))))
        return
    sizes = [*asked.of_each, *([OF_EACH] if asked.full else [])]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder) / "birds", Path(folder) / "model"
        drawn = round(max(sizes) * 10 / 9) + 1
        write_birds(root, species=SPECIES, images_per_species=drawn, test_fraction=0.9, size=asked.size)
        torch.manual_seed(0)
        size = calm.Preprocessing(size=(asked.size, asked.size))
        calm.create_model(asked.backbone, SPECIES, "calm-em", preprocessing=size).save_pretrained(model)
        for name in BENCHMARKS:
            found = []
            for of_each in sizes:
                words = ["--one", name, model, root, of_each, Path(folder) / f"{name}-{of_each}"]
                command = [sys.executable, __file__, "--batch_size", asked.batch_size, *words]
                done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout))
                print(name, found[-1], file=sys.stderr, flush=True)
            more = found[-1]["peak"] - found[0]["peak"]
            slope = 1000 * more / max(found[-1]["images"] - found[0]["images"], 1)
            flat = verdict(min(more / NOISE, slope / SLOPE), 1)
            for place, got in enumerate(found):
                rows.append(
                    [
                        name if not place else "",
                        got["images"],
                        got["maps"],
                        f"{got['seconds']:.1f}",
                        f"{1000 * got['seconds'] / got['images']:.1f}",
                        f"{got['peak']:.0f}",
                        "" if place else f"{slope:+.1f}",
                        "" if place else flat,
                    ]
                )
    print(f"CALM-EM {asked.backbone}, {asked.size} pixels, batches of {asked.batch_size}\n")
    header = ["benchmark", "images", "maps", "s", "ms/image", "peak MiB", "MiB more for 1,000 images", "flat"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
