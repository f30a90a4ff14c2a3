"""``calm app``: what the explorer computes, and its page in a browser.

CALM_APP_RUN and CALM_APP_DATA name a trained model and its data to run the tests of the page on in place of a tiny
model; CALM_APP_PICTURE names a file for a picture of the page, such as docs/app.png.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain_cases import NAMES, make_model, write_picture
from PIL import Image

from calm.app import find_samples, make_explorer, running, serve, trained_on
from calm.app.session import Explorer, Reading, Sample, Seen, in_order, numbers, painted, top_pixels
from calm.errors import CalmError
from calm.heatmaps import resize_maps
from calm.images import read_image
from calm.model import create_model
from calm.render import overlay

CHROMIUM = shutil.which("chromium")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra app is not installed")

# Gradio counts its events by what the newest pandas deprecates; as errors these warnings would stop its queue.
OF_GRADIO = ("'future.no_silent_downcasting'", "The copy keyword is deprecated")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:DeprecationWarning") for text in OF_GRADIO]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    return [write_picture(folder / f"{name}.png", (40, 24), seed) for seed, name in enumerate(("a", "b", "c"))]


@pytest.fixture(scope="module")
def explorer(pictures: list[Path]) -> Explorer:
    samples = [Sample(path, path.name, label) for label, path in enumerate(pictures)]
    return Explorer(make_model("calm-em"), {"cam": make_model("cam")}, samples)


@pytest.fixture
def seen(explorer: Explorer) -> Seen:
    return explorer.see(explorer.samples[0])


# --- what is computed ---------------------------------------------------------------------------------------


def oracle_mass(grid: np.ndarray, region: tuple[float, float, float, float]) -> float:
    """The integral of the map, constant in each cell, over a rectangle, in float64."""
    rows, columns = grid.shape
    left, top, right, bottom = region
    total = 0.0
    for row in range(rows):
        for column in range(columns):
            high = min(bottom, (row + 1) / rows) - max(top, row / rows)
            wide = min(right, (column + 1) / columns) - max(left, column / columns)
            total += float(grid[row, column]) * max(0.0, high) * max(0.0, wide) * rows * columns
    return total


@pytest.mark.parametrize(
    "region", [(0, 0, 1, 1), (0.25, 0, 0.5, 1), (0.1, 0.3, 0.35, 0.95), (0.3, 0.3, 0.31, 0.31), (0.9, 0.2, 1, 0.6)]
)
@pytest.mark.parametrize("kind", ["joint", "posterior", "prior", "evidence"])
def test_mass_is_the_integral_of_the_grid(
    explorer: Explorer, seen: Seen, kind: str, region: tuple[float, float, float, float]
) -> None:
    reading = explorer.read(seen, kind, 2)
    assert reading.mass(region) == pytest.approx(oracle_mass(reading.grid.double().numpy(), region), rel=1e-9)


def test_read_gives_the_maps_of_the_model(explorer: Explorer, seen: Seen, pictures: list[Path]) -> None:
    with torch.no_grad():
        output = explorer.model(explorer.model.preprocess(pictures[0]))
    torch.testing.assert_close(explorer.read(seen, "joint", 3).grid, output.joint[0, 3])
    assert explorer.read(seen, "joint", 3).total == pytest.approx(float(output.probs[0, 3]), rel=1e-5)
    evidence = explorer.read(seen, "evidence", 3, 1)
    torch.testing.assert_close(evidence.grid, output.prior[0] * (output.logits[0, 3] - output.logits[0, 1]))
    best, second = output.probs[0].topk(2).indices.tolist()
    assert explorer.read(seen, "evidence", best).versus == second
    with pytest.raises(CalmError, match="choose two"):
        explorer.read(seen, "joint", 3, 3)
    with pytest.raises(CalmError, match="unknown map kind 'cam'"):
        explorer.read(seen, "cam", 3)


def test_ninths_add_up_to_the_total(explorer: Explorer, seen: Seen) -> None:
    reading = explorer.read(seen, "evidence", 3, 1)
    positive, negative = (sum(value for _, value in reading.ninths(sign)) for sign in (1, -1))
    assert positive == pytest.approx(float(reading.grid.double().clamp(min=0).sum()), rel=1e-9)
    assert positive - negative == pytest.approx(reading.total, rel=1e-9)
    assert min(positive, negative) > 0, "the case has both"
    corner = torch.zeros(4, 4)
    corner[0, 3] = 1
    assert Reading(seen, "joint", 0, None, corner).ninths()[0] == ("upper right", pytest.approx(1.0))


def test_colours_of_a_map_are_multiples_of_uniform(seen: Seen) -> None:
    spike = torch.zeros(4, 4)
    spike[1, 1] = 0.5
    flat = torch.full((4, 4), 0.01)
    flat[1, 1] = 0.015
    sharp, dull = Reading(seen, "joint", 0, None, spike), Reading(seen, "joint", 0, None, flat)
    assert (sharp.uniform, sharp.top) == pytest.approx((0.5 / 16, 0.5))
    assert dull.top == pytest.approx(4 * dull.total / 16)
    assert dull.flat
    assert not sharp.flat
    assert Reading(seen, "joint", 0, 1, spike).uniform is None
    assert not Reading(seen, "joint", 0, 1, spike).flat
    for reading in (sharp, dull, Reading(seen, "joint", 0, None, torch.full((4, 4), 0.01))):
        expected = overlay(seen.picture, reading.grid, top=reading.top, size=(240, 400))
        np.testing.assert_allclose(reading.draw().astype(int), expected.astype(int), atol=1)


def test_draw_hides_what_is_below_the_threshold(seen: Seen) -> None:
    grid = torch.zeros(4, 4)
    grid[0, 0], grid[3, 3] = 1.0, 0.1
    plain = Reading(seen, "joint", 0, None, torch.zeros(4, 4)).draw()
    reading = Reading(seen, "joint", 0, None, grid)
    corner = np.s_[-20:, -20:]
    assert (reading.draw()[corner] != plain[corner]).any()
    assert (reading.draw(threshold=0.5)[corner] == plain[corner]).all()
    assert (reading.draw(threshold=0.5)[:20, :20] != plain[:20, :20]).any()
    bright = np.abs(reading.draw(log=True)[corner].astype(int) - plain[corner]).sum()
    assert bright > np.abs(reading.draw()[corner].astype(int) - plain[corner]).sum()
    assert (reading.draw(opacity=0.0) == plain).all()


def test_classes_at_clamps_and_floors(explorer: Explorer, seen: Seen) -> None:
    cell, probs = explorer.classes_at(seen, 0.26, 0.99)
    assert cell == (3, 1)
    torch.testing.assert_close(probs.float(), seen.output.conditional[0, :, 3, 1])
    assert explorer.classes_at(seen, 1.0, 1.0)[0] == (3, 3)
    assert explorer.classes_at(seen, 0.0, 0.0)[0] == (0, 0)


def test_erase_shows_the_model_the_mean_colour(explorer: Explorer, seen: Seen) -> None:
    reading = explorer.read(seen, "joint", 2)
    mask = top_pixels(reading, 0.25)
    assert int(mask.sum()) == 64
    resized = resize_maps(reading.grid, (16, 16))
    assert float(resized[mask].min()) >= float(resized[~mask].max())
    after = explorer.erase(seen, mask)
    with torch.no_grad():
        expected = explorer.model(seen.image * ~mask).probs[0]
    torch.testing.assert_close(after.probs, expected)
    assert after.picture.shape == seen.picture.shape
    everything = explorer.erase(seen, torch.ones(16, 16, dtype=torch.bool)).picture
    mean = [round(255 * value) for value in explorer.model.preprocessing.mean]
    assert np.abs(everything.reshape(-1, 3).astype(int) - mean).max() <= 1


def test_painted_covers_the_stroke_and_nothing_far_from_it() -> None:
    mask = painted([[(0.25, 0.5), (0.75, 0.5)]], 0.1, (50, 100))
    assert bool(mask[25, 25:76].all())
    assert bool(mask[21:30, 50].all())
    far = mask.clone()
    far[18:33, :83] = False
    assert not bool(far.any())


def test_compare_draws_own_maps_baselines_and_another_model(explorer: Explorer, seen: Seen) -> None:
    drawn = explorer.compare(seen, 2, ["joint", "gradcam", "cam"])
    captions, pictures = zip(*drawn, strict=True)
    assert captions[:2] == ("joint", "gradcam")
    assert captions[2].startswith("cam: cam, p = 0.")
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert {picture.shape for picture in pictures} == {(240, 400, 3)}
    with pytest.raises(CalmError, match="unknown method 'magic'"):
        explorer.compare(seen, 2, ["magic"])
    other = Explorer(explorer.model, {"two": create_model("tiny_resnet", 2, "cam")})
    with pytest.raises(CalmError, match=r"model two has no class '003\.Green_Finch'"):
        other.compare(seen, 2, ["two"])


def test_batch_sorts_and_names_what_it_cannot_read(explorer: Explorer, tmp_path: Path) -> None:
    broken = tmp_path / "secret" / "broken.png"
    broken.parent.mkdir()
    broken.write_bytes(b"no picture")
    rows, errors = explorer.batch([*explorer.samples, Sample(broken, "broken.png")])
    assert len(rows) == 3
    assert len(errors) == 1
    assert "broken.png" in errors[0]
    assert "secret" not in errors[0], "a visitor is not told of the server's folders"
    confidence = [row.record["target"]["probability"] for row in in_order(rows, "confidence")]
    assert confidence == sorted(confidence, reverse=True)
    doubt = [row.record["doubt"] for row in in_order(rows, "doubt")]
    assert doubt == sorted(doubt, reverse=True)
    wrong = [row.record["wrong"] for row in in_order(rows, "error")]
    assert wrong == sorted(wrong, reverse=True)
    assert len(set(wrong)) == 2, "the case has both"
    with pytest.raises(CalmError, match="201 pictures at once"):
        explorer.batch([explorer.samples[0]] * 201)


def test_numbers_are_those_of_the_map(explorer: Explorer, seen: Seen) -> None:
    reading = explorer.read(seen, "joint", 2)
    record = json.loads(json.dumps(numbers(reading, NAMES, (0.0, 0.0, 0.5, 1.0))))
    np.testing.assert_allclose(record["grid"], reading.grid.double())
    assert record["region"]["mass"] == pytest.approx(float(reading.grid[:, :2].sum()), rel=1e-6)
    assert (record["file"], record["height"], record["width"]) == ("a.png", 24, 40)


def test_see_keeps_a_large_picture_small_and_reads_as_the_model_does(explorer: Explorer, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 1500), dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    seen = explorer.see(Sample(tmp_path / "deep.png", "deep.png"))
    assert seen.size == (40, 1500)
    assert seen.picture.shape == (27, 1024, 3)
    torch.testing.assert_close(seen.image, explorer.model.preprocess(tmp_path / "deep.png"))


def test_find_samples_takes_turns_and_labels_by_name(tmp_path: Path) -> None:
    for name in (NAMES[2], "unknown", NAMES[0]):
        for number in range(3):
            write_picture(tmp_path / name / f"{number}.png")
    samples = find_samples(tmp_path, make_model("calm-em"), 4)
    assert [sample.label for sample in samples] == [0, 2, None, 0]
    assert len({sample.path for sample in samples}) == 4


def test_trained_on_is_the_data_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    assert trained_on(tmp_path / "run") is None
    (tmp_path / "run" / "config.yaml").write_text(f"data: {tmp_path / 'pictures'}\n")
    assert trained_on(tmp_path / "run") is None, "the folder is not there"
    (tmp_path / "pictures").mkdir()
    assert trained_on(tmp_path / "run") == trained_on(tmp_path / "run" / "best") == tmp_path / "pictures"
    (tmp_path / "run" / "config.yaml").write_text("[1]\n")
    assert trained_on(tmp_path / "run") is None


@needs_gradio
@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_page_escapes_what_models_and_visitors_name(method: str, tmp_path: Path) -> None:
    from calm.app.page import Page

    evil = "<img src=x onerror=alert(1)>"
    model = make_model(method)
    model.class_names = tuple(f"{evil}{i}" for i in range(6))
    path = write_picture(tmp_path / "a.png")
    explorer = Explorer(model, {f"model {evil}": model}, [Sample(path, f"{evil}.png", 0)])
    page = Page(explorer, evil)
    seen, *_ = page.begin(explorer.samples[0])
    said = [page.heading(), page.sample_buttons()]
    for kind in explorer.kinds:
        said += page.map(seen, kind, 0, 0.85, 0.1, True, (0.1, 0.1, 0.5, 0.5), (0.3, 0.3))
        if kind != "prior":
            said.append(page.contrast(seen, kind, 0, 1))
    said += page.erase(seen, explorer.kinds[0], 0, 5, 12, [[(0.1, 0.1), (0.2, 0.3)]])
    said += [page.beside(seen, 0, [explorer.kinds[0], f"model {evil}"]), page.batch_of_samples("error")[1]]
    assert all(isinstance(text, str) for text in said)
    assert not [text for text in said if "<img src=x" in text]
    assert sum("&lt;img src=x" in text for text in said) > len(explorer.kinds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"port": 70000}, "port is 70000"),
        ({"max_upload_mb": 0}, "max_upload_mb is 0"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_serve_refuses_before_work_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        serve(**{"model": "m"} | options)


def test_serve_says_before_it_loads_a_model_that_a_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CalmError, match=rf"cannot serve on 127\.0\.0\.1, port {port}: Address already in use"):
            serve(model="nowhere", port=port)
    with pytest.raises(CalmError, match=r"cannot serve on 192\.0\.2\.1, port any"):
        serve(model="nowhere", host="192.0.2.1")


# --- the page in a browser ----------------------------------------------------------------------------------


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    without = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
    marked: Callable[..., None] = needs_gradio(without(test))
    return marked


@pytest.fixture(scope="module")
def shown(explorer: Explorer) -> Explorer:
    if run := os.environ.get("CALM_APP_RUN"):
        return make_explorer(run, Path(os.environ["CALM_APP_DATA"]), [], 12, "cpu")
    return explorer


@pytest.fixture(scope="module")
def served(shown: Explorer) -> Iterator[tuple[str, Any]]:
    title = Path(os.environ.get("CALM_APP_RUN", "a tiny model")).name
    with running(shown, title, host="127.0.0.1", port=None, max_upload_mb=1) as url_and_page:
        yield url_and_page


@pytest.fixture(scope="module")
def address(served: tuple[str, Any]) -> str:
    return served[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Iterator[Any]:
    """One visitor's page, on which the tests below work one after the other."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.goto(address)
    page.locator(".calm-samples button").first.wait_for()
    yield page
    if file := os.environ.get("CALM_APP_PICTURE"):
        take_picture(page, Path(file))
    context.close()


