"""`pip install calm` suffices to load, predict and explain; any other command says which extra it lacks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from calm.errors import EXTRAS

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

BLOCK = """
import sys

# As of a package that is not there, for imports and for importlib.util.find_spec, with which PyTorch looks for onnx.
sys.modules.update(dict.fromkeys({modules!r}))
"""

EXPLAIN = """
import calm
from PIL import Image

Image.new("RGB", (80, 60), "red").save("red.png")
calm.create_model("small_resnet", 3).save_pretrained("model")
model = calm.load("model").eval()
images = model.preprocess("red.png")
assert model(images).probs.shape == (1, 3)
assert model.attribute(images, 1, size=(60, 80)).shape == (1, 60, 80)
assert calm.attribute(model, images, 1, "joint").ndim == 3
"""

RUN = """
from calm.cli import main

for line in {lines!r}:
    print(main(line.split()))
"""


def distribution(requirement: str) -> str:
    """The normalised name of a requirement: ``jsonargparse`` of ``jsonargparse[signatures]>=4.49``."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def top_modules(requirements: list[str]) -> set[str]:
    """The top-level modules that requirements install."""
    wanted = {distribution(requirement) for requirement in requirements}
    homes = packages_distributions()
    return {module for module, names in homes.items() if wanted & {name.lower().replace("_", "-") for name in names}}


def run_without(modules: set[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which ``modules`` cannot be imported."""
    source = BLOCK.format(modules=modules) + code
    return subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)


def imported_modules(path: Path) -> set[str]:
    """The top-level modules that a file imports, at its top, in functions, and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_extras_are_those_of_the_project() -> None:
    declared = PROJECT["optional-dependencies"]
    assert EXTRAS.keys() == declared.keys() - {"dev", "docs"}
    for extra, modules in EXTRAS.items():
        in_dev = extra in re.split(r"[\[,\]]", declared["dev"][0])
        found = top_modules(declared[extra]) if in_dev else {distribution(line) for line in declared[extra]}
        assert modules <= found
        assert len(modules) == len(declared[extra])


def test_every_import_is_declared() -> None:
    base, extras = top_modules(PROJECT["dependencies"]), set().union(*EXTRAS.values())
    own = {"calm", "calm_birds", "docstring_parser"}  # the last is brought by jsonargparse[signatures]
    for path in sorted((ROOT / "src").rglob("*.py")):
        unknown = imported_modules(path) - sys.stdlib_module_names - base - extras - own
        assert not unknown, f"{path}: {unknown}"


def test_package_data_names_every_file_that_is_not_code() -> None:
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / "src" / package
        named = {path for pattern in patterns for path in folder.glob(pattern)}
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {path for path in files if path.suffix != ".py"} == named


def test_oldest_constraints_are_the_floors_of_the_project() -> None:
    lines = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {distribution(line): line.partition("==")[2] for line in lines if not line.startswith("#")}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in {requirement for group in groups for requirement in group}:
        name, _, floor = requirement.partition(">=")
        if floor and distribution(name) not in {"mypy", "ruff", "pre-commit"}:
            assert (pins[distribution(name)] + ".").startswith(floor + "."), requirement


BaseInstall = tuple[Path, subprocess.CompletedProcess[str]]

LACKING = {
    "train --data data": "train",
    "evaluate all --model model --data data": "evaluate",
    "data birds birds": "evaluate",
    "report model": "evaluate",
    "attribute --model model red.png --out maps --method gradcam": "baselines",
    "attribute --model model red.png --out maps --method integrated-gradients": "baselines",
}
"""Command lines that need an extra, and which."""


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    """Load, predict and explain without the modules of any extra, then try the commands that need one."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "data" / "train" / "a").mkdir(parents=True)
    lines = ["attribute --model model red.png --out maps", *LACKING]
    return folder, run_without(set().union(*EXTRAS.values()), EXPLAIN + RUN.format(lines=lines), folder)


def test_a_base_install_loads_predicts_and_explains(base_install: BaseInstall) -> None:
    folder, done = base_install
    assert done.returncode == 0, done.stderr
    assert list((folder / "maps").rglob("*.npy"))


def test_a_command_says_which_extra_it_lacks(base_install: BaseInstall) -> None:
    messages = [line for line in base_install[1].stderr.splitlines() if "pip install" in line]
    extras = [re.findall(r"pip install 'calm\[(.*?)\]'", line) for line in messages]
    assert extras == [[extra] for extra in LACKING.values()]
    assert base_install[1].stdout.splitlines()[-len(LACKING) :] == ["2"] * len(LACKING)


@pytest.mark.slow
def test_training_needs_its_extra_only(tmp_path: Path) -> None:
    from calm_birds import write_birds

    write_birds(tmp_path / "birds", species=2, images_per_species=6, size=32)
    code = RUN.format(
        lines=["train --preset birds --data birds --epochs 1 --batch_size 4 --run_dir run --backbone tiny_resnet"]
    )
    # torchmetrics asks for matplotlib's installed version before it imports it, so matplotlib cannot be hidden from it.
    missing = set().union(*EXTRAS.values()) - EXTRAS["train"] - {"matplotlib"}
    done = run_without(missing, code, tmp_path)
    assert done.stdout.strip().endswith("0"), done.stderr + done.stdout
