"""The building blocks of reports: markup, pages, pictures, tables, charts, run folders."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from subprocess import run
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from calm.errors import CalmError
from calm.report import charts
from calm.report.charts import Line, chart
from calm.report.found import read_run
from calm.report.page import Column, Page, Row, Section, Shot, Table, _environment, data_uri, render, write

HOSTILE = """<script>alert("x")</script> & 'so' on"""


class Texts(HTMLParser):
    """All text of a page, by the element it is in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, name, attributes):
        if name not in ("img", "br", "meta"):
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name, f"</{name}> closes another element"

    def handle_data(self, text):
        if text.strip():
            self.found.append((self._open[-1] if self._open else "", text))

    def of(self, name):
        return [text for element, text in self.found if element == name]


def macro(name, *arguments, **keywords):
    """What a macro of ``templates/macros.html`` makes of its arguments."""
    return str(getattr(_environment().get_template("macros.html").module, name)(*arguments, **keywords))


def empty_page(title="t", sections=()):
    summary = Section("", "summary_benchmarks", {"methods": 1, "benchmarks": 2, "figures": [("98 %", title, "of 540")]})
    return Page(title, "kind", summary, sections)


def test_render_escapes_text_exactly_once_in_content_and_attributes():
    shot = Shot(np.zeros((2, 2, 3), np.uint8), HOSTILE, HOSTILE)
    html = macro("strip", [shot], 1)
    assert "<script" not in html
    assert Texts(html).found == [("figcaption", HOSTILE)]
    alts = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: alts.append(dict(attributes).get("alt"))
    parser.feed(html)
    assert HOSTILE in alts


def test_render_puts_sections_below_links_to_them():
    sections = [Section("One & only", "gallery", {"gallery": {"cards": {}, "problems": [HOSTILE]}}),
                Section("A very long title", "gallery", {"gallery": {"cards": {}, "problems": []}}, "Two")]  # fmt: skip
    html = render(empty_page(HOSTILE, sections))
    texts = Texts(html)
    assert texts.of("h1") == texts.of("title") == texts.of("dt") == [HOSTILE]
    assert texts.of("h2") == ["One & only", "A very long title"]
    assert HOSTILE in texts.of("p")
    assert "<script" not in html
    links = re.findall(r'<a href="#([^"]+)">', html)
    assert links == re.findall(r'<section id="([^"]+)">', html) == ["one-only", "two"]
    assert texts.of("dd") == ["98 %", "of 540"]
    assert html.startswith("<!doctype html>\n<html")


