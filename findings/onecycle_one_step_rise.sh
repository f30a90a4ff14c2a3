#!/bin/sh
# PyTorch 2.13.0: torch.optim.lr_scheduler.OneCycleLR whose rising phase is one step long.
#
# The phase ends at step pct_start * total_steps - 1. Where that is 0, as with 10 steps and pct_start=0.1 or 5 steps and
# 0.2, the constructor divides by the length of the phase and raises ZeroDivisionError, which names no argument. Every
# argument is in its documented range; a rise of two steps (10 steps, 0.2) works. Short runs and tests of a training
# recipe meet it, the full recipe does not.
#
# Seen: "10 steps, pct_start 0.1: ZeroDivisionError", "5 steps, pct_start 0.2: ZeroDivisionError",
#       "10 steps, pct_start 0.2: no error".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.2.6"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

found = []
for steps, share in ((10, 0.1), (5, 0.2), (10, 0.2)):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=share)
        found.append("no error")
    except ZeroDivisionError as error:
        found.append(type(error).__name__)
    print(f"{steps} steps, pct_start {share}: {found[-1]}")
sys.exit(found != ["ZeroDivisionError", "ZeroDivisionError", "no error"])
PYTHON
