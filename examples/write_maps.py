"""Write a model's maps as files for other evaluators: OUT/IMAGE_ID.npy, 224x224 float32 in [0, 1], of the true class.

Run it: python examples/write_maps.py runs/birds birds maps [--method gradcam]
Read by `calm evaluate localization --maps`, which gives the figures of the model itself under `--norm minmax
--thresholds even`, and by evaluators of weakly-supervised localization that take one array per image.
"""

import argparse
from pathlib import Path

import numpy as np

import calm
from calm.data import load_split, match_classes


def write_maps(run: str, data: str, out: Path, method: str, batch_size: int = 32) -> None:
    """Write one file for each test image; the model's own maps need one forward pass."""
    model = calm.load(run).eval()
    split = load_split(data, "test")
    records, classes = split.records, match_classes(model.class_names, split.class_names, model=run, data=data)
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        images = model.preprocess([record.path for record in batch])
        maps = calm.attribute(model, images, [classes[record.label] for record in batch], method, size=(224, 224))
        for record, values in zip(batch, calm.normalize(maps, "minmax"), strict=True):
            file = out / f"{record.id}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, values.cpu().numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of calm train, or a saved model")
    parser.add_argument("data", help="folder of the data set")
    parser.add_argument("out", type=Path, help="folder for the maps")
    parser.add_argument("--method", default="joint", help="any of calm.baselines.METHODS (default: %(default)s)")
    write_maps(**vars(parser.parse_args()))
