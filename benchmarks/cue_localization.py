"""Cue localization of this package against the plain loop over pairs. Prints a Markdown table.

    python benchmarks/cue_localization.py [--backbone small_resnet] [--size 96] [--pairs ALL] [--device cpu]

The loop does what the protocol says, pair by pair, and what released evaluators do: it reads the lists and the pair's
images, draws their part regions, takes one forward pass for each of the two classes, and resizes, normalises and
counts one map after the other. With ``--pairs`` it takes so many, evenly spread, and its time is scaled up to the maps
of all. Figures are compared pair by pair. The last row has as many classes and pairs as CUB. Where the target is not
met, a profile follows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from cub_size import SPECIES, cub_pairs
from measure import clock, hottest, table, verdict

import calm
from calm.data import load_split
from calm.data.cues import group_mask, part_regions, read_part_points, read_segmentation
from calm.evaluate.cue_localization import cue_localization, read_cue_data
from calm.evaluate.subject import model_subject
from calm.heatmaps import normalize, resize_maps
from calm.metrics.pixels import thresholds
from calm_birds import write_birds

TARGET = 20
SETTINGS = [
    (24, 4, (1, 2, 3)),
    (14, 8, range(1, 8)),
    (24, 4, range(1, 8)),
    (128, 2, (1, 2, 3)),
    (SPECIES, 2, (1, 2, 3)),
]
"""Species, test images of each, and the numbers of differing part groups that make a pair."""


def loop(model: calm.CalmModel, root: Path, pairs: list, batch_size: int) -> tuple[list[float], int]:
    """PxAP of the pairs, and how many maps that took."""
    edges = np.append(thresholds("even").numpy(), [1, np.inf])
    figures, maps = [], 0
    for pair in pairs:
        split = load_split(root, "test")
        records = [record for record in split.records if record.label in (pair.first, pair.second)]
        points = read_part_points(root).select(record.id for record in records)
        visible = points.visible_groups()[:, list(pair.groups)].any(dim=1)
        shown = visible.nonzero().flatten().tolist()
        counts = np.zeros((2, len(edges) - 1))
        for start in range(0, len(shown), batch_size):
            some = shown[start : start + batch_size]
            images = model.preprocess([records[place].path for place in some]).to(model.device)
            with torch.no_grad():
                one, other = (
                    model(images).attribute(torch.full((len(some),), label)) for label in (pair.first, pair.second)
                )
            for place, row in zip(some, (one - other).abs(), strict=True):
                regions = part_regions(
                    points.select([records[place].id]),
                    torch.tensor([records[place].size]),
                    inside=read_segmentation(records[place].masks[0])[None],
                )[0]
                truth = group_mask(regions, pair.groups).numpy()
                scores = normalize(resize_maps(row[None], (224, 224)), "minmax")[0].double().cpu().numpy()
                counts[0] += np.histogram(scores[~truth], edges)[0]
                counts[1] += np.histogram(scores[truth], edges)[0]
        maps += len(shown)
        reached = counts[:, ::-1].cumsum(axis=1)
        recall = reached[1] / max(reached[1, -1], 1)
        precision = reached[1] / np.maximum(reached.sum(axis=0), 1)
        area = float((precision * np.diff(recall, prepend=0)).sum())
        figures.append(area if reached[1, -1] else float("nan"))
    return figures, maps


def compare(flags: argparse.Namespace, species: int, images: int, groups: object) -> tuple[list[object], str]:
    """A row of the table, and what takes our time if the target is not met."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "birds"
        write_birds(root, species=species, images_per_species=2 * images, test_fraction=0.5, size=96)
        torch.manual_seed(0)
        size = calm.Preprocessing(size=(flags.size, flags.size))
        split, counts = load_split(root, "test"), tuple(groups)
        known = {"class_names": split.class_names, "preprocessing": size}
        model = calm.create_model(flags.backbone, species, "cam", **known).to(flags.device).eval()
        subject = model_subject(model)
        warm = model.preprocess([record.path for record in split.records[: flags.batch_size]])
        with torch.no_grad():
            model(warm.to(flags.device))

        began = clock()
        data = read_cue_data(split, root, counts)
        if species == SPECIES:
            data = cub_pairs(data)
        result = cue_localization(subject, split, data, batch_size=flags.batch_size)
        ours = clock() - began

        pairs = data.pairs
        count = min(flags.pairs or len(pairs), len(pairs))
        chosen = np.unique(np.linspace(0, len(pairs) - 1, count).astype(int)).tolist()
        began = clock()
        figures, maps = loop(model, root, [pairs[number] for number in chosen], flags.batch_size)
        every = result.details["samples"]
        theirs = (clock() - began) * every / maps
        judged = verdict(theirs / ours, TARGET, least=True)
        missed = judged != "met"
        profile = hottest(lambda: cue_localization(subject, split, data, batch_size=flags.batch_size)) if missed else ""

    own = [result.details["pairs"][number]["pxap"] for number in chosen]
    apart = float(np.nanmax(np.abs(np.array(own) - figures)))
    passes = 2 * every / result.details["images"]
    row = [
        f"{species} species, {len(pairs)} pairs",
        result.details["images"],
        every,
        f"{passes:.1f}",
        f"{theirs:.1f}" + ("" if len(chosen) == len(pairs) else f" (from {len(chosen)} pairs)"),
        f"{ours:.2f}",
        f"{theirs / ours:.1f}",
        judged,
        f"{100 * apart:.4f}",
    ]
    return row, profile


def main() -> None:
    """Draw birds, time both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="small_resnet")
    parser.add_argument("--size", type=int, default=96, help="of the network's input, in pixels")
    parser.add_argument("--pairs", type=int, help="the most that the loop does; all, unless given")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    header = [
        "birds",
        "images",
        "maps",
        "passes of the loop for one of ours",
        "loop over pairs, s",
        "calm, s",
        "times faster",
        f"target {TARGET}",
        "largest difference of a pair's PxAP, points",
    ]
    print(f"{flags.backbone}, {flags.size} pixels, batches of {flags.batch_size}, {flags.device}\n")
    rows, profiles = zip(*(compare(flags, *setting) for setting in SETTINGS), strict=True)
    print(table(header, rows))
    for row, profile in zip(rows, profiles, strict=True):
        if profile:
            print(f"\nWhat takes our time with {row[0]}:\n\n{profile}")


if __name__ == "__main__":
    main()
