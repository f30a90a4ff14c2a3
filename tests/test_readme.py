"""The code and the commands of README and docs run, and their links lead to files."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock, patch

import markdown
import pytest
import yaml
from PIL import Image
from torch.testing import assert_close

import calm
from calm.baselines import BASELINES
from calm.cli import COMMANDS, main, sweep, train as train_command
from calm.cli.evaluate import read_config
from calm.cli.parsing import parse
from calm.kinds import MAP_KINDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
site_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_pages)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def run_block(block: str, lines: int) -> dict[str, object]:
    assert len([line for line in block.splitlines() if line.strip()]) <= lines
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_readme_python_runs_and_gives_what_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calm.create_model("tiny_resnet", 3, class_names=["crow", "raven", "jay"]).save_pretrained("runs/birds")
    Image.new("RGB", (80, 60), "red").save("photo.jpg")
    trained, new = blocks(ROOT / "README.md", "python")

    names = run_block(trained, 11)
    output, joint = names["output"], names["joint"]
    assert joint.shape == names["odds"].shape == (1, *output.grid)
    assert_close(joint.sum((1, 2)), output.probs.amax(1))
    assert ((names["mass"] > 0) & (names["mass"] < output.probs.amax(1))).all()
    assert names["other"].shape == (1, 224, 224)
    with Image.open("map.png") as drawn:
        assert drawn.size == (80, 60)
    assert "photo.jpg: " in capsys.readouterr().out

    names = run_block(new, 10)
    output = names["output"]
    assert_close(output.probs, output.joint.sum((2, 3)))
    assert names["maps"].shape == (4, 64, 64)
    assert "tensor" in capsys.readouterr().out


# Pages that use the files of docs/start.md: what its commands write.
AFTER_START = ("start.md", "compare.md", "export.md")
PROGRAMS = [page for page in PAGES if page.name not in ("README.md", *AFTER_START) and blocks(page, "python")]
# What makes the commands of docs/start.md quick: fewer and smaller pictures.
SMALL = {
    "data birds": ["--species", "4", "--images_per_species", "6", "--size", "32"],
    "train": ["--epochs", "1", "--batch_size", "4", "--reading.image_size", "32"],
    "evaluate": ["--replicates", "20"],
}


def commands(page: Path) -> list[list[str]]:
    """The words of the commands of a page, after `calm`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("calm ")]


def command(words: list[str]) -> str:
    return next(name for name in COMMANDS if words[: len(name.split())] == name.split())


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands of docs/start.md were given, in their order, as a shell would give them."""
    folder = tmp_path_factory.mktemp("start")
    for number in range(6):
        for name in ("cat", "dog"):
            (folder / "my_folder" / name).mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 40), 80).save(folder / "my_folder" / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        served: list[str] = []
        patched.setattr("calm.app.running", lambda _, title, **__: nullcontext((served.append(title), Mock())))
        patched.setattr(signal, "signal", lambda *_: None)
        patched.setattr(signal, "pause", lambda: None)
        for words in commands(ROOT / "docs" / "start.md"):
            assert main([*words, *SMALL.get(command(words), [])]) == 0, words
        assert served == ["birds"]
    return folder


def test_the_commands_of_the_first_page_write_what_it_says(started):
    assert (started / "report.html").read_text(encoding="utf-8").count("<table") > 4
    assert (started / "maps" / "gallery.html").is_file()
    assert len(list((started / "maps").glob("*_0001_*.joint.png"))) == 4
    assert list((started / "maps").glob("*.evidence-signed-difference.png"))
    assert (started / "birds.onnx").stat().st_size > 100_000


@pytest.mark.parametrize("page", AFTER_START)
def test_python_of_the_docs_runs_after_the_first_page(page, started, monkeypatch, capsys):
    monkeypatch.chdir(started)
    if page == "export.md":
        assert main(["export", "--model", "runs/birds", "--out", "birds.pt2", "--to", "torch-export"]) == 0
        shutil.copy("birds/images/001.Red_crowned_Finch/Red_crowned_Finch_0001_1.jpg", "bird.jpg")
    names: dict[str, object] = {}
    with patch.dict(BASELINES):
        exec(compile("\n".join(blocks(ROOT / "docs" / page, "python")), page, "exec"), names)
    if page == "export.md":
        assert names["maps"].shape[:2] == (2, 2)
    if page == "compare.md":
        assert "feature-norm" in capsys.readouterr().out


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_python_of_the_docs_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one program."""
    monkeypatch.chdir(tmp_path)
    with patch.dict(MAP_KINDS), patch.dict(BASELINES):  # which extensions add to
        exec(compile("\n".join(blocks(page, "python")), page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"])
def test_lines_but_those_of_tables_have_at_most_120_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.lstrip().startswith("|")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"])
def test_lists_are_lists_on_the_site_and_text_is_none_in_the_repository(page):
    source = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", source, flags=re.S | re.M)
    html = markdown.markdown(site_pages.site_links(text, str(page.relative_to(ROOT))), extensions=["tables"])
    assert html.count("<li>") == len(re.findall(r"^ {0,3}(?:-|\d+\.) ", text, flags=re.M))


def test_readme_layout_names_every_room():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "src" / "calm").iterdir() if not path.name.startswith("_")}
    missing = {room for room in rooms if f"(src/calm/{room})" not in text}
    assert missing <= {"config.py", "errors.py", "files.py", "inference.py", "py.typed"}


def test_the_site_has_every_page_and_its_links():
    pages = {file.name for file in (ROOT / "docs").glob("*.md")} | set(site_pages.ELSEWHERE.values())
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(nav) == sorted(pages)
    text = "[a](../README.md#install) [b](../src/calm/model.py) ![c](birds.png) [d](https://d.org) [e](#here)"
    want = "[a](index.md#install) b ![c](birds.png) [d](https://d.org) [e](#here)"
    assert site_pages.site_links(text, "docs/reading.md") == want
    code = "```\n[a](../README.md)\n```"
    assert site_pages.site_links(code, "docs/reading.md") == code


def test_troubleshooting_names_messages_of_the_product():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "calm").rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", source))  # strings in one piece, without values
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [match[2] for match in re.finditer(r"^### (?:.*: )?(`+) ?(.+?) ?\1$", page, flags=re.M)]
    assert len(messages) > 12
    assert not [part for message in messages for part in message.split("…") if part.strip() not in source]


def test_citation_names_the_paper_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert paper["title"] in text
    assert paper["url"] in text
    assert all(author["family-names"] in text for author in paper["authors"])
    assert citation["version"] == calm.__version__


def test_commands_of_all_pages_parse():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) >= 15
    for words in found:
        name = command(words)
        rest = words[len(name.split()) :]
        if name == "train":
            train_command.parse(rest)
        elif name == "sweep":
            flags, rest = sweep.build_parser().parse_known_args(rest)
            assert flags.trials
            train_command.parse(rest)
        elif name == "evaluate":
            read_config(rest)
        else:
            parse(COMMANDS[name].parser(name), rest)
