"""Logistic regression on the averaged features of a frozen backbone (a linear probe), beside the head of the same run.

For each run of `calm train --model.freeze true`: its features, every view of the training images, averaged over the
grid and standardised, and scikit-learn's logistic regression, whose C has the least negative log-likelihood on the
validation split. Features are taken from the run's model.feature_dir, or computed again. Prints a Markdown table; nll
in nats, the others in percent.

Run: python benchmarks/linear_probe.py RUN ... [--C 0.001 0.01 0.1 1 10]
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import measure
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import calm
from calm.data.check import load_checked
from calm.files import read_json
from calm.metrics.classification import Classification
from calm.train.config import TrainConfig
from calm.train.data import build_datasets
from calm.train.features import FeatureDataset, cache_features, remove_features
from calm.train.settings import load_config

Averaged = dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Of each split: features (images, D), of the training images those of one view after another; class indices."""


def averaged(run: Path, config: TrainConfig) -> Averaged:
    """The features of a run's images, averaged over the grid."""
    names = ("layout", "metadata_root", "val_fraction", "present_classes_only", "skip_bad", "channels", "bits")
    splits, _ = load_checked(config.data, **{name: getattr(config.reading, name) for name in names})
    model = calm.load(run)
    half = config.hardware.precision == "bf16-mixed"
    cached = cache_features(
        model,
        build_datasets(config, splits, model.preprocessing),
        config,
        run,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext(),
        progress=lambda done, total: None,
        log=lambda line: None,
    )

    def of_split(data: FeatureDataset) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        views = [[image.mean(axis=(0, 1), dtype=np.float32) for image in view] for view in data.features]
        labels = np.array([record.label for record in data.split.records])
        return np.concatenate(views), np.tile(labels, len(views))

    found = {name: of_split(data) for name, data in cached.items()}
    if config.model.feature_dir is None:
        remove_features(run)
    return found


def scores(probs: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float, float]:
    """Accuracy, negative log-likelihood and calibration error of (images, C) probabilities."""
    metric = Classification(replicates=0)
    metric.update(torch.from_numpy(probs).float(), torch.from_numpy(labels), torch.arange(len(labels)))
    found = metric.compute()
    return found.top1.value, found.nll.value, found.ece.value


def row(run: Path, strengths: list[float]) -> list[object]:
    """The table's row of a run."""
    config = load_config(run / "config.yaml")
    if not config.model.caches:
        raise calm.CalmError(f"{run} trained its backbone, too: give runs of model.freeze true")
    features = averaged(run, config)
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*features["train"])
        for strength in strengths
    ]
    found = [
        [scores(probe.predict_proba(features[name][0]), features[name][1]) for name in ("val", "test")]
        for probe in probes
    ]
    best = min(range(len(probes)), key=lambda index: found[index][0][1])
    last = read_json(run / "result.json", "result")["last"]["test"]
    of_head = (last["accuracy"], last["nll"], last["ece"])
    figures = [f"{100 * top1:.1f} | {nll:.2f} | {100 * ece:.1f}" for top1, nll, ece in (found[best][1], of_head)]
    return [run.name, f"{strengths[best]:g}", *" | ".join(figures).split(" | "), config.method]


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--C", nargs="+", type=float, default=[0.001, 0.01, 0.1, 1.0, 10.0])
    words = parser.parse_args()
    header = ["run", "C", "accuracy", "nll", "calibration", "its head: accuracy", "nll", "calibration", "method"]
    print(measure.table(header, [row(run, words.C) for run in words.runs]))


if __name__ == "__main__":
    main()
