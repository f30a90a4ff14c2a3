"""How a report was made: enough to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from calm.report.html import Html, Part, join, tag
from calm.report.page import Section
from calm.report.runs import Run

__all__ = ["facts", "provenance_section"]


def provenance_section(command: str, known: Mapping[str, Part], runs: Sequence[Run], base: Path) -> Section:
    """The command, facts about data and time, versions, and the whole configuration of each run.

    Args:
        command: that makes the report again.
        known: facts by name.
        runs: what was trained.
        base: paths below it are written relative to it.
    """
    versions = runs[0].versions
    packages = ", ".join(f"{name} {number}" for name, number in versions["packages"].items() if number)
    machine = f"Python {versions['python']}, {versions['cpus']} cores, {versions['platform']}"
    configs = [
        tag(
            "details",
            tag("summary", f"All settings of {run.label}"),
            tag("pre", yaml.safe_dump(_relative(run.config, base), sort_keys=False, allow_unicode=True)),
        )
        for run in runs
    ]
    body = join(
        tag("pre", command, class_="command"),
        facts({**known, "Packages": packages, "Machine": machine}),
        *configs,
    )
    return Section("How it was made", body, "Making")


def facts(known: Mapping[str, Part]) -> Html:
    """Names and what is to be said about them."""
    return tag(
        "dl",
        *[tag("div", tag("dt", name), tag("dd", value)) for name, value in known.items()],
        class_="facts",
    )


def _relative(value: Any, base: Path) -> Any:
    """A configuration whose paths do not tell whose machine it was."""
    if isinstance(value, dict):
        return {name: _relative(member, base) for name, member in value.items()}
    if isinstance(value, str) and value.startswith(f"{base.resolve()}/"):
        return str(Path(value).relative_to(base.resolve()))
    return value
