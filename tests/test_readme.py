"""What the README and the docs show runs, and what they link to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from calm.cli import COMMANDS
from calm.cli import train as train_command
from calm.cli.evaluate import read_config
from calm.cli.parsing import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def test_the_readmes_python_runs_and_says_what_it_claims(capsys):
    (block,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    output, maps = names["output"], names["maps"]
    assert output.probs.allclose(output.joint.sum((2, 3)), atol=1e-6)
    assert maps.shape == names["why"].shape == names["theirs"].shape == (4, 64, 64)
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_readmes_commands_parse():
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("calm ")]
    assert len(commands) >= 5
    for words in commands:
        if words[0] == "train":
            train_command.parse(words[1:])
            continue
        if words[0] == "evaluate":
            read_config(words[1:])
            continue
        name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
        parse(COMMANDS[name].parser(name), words[len(name.split()) :])
