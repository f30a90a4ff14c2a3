"""The results of benchmarks below some folders, grouped for a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calm.documents import read_json
from calm.errors import CalmError
from calm.evaluate.result import Result
from calm.maps import MAP_KINDS
from calm.report.charts import PALETTE
from calm.report.published import data_set

__all__ = ["Group", "Style", "find_groups", "styles"]

Style = tuple[str, bool]
"""Colour and whether dashed: how a method is drawn in every chart of a page."""


@dataclass(frozen=True)
class Group:
    """The results of one benchmark on one data set.

    Attributes:
        benchmark: its name.
        results: methods, each with a label of its own.
        data: what the provenance says about the data set.
        mark: told in the heading where another group would have the same.
    """

    benchmark: str
    results: tuple[Result, ...]
    data: Mapping[str, Any]
    mark: str = ""

    @property
    def title(self) -> str:
        """The benchmark's name as a heading."""
        return self.benchmark.replace("-", " ").capitalize()

    @property
    def heading(self) -> str:
        """The benchmark, and the data set: its name, or that of its folder."""
        name = self.published_data or Path(str(self.data.get("root", ""))).name
        split = str(self.data.get("split", "test"))
        words = [f"on {name}" if name else "", f"({split})" if split != "test" else "", self.mark]
        return " ".join([self.title, *filter(None, words)])

    @property
    def published_data(self) -> str | None:
        """The data set of the paper that this is, if it is one."""
        names = self.data.get("class_counts", {})
        return data_set(int(self.data.get("classes", 0)), int(self.data.get("images", 0)), names)


def find_groups(folders: Iterable[Path]) -> list[Group]:
    """All results below the folders, by benchmark and data set; a file found twice counts once.

    Raises:
        CalmError: a folder that is missing, or no result below any.
    """
    folders = list(folders)
    files: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise CalmError(f"{folder}: no such folder; give runs or the folders that calm evaluate wrote")
        inside = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        files.update({path.resolve(): None for path in inside if _is_result(path)})
    if not files:
        names = ", ".join(map(str, folders))
        raise CalmError(
            f"no result of a benchmark below {names}: make some with calm evaluate, or name the folder where it put"
            " them (./evaluation, if it was asked about several models and not told --out)"
        )
    found: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for path in files:
        result = Result.load(path)
        key = result.benchmark, json.dumps(_data(result).get("fingerprint"))
        found.setdefault(key, []).append((path, result))
    groups = [
        Group(benchmark, tuple(sorted(_distinct(members), key=_rank)), _data(members[0][1]))
        for (benchmark, _), members in sorted(found.items(), key=lambda item: _order(item[0]))
    ]
    headings = Counter(group.heading for group in groups)
    return [
        replace(group, mark=f"[{str(group.data.get('fingerprint'))[:8]}]")
        if headings[group.heading] > 1
        else group
        for group in groups
    ]


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """How each method is drawn: a CALM and a CAM in their own colours, the others in those that are left."""
    results = sorted((result for group in groups for result in group.results), key=_rank)
    labels = list(dict.fromkeys(result.label for result in results))
    own = {
        name: next((label for label in labels if label.startswith(name)), None) for name in ("CALM", "CAM")
    }
    chosen = {label: (name.lower(), False) for name, label in own.items() if label is not None}
    taken = {colour for colour, _ in chosen.values()}
    pool = [(c, dashed) for dashed in (False, True) for c in PALETTE if dashed or c not in taken]
    for number, label in enumerate(label for label in labels if label not in chosen):
        chosen[label] = pool[number % len(pool)]
    return chosen


_ORDER = ("cue-localization", "remove-and-classify", "localization", "classification")


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    return (_ORDER.index(key[0]) if key[0] in _ORDER else len(_ORDER), *key)


def _rank(result: Result) -> tuple[bool, str]:
    """The maps of the models themselves before other explanations of them, each by label."""
    return _subject(result).get("method") not in MAP_KINDS, result.label


def _subject(result: Result) -> Mapping[str, Any]:
    subject = result.provenance.get("subject", {})
    return subject if isinstance(subject, Mapping) else {}


def _data(result: Result) -> Mapping[str, Any]:
    data = result.provenance.get("data", {})
    return data if isinstance(data, Mapping) else {}


def _is_result(path: Path) -> bool:
    """Whether a JSON file is a saved result, and not a table, a configuration, or something else."""
    try:
        content = read_json(path)
    except CalmError:
        return False
    return isinstance(content, dict) and {"benchmark", "label", "figures", "provenance"} <= content.keys()


def _distinct(members: Sequence[tuple[Path, Result]]) -> tuple[Result, ...]:
    """Results whose labels differ: equal ones are told apart by what differs, the run's folder or the protocol, and
    else by a number."""
    alike: dict[str, list[tuple[str, ...]]] = {}
    for _, result in members:
        alike.setdefault(result.label, []).append(_circumstances(result))
    seen: Counter[str] = Counter()
    results = []
    for _, result in members:
        label, others = result.label, alike[result.label]
        if len(others) > 1:
            each = zip(_circumstances(result), zip(*others, strict=True), strict=True)
            apart = [own for own, all_of_them in each if own and len(set(all_of_them)) > 1]
            label = f"{label} ({', '.join(apart) or _run_name(result) or 'run'})"
        seen[label] += 1
        if seen[label] > 1:
            label = f"{label} {seen[label]}"
        results.append(replace(result, label=label))
    return tuple(results)


def _circumstances(result: Result) -> tuple[str, ...]:
    """What two results of one label may differ in."""
    norm, cuts = (result.provenance.get(name) for name in ("normalization", "thresholds"))
    return _run_name(result), f"norm {norm}" if norm else "", f"thresholds {cuts}" if cuts else ""


def _run_name(result: Result) -> str:
    model = _subject(result).get("model")
    return Path(str(model)).name if model else ""