def test_write_puts_the_style_inside_for_dark_screens_phones_and_paper(tmp_path):
    path = write(empty_page(), tmp_path / "a" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    for wanted in ("prefers-color-scheme: dark", "max-width: 46rem", "@media print", "width=device-width"):
        assert wanted in html
    assert not re.search(r"url\(|@import|<link|<script", html)


def test_data_uri_keeps_the_picture():
    picture = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    kind, _, code = data_uri(picture, lossless=True).partition(";base64,")
    assert kind == "data:image/png"
    assert (np.array(Image.open(io.BytesIO(base64.b64decode(code)))) == picture).all()
    smooth = np.full((16, 16, 3), (200, 90, 40), dtype=np.uint8)
    kind, _, code = data_uri(smooth).partition(";base64,")
    decoded = np.array(Image.open(io.BytesIO(base64.b64decode(code)))).astype(int)
    assert kind == "data:image/jpeg"
    assert abs(decoded - smooth).max() <= 3
    assert 'width="9" height="12"' in macro("image", picture, "noise")


def test_strip_says_what_pictures_show():
    html = macro("strip", [Shot(np.zeros((2, 2, 3), np.uint8), HOSTILE, HOSTILE, "note")], 3)
    assert Texts(html).found == [("figcaption", HOSTILE), ("small", "note")]
    assert "<script" not in html
    assert "--columns:3;--narrow:2" in html
    assert Texts(macro("colours", "low", "high", "signed", "0")).of("span") == ["low", "0", "high"]


def test_table_marks_the_best_and_treats_ties_and_chance_fairly():
    columns = [Column("accuracy", "%", "higher"), Column("nll", ".2f", "lower"), Column("seconds", ".0f"), Column("n")]
    rows = [
        Row("a", [0.98761, 0.5, 3.2, "7"], [(0.97, 0.99), None, None, None]),
        Row("b", [0.98764, 0.4, None, "8"]),
        Row("chance", [0.999, 0.1, 1.0, "9"], competes=False),
    ]
    html = macro("table", Table(columns, rows, "Figures", "model"))
    texts = Texts(html)
    thin = "\N{NARROW NO-BREAK SPACE}%"
    assert texts.of("b") == [f"98.8{thin}", f"98.8{thin}", "0.40"]  # equal as written: equally good
    assert texts.of("small") == [f"97.0–99.0{thin}"]  # noqa: RUF001
    assert texts.of("td") == ["0.50", "3", "7", "–", "8", f"99.9{thin}", "0.10", "1", "9"]  # noqa: RUF001
    assert texts.of("th") == ["model", "accuracy", "nll", "seconds", "n", "a", "b", "chance"]


def drawn_paths(svg: str, colour: str) -> list[np.ndarray]:
    """The points of the curves in a colour, in units of the drawing."""
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", svg, re.DOTALL).group().replace("xlink:", ""))
    paths = [p for p in root.iter("path") if f"stroke: var(--{colour})" in p.get("style", "")]
    return [np.array(re.findall(r"[-\d.]+", p.get("d")), dtype=float).reshape(-1, 2) for p in paths]


def test_chart_draws_its_figures_in_the_colours_of_the_page():
    x, y = [1, 2, 3, 5], [0.1, 0.5, 0.4, 0.9]
    lines = [Line(x, y, "a", "calm"), Line(x, y[::-1], "b", "cam", dashed=True, band=(y, y))]
    html = chart(lines, title="Loss & more", x_label="epoch", percent=True)
    (curve,) = drawn_paths(html, "calm")
    for axis, values in ((0, x), (1, y)):
        fitted = np.polyval(np.polyfit(values, curve[:, axis], 1), values)
        assert abs(fitted - curve[:, axis]).max() < 1e-3  # the drawing is linear in the figures
    assert len(drawn_paths(html, "cam")) == 1
    assert not re.search(r"#0\d0\d0\d|<metadata|https?://|<style", html)
    assert 'aria-label="Loss &amp; more"' in html
    assert Texts(macro("legend", [*lines, lines[0]])).of("li") == ["a", "b"]


@pytest.mark.parametrize(("lowest", "drawn"), [(0.2, 0.0), (-0.3, -0.3)])
def test_chart_draws_a_curve_below_zero_whole(lowest, drawn, monkeypatch):
    limits = []
    monkeypatch.setattr(charts, "_figure", lambda draw, *_: limits.append(_limits(draw)))
    chart([Line([0, 1], [1.0, 0.5], "a", band=([0.9, lowest], [1.0, 0.6]))], title="t", x_label="x")
    assert limits[0] == pytest.approx(drawn, abs=0.1)
    assert limits[0] <= drawn


def _limits(draw):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw(axes)
    return axes.get_ylim()[0]


def test_chart_shares_no_ids_with_another():
    charts = [chart([Line([1, 2], [1, 2], "a")], title=title, x_label="x") for title in ("one", "two")]
    ids = [set(re.findall(r' id="([^"]+)"', html)) for html in charts]
    assert ids[0]
    assert not ids[0] & ids[1]
    for html, own in zip(charts, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", html)) <= own


def test_read_run_reads_a_finished_run_and_refuses_others(tmp_path):
    with pytest.raises(CalmError, match=r"no finished run of calm train: it has no config\.yaml"):
        read_run(tmp_path)
    (tmp_path / "config.yaml").write_text("method: calm-ml\nepochs: 2\n")
    (tmp_path / "versions.json").write_text('{"python": "3"}')
    (tmp_path / "metrics.csv").write_text("epoch,val_nll\n1,0.5\n2,0.25\n")
    with pytest.raises(CalmError, match=r"result\.json"):
        read_run(tmp_path)
    result = {"best": {"test": {"accuracy": 0.5}}, "seconds": 3}
    (tmp_path / "result.json").write_text(json.dumps(result))
    read = read_run(tmp_path)
    assert (read.label, read.test, read.result["seconds"]) == ("CALM-ML", {"accuracy": 0.5}, 3)
    assert read.history == {"epoch": [1, 2], "val_nll": [0.5, 0.25]}


def test_importing_reports_costs_no_plotting_library():
    code = "import sys, calm.report, calm.report.charts, calm.cli.demo; print({'matplotlib', 'torch'} & {*sys.modules})"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
