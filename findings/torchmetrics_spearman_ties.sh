#!/bin/sh
# torchmetrics 1.9.0 (torch 2.13.0): Spearman's rank correlation of data with many equal values.
#
# Tied values get the mean of their ranks, and the ranks of a group of ties are summed in 32-bit integers. Once a
# group has more than 65,535 members the sum wraps around, and the correlation is wrong without a warning, also for
# float64 input. Attribution maps meet it: a sparse 384x384 map has more zeros than that. With 60,000 ties the result
# is scipy's.
#
# Seen: "60000 ties: torchmetrics and scipy agree", "73728 ties: torchmetrics 0.11, scipy 0.19".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "torchmetrics==1.9.0" "numpy==2.2.6" "scipy==1.16.3" "setuptools==80.9.0"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from scipy.stats import spearmanr
from torchmetrics.functional import spearman_corrcoef

generator = torch.Generator().manual_seed(0)
first = torch.rand(384 * 384, generator=generator, dtype=torch.float64)
second = first + torch.rand(384 * 384, generator=generator, dtype=torch.float64)
wrong = {}
for ties in (60_000, 384 * 384 // 2):
    sparse = first.clone()
    sparse[:ties] = 0
    here, reference = spearman_corrcoef(sparse, second).item(), spearmanr(sparse.numpy(), second.numpy())[0]
    wrong[ties] = abs(here - reference) > 0.01
    verdict = f"torchmetrics {here:.2f}, scipy {reference:.2f}" if wrong[ties] else "torchmetrics and scipy agree"
    print(f"{ties} ties: {verdict}")
sys.exit(list(wrong.values()) != [False, True])
PYTHON
