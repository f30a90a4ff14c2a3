"""Imports point one way: between files there is no circle, and no file imports from a room above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

FLOORS = [
    {"errors"},
    {"config", "files", "inference"},
    {"latent", "images", "calm_birds"},
    {"heatmaps", "metrics"},
    {"kinds"},
    {"output", "render", "backbones", "checkpoint", "data"},
    {"model", "heads", "acol"},
    {"released", "baselines", "exporting", "interop"},
    {"explain", "train", "evaluate"},
    {"report", "released_commands", "app"},
    {"cli"},
]
"""The rooms from the ground up. A room imports from lower floors, and, without a circle, from its own."""

LIBRARY_ROOMS = {room for floor in FLOORS[:9] for room in floor} - {"calm_birds", "data", "train", "evaluate"}


def module_paths() -> dict[str, Path]:
    """Every module of the two packages, by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_paths()


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of our modules that code imports: at the top, inside functions, and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in MODULES else node.module
                if name in MODULES:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def room(module: str) -> str:
    """``latent`` for calm.latent, ``train`` for calm.train.run, ``calm_birds`` for all of that package."""
    package, _, rest = module.partition(".")
    return package if package == "calm_birds" else rest.partition(".")[0]


GRAPH = {module: set(imported(ast.parse(path.read_text()))) - {module} for module, path in MODULES.items()}
ARROWS = {(module, other) for module, others in GRAPH.items() for other in others if module != "calm"}


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} - {""} == set().union(*FLOORS)


def test_there_is_no_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_no_import_points_up() -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    assert not {(a, b) for a, b in ARROWS if floor_of[room(a)] < floor_of[room(b)]}


def test_rooms_of_one_floor_form_no_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for a, b in ARROWS:
        if room(a) != room(b):
            rooms.setdefault(room(a), set()).add(room(b))
    TopologicalSorter(rooms).prepare()


def test_training_and_evaluation_never_import_each_other() -> None:
    apart = {"train", "evaluate", "explain"}
    assert not {(a, b) for a, b in ARROWS if {room(a), room(b)} <= apart and room(a) != room(b)}


def test_the_bird_renderer_knows_nothing_of_classifiers() -> None:
    assert {room(b) for a, b in ARROWS if room(a) == "calm_birds"} <= {"calm_birds", "errors", "files"}


def test_the_library_is_at_most_37_files_and_the_house_110() -> None:
    assert len(MODULES) <= 110
    assert sum(room(module) in LIBRARY_ROOMS | {""} for module in MODULES) <= 37


@pytest.mark.parametrize("code", ["def f():\n    from calm.train import run", "import calm.train.run"])
def test_the_walk_sees_imports_everywhere(code: str) -> None:
    assert set(imported(ast.parse(code))) == {"calm.train.run"}
