"""The demo, small: one page that needs nothing else, whose figures are those of the runs."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from calm.cli.demo import demo
from calm.cli.evaluate import main as evaluate
from calm.data import ImageDataset, eval_transform, load_splits
from calm.errors import CalmError
from calm.evaluate.result import Result
from calm.model import load
from calm.report.page import species_name

SMALL = {"species": 3, "images_per_species": 14, "size": 32, "epochs": 1}
BENCHMARKS = ["cue-localization", "remove-and-classify", "localization", "classification"]
SECTIONS = [*("the-birds", "evidence", "mistakes", "differences", "numbers", "training"), *BENCHMARKS, "making"]


class Document(HTMLParser):
    """Elements, tables and text of a page; fails where elements are not properly nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("img", "meta", "br"):
            self._open.append(name)
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, text):
        if "style" not in self._open:
            self.text += text
        if "td" in self._open or ("th" in self._open and "small" not in self._open):
            self.tables[-1][-1][-1] += text if "small" not in self._open else ""

    def of(self, name):
        return [attributes for element, attributes in self.elements if element == name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo(out, **SMALL) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Document:
    return Document((folder / "report.html").read_text(encoding="utf-8"))


def test_demo_writes_a_page_that_needs_nothing_else(page, folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
    assert not {"script", "link", "iframe", "object", "embed"} & {name for name, _ in page.elements}
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))
    assert "@import" not in html
    assert str(folder) not in html


def test_demo_page_has_all_sections_and_links_to_them(page):
    assert [attributes["id"] for attributes in page.of("section")] == SECTIONS
    assert [attributes["href"] for attributes in page.of("a")] == [f"#{name}" for name in SECTIONS]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawn = [figure for figure in page.of("figure") if figure.get("class") == "chart"]
    assert len(page.of("svg")) == len(drawn) > 3 + len(BENCHMARKS)


