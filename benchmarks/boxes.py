"""Boxes at 1,000 thresholds: against thresholding a map 1,000 times. Prints a Markdown table.

Run: python benchmarks/boxes.py [--maps N]
"""

from __future__ import annotations

import argparse
import platform
import resource

import cv2
import numpy as np
from measure import clock, verdict

from calm.metrics.boxes import box_ious, threshold_ious

EVEN = np.arange(1000) / 1000
LOG = 10 ** -(np.arange(1000) * 0.007)[::-1]


def straightforward(scores, truth, thresholds):
    """Cut the map at each threshold, look at each contour: as the published evaluator does."""
    grey = (scores * 255).astype(np.uint8)
    height, width = grey.shape
    largest, best = [], []
    for threshold in thresholds:
        picture = cv2.threshold(grey, int(threshold * grey.max()), 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(picture, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        corners = [cv2.boundingRect(contour) for contour in contours]
        boxes = [(x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in corners]
        fits = box_ious(np.array(boxes or [(0, 0, 0, 0)]), truth).max(axis=1)
        chosen = max(range(len(contours)), key=lambda n: cv2.contourArea(contours[n])) if contours else 0
        largest.append(fits[chosen])
        best.append(fits.max())
    return np.array(largest), np.array(best)


def maps(kind, rng):
    """A 224x224 map in [0, 1], as the grids of networks give, and the hardest there is."""
    if kind == "noise":
        return rng.random((224, 224), dtype=np.float32)
    grid = int(kind.split()[0].split("x")[0])
    y, x = np.mgrid[:grid, :grid] / grid
    center = rng.random(2)
    blob = np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / 0.05) + 0.3 * rng.random((grid, grid))
    large = cv2.resize(blob.astype(np.float32), (224, 224), interpolation=cv2.INTER_LINEAR)
    large = (large - large.min()) / (large.max() - large.min())
    return large * 0.3 if "peak 0.3" in kind else large


def seconds(function, cases, thresholds):
    """Least time per map of three passes."""
    times = []
    for _ in range(3):
        start = clock()
        for case in cases:
            function(*case, thresholds)
        times.append((clock() - start) / len(cases))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--maps", type=int, default=5, help="maps of each kind")
    number = parser.parse_args().maps
    cv2.setNumThreads(1)
    truth = np.array([[30, 40, 150, 180], [100, 10, 200, 90]])
    print("| map | thresholds | 1,000 cuts, ms/map | calm, ms/map | times faster | target 5 | equal |")
    print("|---|---|---:|---:|---:|---|---|")
    kinds = ["7x7 grid", "14x14 grid", "28x28 grid", "28x28 grid, peak 0.3", "noise"]
    for kind in kinds:
        for name, thresholds in (("even", EVEN), ("log", LOG)):
            rng = np.random.default_rng(0)
            cases = [(maps(kind, rng), truth) for _ in range(1 if kind == "noise" else number)]
            equal = all(
                np.array_equal(ours, theirs)
                for case in cases
                for ours, theirs in zip(
                    threshold_ious(*case, thresholds), straightforward(*case, thresholds), strict=True
                )
            )
            slow, fast = (seconds(f, cases, thresholds) for f in (straightforward, threshold_ious))
            times = f"{1e3 * slow:.1f} | {1e3 * fast:.2f} | {slow / fast:.1f} | {verdict(slow / fast, 5, least=True)}"
            print(f"| {kind} | {name} | {times} | {'yes' if equal else 'NO'} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPeak memory {peak:.0f} MiB; {platform.machine()}, one thread; OpenCV {cv2.__version__}.")


if __name__ == "__main__":
    main()
