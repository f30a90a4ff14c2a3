"""What a report is made of: results of benchmarks, finished training runs, and the paper's own figures.

Source of these: Kim et al., "Keep CALM and Improve Visual Feature Attribution", ICCV 2021; ResNet-50, 28x28 grid.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from calm.data.loading import load_split
from calm.data.records import Split
from calm.errors import CalmError, shown
from calm.evaluate.result import Result
from calm.evaluate.runner import READING
from calm.files import read_columns, read_json, read_yaml
from calm.images import Preprocessing
from calm.output import MAP_KINDS, CalmOutput, CamOutput
from calm.report.charts import PALETTE

CUB, IMAGENET, OPENIMAGES = "CUB-200-2011", "ImageNet", "OpenImages30k"

DATA_SETS: dict[Any, str] = {(200, 5794): CUB, (1000, 50000): IMAGENET, (100, 5000): OPENIMAGES}
"""The paper's data sets by their numbers of classes and of test images."""


class Published(NamedTuple):
    """A table of the paper: by method its figures (as in ``Result.figures``), and what one has to know to compare."""

    rows: Mapping[str, Mapping[str, float]]
    note: str = "The paper gives top-1 accuracy without intervals."


_CUES = {  # in percent, of pairs that differ in 1, 2, 3 parts, and of all
    "vanilla gradient": (10.0, 13.7, 15.3, 13.9),
    "integrated gradients": (12.0, 15.1, 17.3, 15.7),
    "SmoothGrad": (11.8, 15.5, 18.6, 16.5),
    "VarGrad": (16.7, 21.1, 23.1, 21.4),
    "CAM": (24.1, 28.3, 32.2, 29.6),
    "CALM-ML": (23.6, 26.7, 28.8, 27.3),
    "CALM-EM": (30.4, 33.3, 36.3, 34.3),
}
_CUE_FIGURES = ("mpxap_published_1", "mpxap_published_2", "mpxap_published_3", "mpxap_published")
PUBLISHED = {
    ("cue-localization", CUB): Published(
        {
            method: {name: value / 100 for name, value in zip(_CUE_FIGURES, values, strict=True)}
            for method, values in _CUES.items()
        },
        "The paper's figures of cue localization count cumulatively: the released code never empties its histogram, so"
        " that each pair's figure includes all pairs before it. They stand in the columns that count so. Its network is"
        " a ResNet-50 with a 28x28 grid.",
    ),
    ("classification", CUB): Published({"CALM-ML": {"top1": 0.596}, "CALM-EM": {"top1": 0.718}}),
    ("classification", OPENIMAGES): Published({"CALM-ML": {"top1": 0.709}, "CALM-EM": {"top1": 0.701}}),
    ("classification", IMAGENET): Published({"CALM-ML": {"top1": 0.706}, "CALM-EM": {"top1": 0.704}}),
}
"""The paper's tables by benchmark and data set."""

CALM = ("calm-em", "calm-ml")  # training methods, the more important first
MAIN_KINDS = {CalmOutput.default_kind, CamOutput.default_kind}
METHODS = (*CALM, "cam")


@dataclass(frozen=True)
class Run:
    """A finished run of ``calm train``."""

    folder: Path
    config: dict[str, Any]  # every setting, as in config.yaml
    result: dict[str, Any]  # result.json: ``best`` and ``last`` with ``val`` and ``test``; images per second; seconds
    history: dict[str, list[float]]  # metrics.csv by column; one value per epoch
    versions: dict[str, Any]  # as in versions.json
    data: Mapping[str, Any]  # of data.json what it says about the test images; empty if there is none
    label: str  # the method's name, and after it the folder's where several runs have the same

    @property
    def method(self) -> str:
        """The training method."""
        return str(self.config["method"])

    @property
    def test(self) -> dict[str, Any]:
        """Test figures of the best weights, which `calm.load` loads."""
        return dict(self.result["best"]["test"])

    @property
    def minutes(self) -> float | None:
        """How long the training took."""
        seconds = self.result.get("seconds")
        return seconds / 60 if is_number(seconds) else None


