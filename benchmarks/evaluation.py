"""Each benchmark of `calm evaluate` on birds of CUB's size: seconds and peak memory. Prints a Markdown table.

    python benchmarks/evaluation.py [--full] [--of_each 4 8] [--backbone narrow_resnet] [--size 64]

The data set has CUB's 200 species and 191 pairs of them that differ in one to three part groups, and with ``--full``
its 5,794 test images in place of the largest number; else 4 and 8 of each species. Every row is two processes: one is
timed, of the other, which gives freed memory back at once, the peak is taken. (What the C library keeps of freed memory
varies by 100 MiB between runs of the same images.) What grows with the images is the slope between the smallest and the
largest number of them; flat is less than 10 MiB for 1,000.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from cub_size import IMAGES, SPECIES, cub_pairs
from measure import clock, peak_and_result, peak_memory, table, verdict

import calm
from calm.data import load_split
from calm.evaluate.cue_localization import cue_localization, read_cue_data
from calm.evaluate.runner import Data, run
from calm.evaluate.subject import model_subject
from calm_birds import write_birds

OF_EACH = -(-IMAGES // SPECIES)
"""Most test images of a species in the full size."""
SLOPE = 10
"""Target: MiB for 1,000 more images."""
BENCHMARKS = ("classification", "cue-localization", "localization", "remove-and-classify")


def one(name: str, model: Path, root: Path, of_each: int, batch_size: int) -> dict[str, float]:
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
        with tempfile.TemporaryDirectory() as out:
            result = run(name, subject, Data.of(split, root), Path(out), batch_size=batch_size)
    return {
        "images": len(split.records),
        "maps": result.details.get("samples", len(split.records)),
        "seconds": clock() - began,
    }


def main() -> None:
    """Draw birds, run every benchmark in every size, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the largest number is 5,794 images")
    parser.add_argument("--of_each", type=int, nargs="+", default=[4, 8], help="test images of each species")
    parser.add_argument("--backbone", default="narrow_resnet")
    parser.add_argument("--size", type=int, default=64, help="of the images and of the network's input, in pixels")
    parser.add_argument("--batch_size", type=int, default=32)
    flags = parser.parse_args()
    sizes = [*flags.of_each[: -1 if flags.full else None], *([OF_EACH] if flags.full else [])]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder) / "birds", Path(folder) / "model"
        drawn = round(max(sizes) * 10 / 9) + 1
        write_birds(root, species=SPECIES, images_per_species=drawn, test_fraction=0.9, size=flags.size)
        torch.manual_seed(0)
        size = calm.Preprocessing(size=(flags.size, flags.size))
        known = {"class_names": load_split(root, "test").class_names, "preprocessing": size}
        calm.create_model(flags.backbone, SPECIES, "calm-em", **known).save_pretrained(model)
        for name in BENCHMARKS:
            found = []
            for of_each in sizes:
                words = (name, model, root, of_each, flags.batch_size)
                found.append(peak_and_result(one, *words)[1] | {"peak": peak_memory(one, *words)})
                print(name, found[-1], file=sys.stderr, flush=True)
            more = found[-1]["peak"] - found[0]["peak"]
            slope = 1000 * more / max(found[-1]["images"] - found[0]["images"], 1)
            flat = verdict(slope, SLOPE)
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
    print(f"CALM-EM {flags.backbone}, {flags.size} pixels, batches of {flags.batch_size}\n")
    header = ["benchmark", "images", "maps", "s", "ms/image", "peak MiB", "MiB more for 1,000 images", "flat"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
