#!/bin/sh
# OpenCV 4.12.0.88 and 5.0.0.93 (opencv-python-headless): cv2.line of thickness 1 with fractional bits.
#
# End points may carry fractional bits (shift=4: sixteenths of a pixel), and the documentation promises sub-pixel
# positions. With the same end points the two versions paint different pixels: of 400 lines drawn one by one on a
# 64x64 canvas, many differ. Without fractional bits (shift=0) all 400 are equal. So procedurally drawn data sets and
# masks depend on OpenCV's version, although no option and no warning says so.
#
# Seen: "fractional: 400 lines, N differ" with N above 100, "whole: 400 lines, 0 differ".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/draw.py" <<'PYTHON'
import sys

import cv2
import numpy as np

draw = np.random.default_rng(0)
pictures = []
for shift in (4, 0):
    for _ in range(400):
        first, second = (tuple(int(v) for v in draw.integers(4 << shift, 60 << shift, 2)) for _ in range(2))
        canvas = np.zeros((64, 64), np.uint8)
        cv2.line(canvas, first, second, 255, thickness=1, lineType=cv2.LINE_8, shift=shift)
        pictures.append(canvas)
np.save(sys.argv[1], np.stack(pictures))
PYTHON
for version in 4.12.0.88 5.0.0.93; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check \
        "opencv-python-headless==$version" "numpy==2.2.6"
    "$folder/$version/bin/python" "$folder/draw.py" "$folder/$version.npy"
done
"$folder/4.12.0.88/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np

old, new = (np.load(f"{sys.argv[1]}/{version}.npy") for version in ("4.12.0.88", "5.0.0.93"))
differ = (old != new).any(axis=(1, 2))
fractional, whole = int(differ[:400].sum()), int(differ[400:].sum())
print(f"fractional: 400 lines, {fractional} differ")
print(f"whole: 400 lines, {whole} differ")
sys.exit(not (fractional > 100 and whole == 0))
PYTHON
