"""Draw docs/birds.png, the picture of the README, from a finished demo: python docs/birds_picture.py demo"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import calm
from calm.data import load_split
from calm.data.cues import group_mask
from calm.evaluate.cue_localization import read_cue_data
from calm.render import Tile, draw_contour, draw_peak, overlay, panel, resize_picture

CELL = 192


def main(demo: Path) -> None:
    """One row for each of some pairs of species that differ in one part: the first test image of the pair that both
    models classify rightly and that shows the part."""
    root, split = demo / "birds", load_split(demo / "birds", "test")
    ours, cam = (calm.load(demo / "runs" / method) for method in ("calm-em", "cam"))
    cues, rows = read_cue_data(split, root, (1,)), []
    images = ours.preprocess([record.path for record in split.records])
    labels = torch.tensor([record.label for record in split.records])
    right = (ours(images).probs.argmax(1) == labels) & (cam(images).probs.argmax(1) == labels)
    for number, pair in enumerate(cues.pairs[:4]):
        index, part = next(
            (i, part)
            for i, numbers in cues.samples.items()
            if number in numbers and right[i]
            for part in group_mask(cues.regions(split.records, torch.tensor([i])), pair.groups)
            if part.any()
        )
        one, label = images[index : index + 1], labels[index : index + 1]
        other = torch.tensor([pair.second if pair.first == int(label) else pair.first])
        picture = resize_picture(np.array(Image.open(split.records[index].path).convert("RGB")), (CELL, CELL))
        output = ours(one)
        joint, prior = output.attribute(label)[0], output.prior[0]
        why = ours.difference(one, label, other, size=joint.shape[-2:])[0]
        score = cam(one).attribute(label)[0]
        outlined = draw_contour(draw_peak(overlay(picture, why), why), part.float(), 0.5)
        name, rival = (ours.class_names[int(c)].split(".")[-1].replace("_", " ") for c in (label, other))
        rows.append(
            [
                Tile(picture, name),
                Tile(draw_peak(overlay(picture, joint), joint), f"sums to {joint.sum():.3f}"),
                Tile(draw_peak(overlay(picture, prior), prior)),
                Tile(
                    draw_peak(overlay(picture, score, how="minmax"), score),
                    f"p = {cam(one).probs[0, label].item():.3f}",
                ),
                Tile(outlined, f"not {rival}"),
            ]
        )
    columns = ["image", "CALM: p(y, z | x)", "CALM: prior p(z | x)", "CAM", "CALM: why, and not ..."]
    Image.fromarray(panel(rows, columns=columns, cell=CELL)).save(Path(__file__).parent / "birds.png", optimize=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