def read_run(folder: Path) -> Run:
    """Read the folder of a finished run; a `CalmError` names the file that is missing or damaged."""
    for name in ("config.yaml", "result.json", "metrics.csv", "versions.json"):
        if not (folder / name).is_file():
            raise CalmError(f"{folder} is no finished run of calm train: it has no {name}")
    config, result, versions = (_mapping(folder / name) for name in ("config.yaml", "result.json", "versions.json"))
    if config.get("method") not in METHODS:
        method = shown(config.get("method"))
        raise CalmError(f"{folder / 'config.yaml'}: method is {method}: allowed are {', '.join(METHODS)}")
    best = result.get("best")
    if not isinstance(best, dict) or not isinstance(best.get("test"), dict):
        raise CalmError(f"{folder / 'result.json'} has no figures of the best weights on test (best, test)")
    history = read_columns(folder / "metrics.csv", need=("epoch",))
    data: Any = read_json(folder / "data.json") if (folder / "data.json").is_file() else {}
    for name in ("splits", "test"):
        data = data.get(name, {}) if isinstance(data, dict) else {}
    test = data if isinstance(data, dict) and is_number(data.get("classes", 0)) else {}
    return Run(folder, config, result, history, versions, test, config["method"].upper())


def _mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    if not isinstance(content, dict):
        raise CalmError(f"{path} holds {shown(content)}, not names with values")
    return content


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of a file is a number, not a Boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_runs(groups: Iterable[Group], folders: Iterable[Path] = ()) -> tuple[list[Run], list[str]]:
    """Return the finished runs whose models the results are about, and those that are one of the ``folders``; and what
    is wrong with those that cannot be read."""
    runs, problems = [], []
    given = [folder.resolve() for folder in folders if _is_run(folder)]
    for folder in dict.fromkeys([*(folder for group in groups for folder in group.run_folders), *given]):
        try:
            runs.append(read_run(folder))
        except CalmError as error:
            problems.append(str(error))
    alike = Counter(run.label for run in runs)
    runs = [replace(run, label=f"{run.label} ({run.folder.name})") if alike[run.label] > 1 else run for run in runs]
    return sorted(runs, key=lambda run: (METHODS.index(run.method), run.label)), problems


Style = tuple[str, bool]  # colour and whether dashed: how a method is drawn in every chart of a page


@dataclass(frozen=True)
class Group:
    """The results of one benchmark on one data set."""

    benchmark: str
    results: tuple[Result, ...]  # methods, each with a label of its own
    data: Mapping[str, Any]  # what the provenance says about the data set
    mark: str = ""  # part of the heading where another group would have the same

    @property
    def title(self) -> str:
        """The benchmark's name as a heading."""
        return self.benchmark.replace("-", " ").capitalize()

    @property
    def root(self) -> Path:
        """Where the data set was."""
        return Path(str(self.data.get("root", "")))

    @property
    def data_name(self) -> str:
        """Name of the data set, or of its folder."""
        return self.published_data or self.root.name

    @property
    def heading(self) -> str:
        """The benchmark and the data set."""
        split = str(self.data.get("split", "test"))
        name = f"on {self.data_name}" if self.data_name else ""
        return " ".join(filter(None, [self.title, name, f"({split})" if split != "test" else "", self.mark]))

    @property
    def published_data(self) -> str | None:
        """The data set of the paper that this is, by its size and (CUB) a class name, if it is one."""
        name = DATA_SETS.get((self.data.get("classes"), self.data.get("images")))
        albatross = any("Black_footed_Albatross" in own for own in self.data.get("class_counts", ()))
        return None if name == CUB and not albatross else name

    @property
    def run_folders(self) -> list[Path]:
        """The finished runs that the results are about: their models are RUN, RUN/best or RUN/last."""
        models = [Path(str(about(result).get("model", ""))) for result in self.results]
        folders = [folder for model in models if model.is_absolute() for folder in (model, model.parent)]
        return [folder for folder in folders if _is_run(folder)]

    @property
    def preprocessing(self) -> Preprocessing:
        """How the first model that says so read the images."""
        for config in (about(result).get("model_config") for result in self.results):
            with suppress(CalmError, KeyError, TypeError):
                return Preprocessing(**config["preprocessing"])  # type: ignore[index]
        return Preprocessing()

    def read_split(self) -> Split:
        """Return the images of the data set, read as for the results; a `CalmError` if it is gone or damaged."""
        data = self.data
        if not data.get("root") or not Path(data["root"]).is_dir():
            raise CalmError(f"there is no folder {data.get('root', '(not recorded)')}")
        names = [name for name in ("layout", "metadata_root", *READING) if data.get(name) is not None]
        return load_split(data["root"], data.get("split", "test"), **{name: data[name] for name in names})


