"""Classify a picture and draw where the evidence is, with onnxruntime, NumPy and Pillow alone: no PyTorch, no calm.

Make the file: calm export --model runs/birds --out birds.onnx --preprocess
Run it: python examples/onnx_map.py birds.onnx bird.jpg map.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def explain(model: str, picture: str, out: str, count: int = 3) -> list[tuple[str, float]]:
    """Draw the map of the most probable class over a picture; return the first classes and their probabilities."""
    session = onnxruntime.InferenceSession(model)
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")  # a phone's picture may lie on its side
    every = np.arange(len(names))[None]  # maps of all classes: the program computes them for the prediction anyway
    probs, maps = session.run(["probs", "maps"], {"image": np.asarray(image)[None], "classes": every})
    order = probs[0].argsort()[::-1][:count]
    found = maps[0, order[0]]  # of CALM p(y, z | x), whose sum is probs[0, order[0]]; other kinds have other scales
    shades = 255 * (found - found.min()) / max(np.ptp(found), 1e-12)
    heat = Image.fromarray(shades.astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    Image.composite(Image.new("RGB", image.size, "red"), image, heat.point(lambda value: value * 0.7)).save(out)
    return [(names[index], float(probs[0, index])) for index in order]


if __name__ == "__main__":
    print(*explain(*sys.argv[1:4]), sep="\n")
