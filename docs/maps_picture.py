"""Draw docs/maps.png, the pictures of docs/maps.md, from a finished demo: python docs/maps_picture.py demo"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import calm
from calm.data import load_split
from calm.render import Tile, overlay, panel, resize_picture

CELL = 176
COLUMNS = ["picture", "joint", "posterior, other class", "prior", "evidence, signed"]


def main(demo: Path) -> None:
    """One row each: of the right, sure predictions (p > 0.9) the one whose prior is most spread, of the wrong ones the
    surest, and the first picture as untrained weights see it."""
    split, model = load_split(demo / "birds", "test"), calm.load(demo / "runs" / "calm-em")
    images = model.preprocess([record.path for record in split.records])
    outputs = [model(batch) for batch in images.split(64)]
    probs, priors = (torch.cat([getattr(output, name) for output in outputs]) for name in ("probs", "prior"))
    labels = torch.tensor([record.label for record in split.records])
    chosen = probs[range(len(labels)), labels]
    entropy = -torch.xlogy(priors, priors).sum((1, 2))
    right = int(torch.where(chosen > 0.9, entropy, 0).argmax())
    wrong = int(torch.where(probs.argmax(1) != labels, probs.amax(1), 0).argmax())
    torch.manual_seed(0)
    fresh = calm.create_model("tiny_resnet", len(model.class_names), class_names=model.class_names).eval()
    rows = []
    for network, index in ((model, right), (model, wrong), (fresh, right)):
        output = network(images[index : index + 1])
        first, other = output.probs[0].topk(2).indices.tolist()
        joint, posterior = output.attribute(first)[0], output.attribute(other, "posterior")[0]
        why = network.difference(images[index : index + 1], first, other, "evidence", signed=True, size=output.grid)[0]
        picture = resize_picture(np.array(Image.open(split.records[index].path).convert("RGB")), (CELL, CELL))
        true, name, rival = (
            network.class_names[c].split(".")[-1].replace("_", " ") for c in (labels[index], first, other)
        )
        uniform = 1 / joint.numel()

        def heat(
            values, total, picture=picture, uniform=uniform
        ):  # calm attribute's scale: 4 times uniform, or the peak
            return overlay(picture, values / total, top=max(4 * uniform, float(values.max() / total)))

        peak = output.prior[0].max() / uniform
        rows.append(
            [
                Tile(picture, f"is: {true}"),
                Tile(heat(joint, joint.sum()), f"{name}\nsums to p = {joint.sum():.3f}"),
                Tile(heat(posterior, 1), f"{rival}\nsums to 1; p = {output.probs[0, other]:.3f}"),
                Tile(heat(output.prior[0], 1), f"peak {peak:.1f} times uniform"),
                Tile(
                    overlay(picture, why, colormap="signed"),
                    f"red: {name}\nblue: {rival}\nsums to {why.sum():+.2f} nats",
                ),
            ]
        )
    drawn = panel(rows, columns=COLUMNS, labels=["sure", "wrong", "untrained"], cell=CELL)
    Image.fromarray(drawn).save(Path(__file__).parent / "maps.png", optimize=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
