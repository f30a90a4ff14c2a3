"""Two processes take the same steps as one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from train_cases import start, tiny_config, tiny_net, weights_of, write_squares

from calm.train import train


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    data = write_squares(
        tmp_path / "data", train=13, other=3
    )  # 39 and 9 images: neither divides by two processes
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(data=str(data), run_dir=str(two), kind="processes")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch 1/3") == 1
    train(tiny_config(data, one), backbone=tiny_net(stateful=False), quiet=True)
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=name)
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    for measure in ("accuracy", "nll", "ece"):
        for split in ("val", "test"):
            a, b = (result["last"][split][measure] for result in results)
            assert a == pytest.approx(b, rel=1e-4), (split, measure)
    rows = [list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (one, two)]
    for name in ("train_loss", "train_accuracy", "train_nll", "prior_entropy", "val_nll"):
        assert float(rows[0][-1][name]) == pytest.approx(float(rows[1][-1][name]), rel=1e-4), name
