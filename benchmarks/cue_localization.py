"""Cue localization of this package against the plain loop over pairs: time, memory, and whether the figures agree.

    python benchmarks/cue_localization.py [--species 24] [--images 3] [--backbone resnet50] [--device cpu]

The loop does what the protocol says, pair by pair: reads the annotation and the pair's images, draws their part
regions, one forward pass for each of the two classes, one resizing, and one histogram for each map.
"""

from __future__ import annotations

import argparse
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import calm
from calm.data import load_split
from calm.data.birds import write_birds
from calm.data.cue_files import read_pairs, read_part_points, read_segmentation
from calm.data.cues import group_mask, part_regions
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.subject import model_subject
from calm.metrics.thresholds import thresholds
from calm.normalize import normalize
from calm.resample import resize_maps


def loop(model: calm.CalmModel, root: Path, batch_size: int) -> float:
    """mPxAP, pair by pair."""
    edges = np.append(thresholds("even").numpy(), np.inf)
    figures = []
    for pair in read_pairs(root):
        split = load_split(root, "test")
        points = read_part_points(root)
        records = [record for record in split.records if record.label in (pair.first, pair.second)]
        visible = points.select(r.id for r in records).visible_groups()[:, list(pair.groups)].any(dim=1)
        records = [record for record, seen in zip(records, visible.tolist(), strict=True) if seen]
        counts = np.zeros((2, len(edges) - 1))
        for start in range(0, len(records), batch_size):
            some = records[start : start + batch_size]
            images = model.preprocess([record.path for record in some])
            with torch.no_grad():
                one, other = (
                    model(images).attribute(torch.full((len(some),), label))
                    for label in (pair.first, pair.second)
                )
            for record, row in zip(some, (one - other).abs(), strict=True):
                regions = part_regions(
                    points.select([record.id]),
                    torch.tensor([record.size]),
                    inside=read_segmentation(record.masks[0])[None],
                )[0]
                truth = group_mask(regions, pair.groups).numpy()
                scores = normalize(resize_maps(row[None], (224, 224)), "minmax")[0].double().cpu().numpy()
                counts[0] += np.histogram(scores[~truth], edges)[0]
                counts[1] += np.histogram(scores[truth], edges)[0]
        reached = counts[:, ::-1].cumsum(axis=1)
        if reached[1, -1]:
            recall = reached[1] / reached[1, -1]
            precision = reached[1] / np.maximum(reached.sum(axis=0), 1)
            figures.append(float((precision * np.diff(recall, prepend=0)).sum()))
    return float(np.mean(figures))


def main() -> None:
    """Draw birds, time both, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--species", type=int, default=24)
    parser.add_argument("--images", type=int, default=3, help="per species")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "birds"
        write_birds(root, species=asked.species, images_per_species=asked.images, size=96)
        torch.manual_seed(0)
        model = calm.create_model(asked.backbone, asked.species, "cam").to(asked.device).eval()
        split = load_split(root, "test")
        rows = []
        model(model.preprocess([split.records[0].path]))  # the first pass allocates
        for name in ("calm.evaluate", "loop over pairs"):
            began = time.perf_counter()
            if name == "calm.evaluate":
                subject = model_subject(model)
                result = cue_localization(subject, split, root, batch_size=asked.batch_size)
                figure = result.figures["mpxap"].value
            else:
                figure = loop(model, root, asked.batch_size)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rows.append((name, time.perf_counter() - began, figure, peak))
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, device {asked.device},"
        f" torch {torch.__version__}; {asked.backbone}, {len(result.details['pairs'])} pairs,"
        f" {result.details['images']} images, {result.details['samples']} maps\n"
    )
    print("| way | seconds | times faster | mPxAP % | peak GiB so far |\n| --- | ---: | ---: | ---: | ---: |")
    for name, seconds, figure, peak in rows:
        print(f"| {name} | {seconds:.2f} | {rows[-1][1] / seconds:.1f} | {100 * figure:.4f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
