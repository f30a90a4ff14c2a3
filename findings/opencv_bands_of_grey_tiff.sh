#!/bin/sh
# OpenCV 4.12.0.88 and 5.0.0.93, cv2.imread(path, cv2.IMREAD_UNCHANGED) of a TIFF with four bands, as satellites
# deliver (red, green, blue, near infrared), written with the photometric tag "black is zero", which writers choose
# for bands that are no colours.
#
# "Unchanged" keeps all channels where the tag says RGB. With "black is zero" the result is a grey picture (8, 9),
# without an error or a warning: the first band alone with 8 bits, a sum of bands as colours are turned into grey with
# 16 bits. Five bands are refused (None).
#
# Seen, with both: "rgb: (8, 9, 4)", "black is zero, 8 bits: (8, 9), first band True",
# "16 bits: (8, 9), first band False",
#                  "five bands: None".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0
for version in 4.12.0.88 5.0.0.93; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check \
        "opencv-python-headless==$version" "numpy==2.2.6" "tifffile==2025.5.10"
    OPENCV_LOG_LEVEL=SILENT "$folder/$version/bin/python" - "$folder" <<'PYTHON' || status=1
import sys
from pathlib import Path

import cv2
import numpy as np
import tifffile

path = str(Path(sys.argv[1]) / "bands.tif")


def read(bands: int, photometric: str, dtype: type) -> tuple[object, bool]:
    pixels = np.arange(8 * 9 * bands).reshape(8, 9, bands).astype(dtype)
    tifffile.imwrite(path, pixels, planarconfig="contig", photometric=photometric)
    found = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if found is None:
        return None, False
    return found.shape, found.shape == (8, 9) and bool((found == pixels[..., 0]).all())


colour, byte = read(4, "rgb", np.uint8), read(4, "minisblack", np.uint8)
word, five = read(4, "minisblack", np.uint16), read(5, "minisblack", np.uint8)
print(f"OpenCV {cv2.__version__}: rgb: {colour[0]}")
print(f"black is zero, 8 bits: {byte[0]}, first band {byte[1]}; 16 bits: {word[0]}, first band {word[1]}")
print(f"five bands: {five[0]}")
sys.exit((colour[0], byte, word, five[0]) != ((8, 9, 4), ((8, 9), True), ((8, 9), False), None))
PYTHON
done
exit $status