def take_picture(page: Any, file: Path) -> None:
    """Save a small picture of the page with a map, a rectangle and a place."""
    page.get_by_role("tab", name="Map").click()
    page.locator(".calm-samples button").first.click()
    page.wait_for_timeout(1000)
    drag(page, "#calm-look", (0.45, 0.1), (0.85, 0.5))
    page.wait_for_timeout(1000)
    page.screenshot(path=file)
    with Image.open(file) as image:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(file, optimize=True)


def drag(page: Any, where: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    box = page.locator(f"{where} .calm-view").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()


def text_matching(page: Any, where: str, pattern: str) -> re.Match[str]:
    """Wait until an element's text has a pattern."""
    page.wait_for_function(
        "([where, pattern]) => new RegExp(pattern).test(document.querySelector(where)?.innerText ?? '')",
        arg=[where, pattern],
        timeout=30_000,
    )
    found = re.search(pattern, page.locator(where).inner_text())
    assert found is not None
    return found


def source_of(page: Any, where: str) -> str:
    return str(page.locator(f"{where} img").first.get_attribute("src"))


def changed_source(page: Any, where: str, before: str) -> str:
    """Wait until the picture of an element is another one."""
    page.wait_for_function(
        "([where, before]) => (document.querySelector(`${where} img`)?.src ?? before) !== before",
        arg=[where, before],
        timeout=30_000,
    )
    return source_of(page, where)


@needs_browser
def test_page_shows_an_uploaded_picture_and_forgets_the_file(page: Any, shown: Explorer, pictures: list[Path]) -> None:
    page.set_input_files("input[type=file] >> nth=0", pictures[1])
    seen = shown.see(Sample(pictures[1], "b.png"))
    best = seen.top(1)[0]
    total = text_matching(page, "#calm-says", r"anywhere \| x\) = (\d\.\d+)")[1]
    assert total == f"{seen.probs[best]:.3f}"
    decoded = Path(os.environ["GRADIO_TEMP_DIR"]) / "decoded.png"
    decoded.write_bytes(b64decode(source_of(page, "#calm-look").partition(",")[2]))
    np.testing.assert_array_equal(read_image(decoded), shown.read(seen, shown.kinds[0], best).draw())
    decoded.unlink()
    files = [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()]
    assert not sum(path.stat().st_size for path in files), "Gradio leaves an empty file of each upload"


@needs_browser
def test_page_sums_the_grid_in_a_rectangle(page: Any, shown: Explorer, pictures: list[Path]) -> None:
    drag(page, "#calm-look", (0.2, 0.1), (0.7, 0.8))
    inside, total, uniform = text_matching(
        page, "#calm-says", r"in here \| x\) = (\S+), of (\S+) in all; a uniform map would have (\S+) in"
    ).groups()
    style = page.locator("#calm-look .calm-rect").get_attribute("style")
    left, top, width, height = (float(value) / 100 for value in re.findall(r"([\d.]+)%", style))
    assert (left, top, width, height) == pytest.approx((0.2, 0.1, 0.5, 0.7), abs=0.01)
    reading = shown.read(seen := shown.see(Sample(pictures[1], "b")), "joint", seen.top(1)[0])
    expected = oracle_mass(reading.grid.double().numpy(), (left, top, left + width, top + height))
    assert float(inside) == pytest.approx(expected, abs=6e-4)
    assert float(uniform) == pytest.approx(float(total) * width * height, abs=1e-3)


@needs_browser
def test_page_switches_kind_class_and_place(page: Any) -> None:
    before = source_of(page, "#calm-look")
    page.get_by_role("radio", name="prior", exact=True).check()
    before = changed_source(page, "#calm-look", before)
    text_matching(page, "#calm-says", r"p\(the cue is in here \| x\)")
    page.get_by_role("radio", name="evidence", exact=True).check()
    before = changed_source(page, "#calm-look", before)
    text_matching(page, "#calm-says", "against")
    page.get_by_role("radio", name="joint", exact=True).check()
    before = changed_source(page, "#calm-look", before)
    first = text_matching(page, "#calm-says", r"of (\S+) in all")[1]
    page.locator("fieldset", has_text="Most probable").get_by_role("radio").nth(1).check()
    changed_source(page, "#calm-look", before)
    assert float(text_matching(page, "#calm-says", r"of (\S+) in all")[1]) < float(first)
    page.locator("#calm-look .calm-view").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    cell = text_matching(page, "#calm-says", r"p\(y \| x, z\) in the cell of row (\d+), column (\d+)")
    assert int(cell[1]) > 1
    assert page.locator("#calm-says .calm-bars tr").count() >= 2
    assert page.evaluate("document.activeElement.className") == "calm-view", "the next key goes there too"


@needs_browser
def test_page_compares_two_classes(page: Any) -> None:
    page.get_by_role("tab", name="Why not").click()
    text_matching(page, "#calm-pair", r"In all [+-]\d+\.\d+ nats")
    sums = [float(value) for value in re.findall(r": (\d+\.\d+) nats", page.locator("#calm-pair").inner_text())]
    whole = float(text_matching(page, "#calm-pair", r"In all ([+-]\S+) nats")[1])
    assert sums[0] - sums[1] == pytest.approx(whole, abs=2e-3)
    before = source_of(page, "#calm-pair")
    page.get_by_role("radio", name="joint", exact=True).check()
    changed_source(page, "#calm-pair", before)


@needs_browser
def test_page_erases_by_paint(page: Any) -> None:
    page.get_by_role("tab", name="Erase").click()
    text_matching(page, "#calm-left", r"^0\.0% of the pixels")
    before = source_of(page, "#calm-wiped")
    drag(page, "#calm-wiped", (0.2, 0.5), (0.8, 0.5))
    changed_source(page, "#calm-wiped", before)
    share = float(text_matching(page, "#calm-left", r"^([1-9]\S*)% of the pixels")[1])
    assert 3 < share < 30
    page.get_by_role("button", name="Remove the paint").click()
    text_matching(page, "#calm-left", r"^0\.0% of the pixels")


@needs_browser
def test_page_shows_methods_and_a_batch(page: Any, shown: Explorer) -> None:
    page.get_by_role("tab", name="Methods").click()
    page.get_by_role("button", name="Draw").click()
    page.locator("#calm-several figure").nth(2).wait_for()
    page.get_by_role("tab", name="Batch").click()
    page.get_by_role("button", name="samples").click()
    page.locator("#calm-batch tr").nth(len(shown.samples)).wait_for()
    page.get_by_role("radio", name="error").check()
    rows, _ = shown.batch(shown.samples)
    first = in_order(rows, "error")[0].record["file"]
    page.wait_for_function(
        "name => document.querySelector('#calm-batch tr:nth-child(2)').innerText.includes(name)", arg=first
    )
    page.locator("#calm-batch button").first.click()
    page.wait_for_function("name => document.querySelector('#calm-look img').alt.includes(name)", arg=first)
    page.locator("#calm-look .calm-view").wait_for()  # which waits until it is visible: the tab has changed


@needs_browser
def test_page_says_what_is_wrong_with_an_upload(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Map").click()
    (tmp_path / "broken.jpg").write_bytes(b"<b>no</b> picture")
    (tmp_path / "large.png").write_bytes(bytes(2**20 + 1))
    for name, message in (("broken.jpg", "cannot read image broken.jpg"), ("large.png", "exceed the maximum")):
        page.set_input_files("input[type=file] >> nth=0", tmp_path / name)
        page.locator(".toast-body", has_text=message).wait_for()
        assert "Traceback" not in page.locator(".toast-body").first.inner_text()
        page.locator(".toast-close").first.click()
    assert page.locator("#calm-look .calm-view").count() == 1, "the last good picture is still there"


@needs_browser
def test_another_visitor_sees_nothing_of_the_first_and_is_forgotten(
    page: Any, browser: Any, served: tuple[str, Any]
) -> None:
    address, sessions = served[0], served[1].state_holder.session_data
    before = set(sessions)
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    other = context.new_page()
    outside: list[str] = []
    other.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    other.goto(address)
    other.locator(".calm-samples button").first.wait_for()
    other.locator("#calm-look .calm-empty").wait_for()
    assert other.locator("#calm-look img").count() == 0
    assert other.locator("#calm-files a").count() == 0
    other.locator(".calm-samples button").first.tap()
    other.locator("#calm-look .calm-view").wait_for()
    assert source_of(other, "#calm-look") != source_of(page, "#calm-look")
    assert other.evaluate("document.documentElement.scrollWidth") <= 390, "a phone does not scroll sideways"
    assert not outside, "nothing is loaded from elsewhere"
    (session,) = set(sessions) - before
    context.close()
    deadline = time.monotonic() + 20
    while session in sessions and time.monotonic() < deadline:
        time.sleep(0.1)
    assert session not in sessions
    assert before <= set(sessions)