def find_groups(folders: Sequence[Path]) -> list[Group]:
    """Return all results below folders by benchmark and data set, each file once; a `CalmError` if there is none, and
    none of the folders is a finished run, which can be shown without."""
    files: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise CalmError(f"{folder}: no such folder; give runs or the folders that calm evaluate wrote")
        inside = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        files.update({path.resolve(): None for path in inside if _is_result(path)})
    if not files and not any(map(_is_run, folders)):
        if begun := [folder for folder in folders if (folder / "config.yaml").is_file()]:
            raise CalmError(f"{begun[0]} is a run that is not finished: calm train --resume {begun[0]} goes on with it")
        where = "(./evaluation for several models without --out)"
        advice = f"make some with calm evaluate, or name the folder where it put them {where}"
        raise CalmError(f"no result of a benchmark below {', '.join(map(str, folders))}: {advice}")
    found: dict[tuple[str, str], list[Result]] = {}
    for result in map(Result.load, files):
        key = result.benchmark, json.dumps(about(result, "data").get("fingerprint"))
        found.setdefault(key, []).append(result)
    groups = [
        Group(key[0], tuple(sorted(_distinct(found[key]), key=_rank)), about(found[key][0], "data"))
        for key in sorted(found, key=lambda key: (_ORDER.index(key[0]) if key[0] in _ORDER else len(_ORDER), key))
    ]
    headings = Counter(group.heading for group in groups)
    marks = [f"[{str(group.data.get('fingerprint'))[:8]}]" if headings[group.heading] > 1 else "" for group in groups]
    return [replace(group, mark=mark) for group, mark in zip(groups, marks, strict=True)]


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """Return how each method is drawn: a CALM and a CAM in their own colours, the others in those that are left."""
    results = sorted((result for group in groups for result in group.results), key=_rank)
    of_maps = {r.label: about(r).get("model") for r in results if r.benchmark != "classification"}
    # A model by itself, without maps, looks like its main maps.
    same = {
        r.label: next((label for label, model in of_maps.items() if model == about(r).get("model")), "")
        for r in results
        if r.label not in of_maps and about(r).get("model") in of_maps.values()
    }
    labels = list(dict.fromkeys([*of_maps, *(result.label for result in results if result.label not in same)]))
    chosen: dict[str, Style] = {}
    for name in ("CALM", "CAM"):
        chosen |= {label: (name.lower(), False) for label in [x for x in labels if x.startswith(name)][:1]}
    taken = {colour for colour, _ in chosen.values()}
    pool = [(c, dashed) for dashed in (False, True) for c in PALETTE if dashed or c not in taken]
    others = [label for label in labels if label not in chosen]
    chosen |= {label: pool[number % len(pool)] for number, label in enumerate(others)}
    return chosen | {label: chosen[like] for label, like in same.items()}


def about(result: Result, what: str = "subject") -> Mapping[str, Any]:
    """Return what the provenance says about the model and the method, or about the ``data``."""
    known = result.provenance.get(what)
    return known if isinstance(known, Mapping) else {}


def own_maps(result: Result) -> str | None:
    """Return the model's training method if the result is about its own maps; None if it is about a baseline's."""
    config = about(result).get("model_config")
    return config.get("method") if isinstance(config, Mapping) and about(result).get("method") in MAP_KINDS else None


_ORDER = ("cue-localization", "remove-and-classify", "localization", "classification")


def _rank(result: Result) -> tuple[int, str]:
    """Return a sort key: the models' main maps, then their other own maps, then other explanations; each by label."""
    method = about(result).get("method")
    return 2 if method not in MAP_KINDS else method not in MAIN_KINDS, result.label


def _is_run(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def _is_result(path: Path) -> bool:
    """Return whether a JSON file is a saved result, and not a table, a configuration, or something else; a `CalmError`
    if it cannot be read and lies where `calm evaluate` puts its results: the page would lack it without a word."""
    try:
        content = read_json(path)
    except CalmError:
        if path.parent.name in _ORDER:
            raise
        return False
    return isinstance(content, dict) and {"benchmark", "label", "figures", "provenance"} <= content.keys()


def _distinct(results: Sequence[Result]) -> list[Result]:
    """Give results of equal labels different ones: by run or protocol if these differ, and else by a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for result in results:
        label, own = result.label, _circumstances(result)
        others = [_circumstances(other) for other in results if other.label == label]
        if len(others) > 1:
            apart = [value for place, value in enumerate(own) if len({other[place] for other in others}) > 1]
            label = f"{label} ({', '.join(filter(None, apart)) or own[0] or 'run'})"
        seen[label] += 1
        distinct.append(replace(result, label=f"{label} {seen[label]}" if seen[label] > 1 else label))
    return distinct


def _circumstances(result: Result) -> tuple[str, ...]:
    """Return what two results of one label may differ in: the run's folder, and the protocol."""
    norm, cuts = (result.provenance.get(name) for name in ("normalization", "thresholds"))
    run = Path(str(about(result).get("model") or "")).name
    return run, f"norm {norm}" if norm else "", f"thresholds {cuts}" if cuts else ""