def test_demo_page_has_whole_pictures_with_descriptions(page):
    pictures = page.of("img")
    assert len(pictures) > 25
    for attributes in pictures:
        assert attributes["alt"]
        kind, _, code = attributes["src"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as picture:
            picture.load()
            assert kind == f"data:image/{picture.format.lower()}"
            assert picture.size == (int(attributes["width"]), int(attributes["height"]))


def test_demo_page_shows_evidence_beside_the_joint_maps(page, folder):
    """Captions come in the order of the pictures; the note has the sum of the map, of which one is computed here."""
    shown = " ".join(page.text.split())
    for label in (
        "CALM: evidence",
        "CALM: joint difference CALM: evidence difference",
        "CALM joint:",
        "CALM evidence:",
    ):
        assert label in shown
    model, test = load(folder / "runs" / "calm-em"), load_splits(folder / "birds", ["test"])["test"]
    with torch.no_grad():
        output = model.eval()(model.preprocess([record.path for record in test.records]))
    first, second = output.probs.topk(2).indices.unbind(dim=1)
    row = next(i for i, record in enumerate(test.records) if int(first[i]) == record.label)
    first, second = int(first[row]), int(second[row])
    odds = output.prior[row] * (output.log_conditional[row, first] - output.log_conditional[row, second])
    name = species_name(test.class_names[second])
    assert f"{float(odds.sum()):+.1f} nats against {name}" in shown


def test_demo_page_has_the_figures_of_the_runs(page, folder):
    (table,) = [rows for rows in page.tables if rows[0][:2] == ["model", "accuracy"]]
    assert table[0] == ["model", "accuracy", "nll", "calibration error", "images/s in training", "seconds of training"]
    for row, method, label in ((table[1], "calm-em", "CALM-EM"), (table[2], "cam", "CAM")):
        result = json.loads((folder / "runs" / method / "result.json").read_text())
        test = result["best"]["test"]
        assert row == [
            label,
            f"{100 * test['accuracy']:.1f}\N{NARROW NO-BREAK SPACE}%",
            f"{test['nll']:.3f}",
            f"{test['ece']:.3f}",
            f"{result['images_per_second']:.0f}",
            f"{result['seconds']:.0f}",
        ]


def test_demo_page_counts_the_mistakes_of_the_saved_models(page, folder):
    test = load_splits(folder / "birds", ["test"])["test"]
    wrong = []
    for method in ("calm-em", "cam"):
        model = load(folder / "runs" / method)
        dataset = ImageDataset(test, eval_transform(model.preprocessing))
        images, labels = (torch.stack([dataset[i][0] for i in range(len(dataset))]), [r.label for r in test.records])
        with torch.no_grad():
            said = model(images).probs.argmax(dim=1).tolist()
        wrong.append(sum(a != b for a, b in zip(said, labels, strict=True)))
    assert f"CALM is wrong about {wrong[0]} of {len(test.records)} test images and CAM about {wrong[1]};" in page.text


def figures(folder, benchmark):
    """Of the stored results of a benchmark, by label."""
    results = [Result.load(path) for path in (folder / "evaluation" / benchmark).iterdir()]
    return {result.label: result.figures for result in results}


def test_demo_page_has_the_results_that_calm_evaluate_stores(page, folder):
    models = ["--model", str(folder / "runs" / "calm-em"), str(folder / "runs" / "cam")]
    for benchmark in BENCHMARKS:
        stored = figures(folder, benchmark)
        models_only = benchmark == "classification"
        assert set(stored) >= ({"CALM-EM", "CAM"} if models_only else {"CALM-EM joint", "CAM cam"})
        pairs = ["evidence"] if benchmark == "cue-localization" else []
        methods = [] if models_only else ["--method", "joint", "cam", "gradient", *pairs]
        before = sorted((folder / "evaluation" / benchmark).iterdir())
        evaluate([benchmark, *models, *methods, "--data", str(folder / "birds"), "--out", str(folder / "evaluation")])
        assert sorted((folder / "evaluation" / benchmark).iterdir()) == before
    shown = [dict(zip(rows[0][1:], row[1:], strict=True)) | {"method": row[0], "head": rows[0][1]}
             for rows in page.tables if rows[0][0] == "method" for row in rows[1:]]  # fmt: skip
    for head, benchmark, name in (
        ("R_30", "remove-and-classify", "r30"),
        ("PxAP", "localization", "pxap"),
        ("NLL", "classification", "nll"),
        ("mPxAP", "cue-localization", "mpxap"),
    ):
        cells = {row["method"]: row[head] for row in shown if head in row}
        assert ({"CALM-EM", "CAM"} if head == "NLL" else {"CALM-EM joint", "CAM cam"}) <= set(cells)
        for label, stored in figures(folder, benchmark).items():
            value = stored[name].value
            percent = f"{100 * value:.1f}\N{NARROW NO-BREAK SPACE}%"
            assert cells[label] == (f"{value:.3f}" if head in ("NLL", "R_30") else percent)


def test_demo_page_has_peak_and_mass_beside_chance(page, folder):
    (rows,) = (rows for rows in page.tables if rows[0] == ["method", "peak in the part", "map in the part"])
    stored = figures(folder, "cue-localization")
    chance = stored["CAM cam"]
    expected = {
        **{label: (figures["peak_in_part"], figures["mass_in_part"]) for label, figures in stored.items()},
        "by chance, in the object": (chance["part_of_object"],) * 2,
        "by chance, in the picture": (chance["part_of_image"],) * 2,
    }
    assert {row[0]: row[1:] for row in rows[1:]} == {
        name: [f"{100 * figure.value:.1f}\N{NARROW NO-BREAK SPACE}%" for figure in pair]
        for name, pair in expected.items()
    }


def test_demo_called_again_trains_nothing_and_gives_the_same_figures(page, folder, capsys):
    results = [path for name in BENCHMARKS for path in (folder / "evaluation" / name).iterdir()]
    kept = [folder / "birds" / "images.txt", *(folder / "runs").rglob("*.*"), *results]
    before = {path: path.stat().st_mtime_ns for path in kept}
    demo(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    again = Document((folder / "report.html").read_text(encoding="utf-8"))
    assert again.tables == page.tables
    said = capsys.readouterr().out
    assert "already complete" in said
    assert "runs/cam is finished" in said
    assert f"{folder / 'evaluation' / 'table.md'}" in said
    assert (folder / "evaluation" / "table.md").read_text().count("| CALM-EM joint |") == len(BENCHMARKS) - 1
    assert "report.html" in said


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 1}, "it holds birds made from"),
    ({"epochs": 2}, r"epochs: 1 there, 2 now[\s\S]*--out"),
    ({"species": 1}, "species=1: give a whole number"),
])  # fmt: skip
def test_demo_refuses_a_folder_with_another_demo_or_a_wrong_value(folder, change, message):
    before = (folder / "report.html").read_bytes()
    with pytest.raises(CalmError, match=message) as caught:
        demo(folder, **SMALL | change)
    assert "run_dir" not in str(caught.value)
    assert (folder / "report.html").read_bytes() == before
