"""Imports point one way: no module reaches up to a later layer, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"

LAYERS = [
    {"caches", "choices", "complaints", "errors", "atomic", "command_line", "documents", "torch_file"},
    {"latent", "colormaps"},
    {"moment", "objectives", "target_conditional", "resample", "normalization"},
    {"maps", "unscored"},
    {"output", "render"},
    {"head", "backbones", "preprocess", "data", "metrics"},
    {"model"},
    {"card", "baselines", "places", "image_inputs"},
    {"checkpoint"},
    {"released_file", "released", "train", "explanation", "evaluate"},
    {"explanation_summary", "conversion", "explain", "report"},
    {"demo", "released_commands"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# `model.save_pretrained` and its siblings are one-line doors to the module that owns the files.
DOORS = {("model", "checkpoint")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of the package's modules imported anywhere but for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "calm":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calm."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("calm."))
        yield from imports(node)


def edges() -> set[tuple[str, str]]:
    found = set()
    for path in (SOURCE / "calm").rglob("*.py"):
        own = path.relative_to(SOURCE / "calm").parts[0].removesuffix(".py")
        if own != "__init__":
            found |= {(own, other) for other in imports(ast.parse(path.read_text())) if other != own}
    return found


def test_every_module_has_a_layer():
    names = {
        path.name.removesuffix(".py") for path in (SOURCE / "calm").iterdir() if path.suffix in ("", ".py")
    }
    assert names - {"__init__", "__pycache__", "presets", "py.typed"} == set(RANK)


def test_imports_point_down_or_sideways():
    up = {(a, b) for a, b in edges() if b in RANK and RANK[b] > RANK[a]}
    assert up == DOORS


def test_training_explaining_and_evaluating_never_import_each_other():
    apart = ("train", "report", "explain", "evaluate")
    allowed = {("report", "evaluate"), ("report", "explain")}
    assert not {(a, b) for a, b in edges() if a in apart and b in apart} - allowed


def test_the_walk_sees_imports_inside_functions():
    assert list(imports(ast.parse("def f():\n    from calm.train import x\n"))) == ["train"]
