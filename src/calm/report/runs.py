"""What a run of `calm train` left behind, read for a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.documents import read_columns, read_json, read_yaml
from calm.errors import CalmError, shown

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
        CalmError: it is not one, or the run did not finish, or a file of it is damaged; the message names the file.
    """
    for name in ("config.yaml", "result.json", "metrics.csv", "versions.json"):
        if not (folder / name).is_file():
            raise CalmError(f"{folder} is no finished run of calm train: it has no {name}")
    config = _mapping(folder / "config.yaml", read_yaml(folder / "config.yaml"))
    if config.get("method") not in tuple(LABELS):
        raise CalmError(
            f"{folder / 'config.yaml'}: method is {shown(config.get('method'))}: allowed are {', '.join(LABELS)}"
        )
    result = _mapping(folder / "result.json", read_json(folder / "result.json"))
    best = result.get("best")
    if not isinstance(best, dict) or not isinstance(best.get("test"), dict):
        raise CalmError(f"{folder / 'result.json'} has no figures of the best weights on test (best, test)")
    history = read_columns(folder / "metrics.csv", need=("epoch",))
    return Run(
        folder,
        config,
        result,
        history,
        _mapping(folder / "versions.json", read_json(folder / "versions.json")),
    )


def _mapping(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CalmError(f"{path} holds {shown(content)}, not names with values")
    return content
