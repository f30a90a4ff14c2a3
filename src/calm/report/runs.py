"""What a run of `calm train` left behind, read for a report."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.documents import read_json, read_yaml
from calm.errors import CalmError

__all__ = ["Run", "read_run"]

LABELS = {"calm-em": "CALM-EM", "calm-ml": "CALM-ML", "cam": "CAM"}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        config: every setting, as in config.yaml.
        result: as in result.json: ``best`` and ``last`` with ``val`` and ``test`` figures; images per second; seconds.
        history: metrics.csv by column; one value per epoch.
        versions: as in versions.json.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    history: dict[str, list[float]]
    versions: dict[str, Any]

    @property
    def label(self) -> str:
        """The method's name in a report."""
        method: str = self.config["method"]
        return LABELS[method]

    @property
    def test(self) -> dict[str, float]:
        """Test figures of the best weights, which `calm.load` loads."""
        figures: dict[str, float] = self.result["best"]["test"]
        return figures


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        CalmError: it is not one, or the run did not finish.
    """
    for name in ("config.yaml", "result.json", "metrics.csv", "versions.json"):
        if not (folder / name).is_file():
            raise CalmError(f"{folder} is no finished run of calm train: it has no {name}")
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return Run(
        folder,
        read_yaml(folder / "config.yaml"),
        read_json(folder / "result.json"),
        {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())},
        read_json(folder / "versions.json"),
    )
