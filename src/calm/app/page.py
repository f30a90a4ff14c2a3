"""The explorer's page: Gradio components, and what happens when they are used.

There are no files of results on the server (see `calm.app.markup`), and an uploaded file is deleted when it is read.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from calm.app.markup import Place, bars, download, downloads, figure, scale, sentence, uri, view
from calm.app.session import DECADES, Explorer, Order, Rectangle, Row, Sample, Seen, in_order, painted, top_pixels
from calm.errors import CalmError
from calm.explain import drawn_size
from calm.output import MAP_KINDS
from calm.render import resize_picture

HERE = Path(__file__).parent
IDLE = 3600  # seconds after which a visitor's picture is forgotten, also in an open tab
EMPTY = '<div class="calm-empty">Drop a picture, pick a file, or choose a sample.</div>'


def friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Make a handler show every error as a message on the page; what is no fault of the visitor's is logged."""

    @wraps(handler)
    def safe(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except CalmError as error:
            raise gr.Error(escape(str(error)), title="That did not work", print_exception=False) from error
        except torch.OutOfMemoryError as error:
            text = "The device has no memory left for this. Try fewer pictures or methods, or later."
            raise gr.Error(text, title="Out of memory", print_exception=False) from error
        except Exception as error:
            logging.getLogger(__name__).exception("the explorer failed")
            text = "The server logged what happened. Please try something else."
            raise gr.Error(text, title="Something failed here", print_exception=False) from error

    return safe


class Page:
    """The handlers of the page, one for each thing that a visitor can do; `build` wires them to components."""

    def __init__(self, explorer: Explorer, title: str) -> None:
        self.explorer, self.title = explorer, title
        self.names = explorer.names
        self.choices = [(name, index) for index, name in enumerate(self.names)]

    def upload(self, file: str | None) -> tuple[Any, ...]:
        """See an uploaded picture, and delete the file."""
        if file is None:
            raise CalmError("no file arrived: upload it again")
        path = Path(file)
        try:
            return self.begin(Sample(path, path.name))
        finally:
            forget(path)

    def pick(self, event: gr.EventData) -> tuple[Any, ...]:
        """See a sample."""
        index = event._data.get("index")
        if not isinstance(index, int) or not 0 <= index < len(self.explorer.samples):
            raise CalmError("there is no such sample")
        return self.begin(self.explorer.samples[index])

    def begin(self, sample: Sample) -> tuple[Any, ...]:
        """Return a new picture, the components that choose its classes, and an empty region, place and paint."""
        seen = self.explorer.see(sample)
        best, *others = seen.top()
        top = [(f"{self.names[c]}  {seen.probs[c]:.3f}", c) for c in (best, *others)]
        return seen, gr.Radio(choices=top, value=best), best, seen.rival(best), None, None, [], None

    def choose(self, seen: Seen | None, target: int, versus: int) -> tuple[int, int]:
        """Return the class to explain, and another one to compare it with."""
        return target, versus if seen is None or versus != target else seen.rival(target)

    def point(self, event: gr.EventData) -> Place:
        """Return the place of a click."""
        x, y = shares(event, "x", "y")
        return x, y

    def frame(self, event: gr.EventData) -> Rectangle:
        """Return the rectangle that was drawn."""
        left, top, right, bottom = shares(event, "x0", "y0", "x1", "y1")
        if not (left < right and top < bottom):
            raise CalmError("that rectangle is empty: draw a larger one")
        return left, top, right, bottom

    def map(
        self,
        seen: Seen | None,
        kind: str,
        target: int,
        opacity: float,
        threshold: float,
        log: bool,
        region: Rectangle | None,
        place: Place | None,
    ) -> tuple[str, str, str]:
        """Return the picture with a map, what is said of it, and the downloads."""
        if seen is None:
            return EMPTY, "", ""
        reading = self.explorer.read(seen, kind, target)
        drawn = reading.draw(opacity=opacity, threshold=threshold, log=log)
        says = [scale(reading, self.names, log), sentence(reading, self.names, region)]
        if seen.label is not None:
            says.append(f"<p>The true class is {escape(self.names[seen.label])}.</p>")
        if place is not None:
            (row, column), probs = self.explorer.classes_at(seen, *place)
            best = probs.topk(min(5, len(probs))).indices.tolist()
            classes = dict.fromkeys([*best, target])
            what = "p(y | x, z)" if "joint" in self.explorer.kinds else "softmax of the class scores"
            heading = f"<h4>{what} in the cell of row {row + 1}, column {column + 1}</h4>"
            says.append(heading + bars([(self.names[c], float(probs[c]), c == target) for c in classes]))
        alt = f"{kind} map of {self.names[target]} over {seen.name}"
        return (
            view(drawn, alt, reading.grid.shape, region=region, place=place),
            "".join(says),
            downloads(drawn, reading, self.names, region),
        )

    def contrast(self, seen: Seen | None, kind: str, target: int, versus: int) -> str:
        """Return the difference map of two classes, and the regions that speak for each."""
        if seen is None:
            return EMPTY
        reading = self.explorer.read(seen, kind, target, versus)
        first, second = self.names[target], self.names[versus]
        unit = " nats" if kind == "evidence" else ""
        likely = max(float(seen.probs[target]), float(seen.probs[versus]))
        lists = ""
        for name, ninths in ((first, reading.ninths()), (second, reading.ninths(-1))):
            regions = [(words, value) for words, value in ninths if value > 0]
            total = sum(value for _, value in regions)
            heading = f"<h4>Speaks for {escape(name)}: {total:.3f}{unit}</h4>"
            rows = bars([(words, value / total, False) for words, value in regions[:4]], [v for _, v in regions[:4]])
            lists += heading + (rows if regions else "<p>Nothing.</p>")
        note = f"<p>Neither class is likely: p is at most {likely:.3f}.</p>" if likely < 0.1 else ""
        alt = f"{kind}: {first} (red) against {second} (blue)"
        picture = f'<div class="calm-view"><img alt="{escape(alt)}" src="{uri(reading.draw())}"></div>'
        whole = f"<p>In all {reading.total:+.3f}{unit}. Probabilities:</p>"
        both = ((first, target), (second, versus))
        probabilities = bars([(name, float(seen.probs[c]), c == target) for name, c in both])
        return picture + scale(reading, self.names) + note + whole + probabilities + lists

    def paint(self, strokes: list[list[Place]], event: gr.EventData) -> list[list[Place]]:
        """Return the strokes with another one."""
        points = event._data.get("points")
        if not isinstance(points, list) or not 0 < len(points) <= 10_000 or len(strokes) >= 100:
            raise CalmError("that is too much paint: start again")
        stroke = [(share(p[0]), share(p[1])) for p in points if isinstance(p, list) and len(p) == 2]
        return [*strokes, stroke] if stroke else strokes

    def erase(
        self, seen: Seen | None, kind: str, target: int, percent: float, brush: float, strokes: list[list[Place]]
    ) -> tuple[str, str]:
        """Return the picture without the top pixels of the map and those painted, and what the model says now."""
        if seen is None:
            return EMPTY, ""
        size = (seen.image.shape[-2], seen.image.shape[-1])
        mask = top_pixels(self.explorer.read(seen, kind, target), percent / 100)
        if strokes:
            mask = mask | painted(strokes, brush / 100, size)
        after = self.explorer.erase(seen, mask) if bool(mask.any()) else seen
        classes = dict.fromkeys([target, *seen.top(3), *after.top(3)])
        rows = "".join(
            f"<tr><td>{escape(self.names[c])}</td><td>{seen.probs[c]:.3f}</td><td>{after.probs[c]:.3f}</td>"
            f"<td>{after.probs[c] - seen.probs[c]:+.3f}</td></tr>"
            for c in classes
        )
        says = (
            f"<p>{float(mask.float().mean()):.1%} of the pixels are erased: they are 0 in the model's"
            f' input.</p><div class="calm-scroll"><table class="calm-table"><tr><th>class</th><th>p before</th>'
            f"<th>p after</th><th>change</th></tr>{rows}</table></div>"
        )
        shown = resize_picture(after.picture, drawn_size(seen.picture.shape[0], seen.picture.shape[1]))
        return view(shown, f"{seen.name}, partly erased", (1, 1), brush=brush), says

    def beside(self, seen: Seen | None, target: int, methods: list[str]) -> str:
        """Return the maps of several methods."""
        if seen is None:
            return EMPTY
        if not methods:
            raise CalmError("choose at least one method")
        figures = self.explorer.compare(seen, target, methods)
        heading = f"{escape(self.names[target])}, p = {seen.probs[target]:.3f}. Each is drawn to its own highest value."
        return f"<p>{heading}</p>" + '<div class="calm-figures">' + "".join(figure(*one) for one in figures) + "</div>"

    def batch(self, files: list[str] | None, order: Order) -> tuple[list[Row], str, None]:
        """See uploaded pictures, delete the files, and return the rows and their table."""
        paths = [Path(file) for file in files or ()]
        try:
            rows, errors = self.explorer.batch([Sample(path, path.name) for path in paths])
        finally:
            for path in paths:
                forget(path)
        for error in errors[:3]:
            gr.Warning(escape(error), title=f"{len(errors)} could not be read" if len(errors) > 1 else "Not read")
        return rows, self.table(rows, order), None

    def batch_of_samples(self, order: Order) -> tuple[list[Row], str]:
        """See all samples, and return the rows and their table."""
        rows, _ = self.explorer.batch(self.explorer.samples)
        return rows, self.table(rows, order)

    def table(self, rows: list[Row], order: Order) -> str:
        """Return the table of a batch, in an order, with a file of its numbers."""
        if not rows:
            return ""
        lines, known = [], any(row.record["label"] is not None for row in rows)
        for row in in_order(rows, order):
            record, target = row.record, row.record["target"]
            label = escape(record["label"] or "")
            label = f'<span class="calm-wrong">✗ {label}</span>' if record["wrong"] else label
            alt = escape(f"map of {target['name']} over {record['file']}")
            image = f'<img alt="{alt}" loading="lazy" src="{uri(row.picture)}">'
            cells = [
                image if row.sample is None else f'<button type="button" data-index="{row.sample}">{image}</button>',
                escape(record["file"]),
                escape(target["name"]),
                f"{target['probability']:.3f}",
                f"{record['doubt']:.2f}",
                *([label] if known else []),
            ]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        heads = ["map", "file", "predicted", "p(y | x)", "doubt", *(["true class"] if known else [])]
        head = "".join(f"<th>{one}</th>" for one in heads)
        content = json.dumps([row.record for row in in_order(rows, order)], indent=1).encode()
        return (
            f"<p>{len(rows)} pictures. Doubt is the entropy of p(y | x), at most 1. A click opens a sample.</p>"
            f'<div class="calm-scroll"><table class="calm-table"><tr>{head}</tr>{"".join(lines)}</table></div>'
            f'<p class="calm-downloads">{download("numbers (.json)", "batch.json", content, "application/json")}</p>'
        )

    def build(self) -> gr.Blocks:
        """Build the page."""
        explorer = self.explorer
        alone = [kind for kind in explorer.kinds if not MAP_KINDS[kind].compares]
        script = (HERE / "viewer.js").read_text(encoding="utf-8")
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        slow = {"api_visibility": "private"}
        with gr.Blocks(title=f"CALM: {self.title}", analytics_enabled=False, delete_cache=(60, IDLE)) as page:
            seen, rows = gr.State(time_to_live=IDLE), gr.State([], time_to_live=IDLE)
            region, place, strokes = gr.State(), gr.State(), gr.State([])
            gr.Markdown(self.heading())
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    file = gr.File(label="Picture", height=170)
                    if explorer.samples:
                        samples = gr.HTML(self.sample_buttons(), js_on_load=script)
                    top = gr.Radio([], label="Most probable classes, with p(y | x)")
                    target = gr.Dropdown(self.choices, value=0, label="Class to explain: any")
                with gr.Column(scale=5, min_width=320), gr.Tabs() as tabs:
                    with gr.Tab("Map", id="map"):
                        kind = gr.Radio(list(explorer.kinds), value=explorer.kinds[0], label="Map")
                        look = gr.HTML(EMPTY, js_on_load=script, elem_id="calm-look")
                        gr.Markdown(
                            "Draw a rectangle to sum the map in it; click a place for the classes there. Keys: arrows"
                            " move the place, Shift and arrows draw."
                        )
                        says = gr.HTML(elem_id="calm-says")
                        with gr.Row():
                            opacity = gr.Slider(0, 1, 0.85, step=0.05, label="Opacity")
                            threshold = gr.Slider(0, 1, 0, step=0.05, label="Hide below this share of the highest")
                            log = gr.Checkbox(label=f"Logarithmic colours ({DECADES} powers of ten)")
                        files = gr.HTML(elem_id="calm-files")
                    with gr.Tab("Why not that?"):
                        kinds = sorted(set(explorer.kinds) - {"prior"}, key=lambda k: not MAP_KINDS[k].compares)
                        pair_kind = gr.Radio(kinds, value=kinds[0], label="Compare by")
                        versus = gr.Dropdown(self.choices, value=0, label="Why the class to explain, and not")
                        pair = gr.HTML(EMPTY, elem_id="calm-pair")
                    with gr.Tab("Erase"):
                        gr.Markdown(
                            "Erase where the map is highest, or paint on the picture as the model sees it, and see what"
                            " is left."
                        )
                        with gr.Row():
                            order_kind = gr.Radio(alone, value=alone[0], label="By the map")
                            percent = gr.Slider(0, 100, 0, step=1, label="Erase the top percent of the pixels")
                            brush = gr.Slider(2, 40, 12, step=1, label="Width of the brush, percent")
                        wiped = gr.HTML(EMPTY, js_on_load=script, elem_id="calm-wiped")
                        clean = gr.Button("Remove the paint")
                        left = gr.HTML(elem_id="calm-left")
                    with gr.Tab("Methods"):
                        usual = [m for m in (*alone[:1], "gradcam", "gradient") if m in explorer.methods]
                        methods = gr.CheckboxGroup(
                            list(explorer.methods), value=[*usual, *explorer.others], label="Methods"
                        )
                        run = gr.Button("Draw", variant="primary")
                        several = gr.HTML(elem_id="calm-several")
                    with gr.Tab("Batch"):
                        many = gr.File(label="Pictures", file_count="multiple", height=170)
                        with gr.Row():
                            order = gr.Radio(["confidence", "doubt", "error"], value="confidence", label="Sort by")
                            if explorer.samples:
                                all_samples = gr.Button(f"Take the {len(explorer.samples)} samples")
                        listed = gr.HTML(js_on_load=script, elem_id="calm-batch")

            map_of, map_to = [seen, kind, target, opacity, threshold, log, region, place], [look, says, files]
            pair_of, erase_of = [seen, pair_kind, target, versus], [seen, order_kind, target, percent, brush, strokes]
            begun = [seen, top, target, versus, region, place, strokes, file]
            redraw, recompare, rewipe = friendly(self.map), friendly(self.contrast), friendly(self.erase)

            starts = [file.upload(friendly(self.upload), file, begun, **quiet)]
            if explorer.samples:
                starts.append(samples.pick(friendly(self.pick), None, begun, **quiet))
                starts.append(listed.pick(friendly(self.pick), None, begun, **quiet))
                starts[-1].success(lambda: gr.Tabs(selected="map"), None, tabs, **quiet)
                all_samples.click(friendly(self.batch_of_samples), order, [rows, listed], **slow)
            for start in starts:
                start.failure(lambda: None, None, file, **quiet)
                start.success(redraw, map_of, map_to, **quiet).success(recompare, pair_of, pair, **quiet).success(
                    rewipe, erase_of, [wiped, left], **quiet
                ).success(lambda: "", None, several, **quiet)
            chosen = top.input(friendly(self.choose), [seen, top, versus], [target, versus], **quiet)
            typed = target.input(friendly(self.choose), [seen, target, versus], [top, versus], **quiet)
            for change in (chosen, typed):
                change.success(redraw, map_of, map_to, **quiet)
                change.success(recompare, pair_of, pair, **quiet)
                change.success(rewipe, erase_of, [wiped, left], **quiet)
            pointed = look.place(friendly(self.point), None, place, **quiet)
            framed = look.region(friendly(self.frame), None, region, **quiet)
            for change in (pointed, framed):
                change.success(redraw, map_of, map_to, **quiet)
            gr.on([c.input for c in (kind, opacity, threshold, log)], redraw, map_of, map_to, **quiet)
            gr.on([pair_kind.input, versus.input], recompare, pair_of, pair, **quiet)
            gr.on([c.input for c in (order_kind, percent, brush)], rewipe, erase_of, [wiped, left], **quiet)
            wiped.stroke(friendly(self.paint), strokes, strokes, **quiet).success(
                rewipe, erase_of, [wiped, left], **quiet
            )
            clean.click(list, None, strokes, **quiet).success(rewipe, erase_of, [wiped, left], **quiet)
            run.click(friendly(self.beside), [seen, target, methods], several, **slow)
            many.upload(friendly(self.batch), [many, order], [rows, listed, many], **slow).failure(
                lambda: None, None, many, **quiet
            )
            order.input(friendly(self.table), [rows, order], listed, **quiet)

            def end(request: gr.Request) -> None:
                """Forget a visitor: Gradio itself would keep what it sent to a closed tab."""
                page.state_holder.session_data.pop(request.session_hash, None)

            page.unload(end)
        return page

    def heading(self) -> str:
        """Return the lines above everything, in Markdown."""
        model = self.explorer.model
        grid = " x ".join(map(str, model.preprocessing.size))
        caution = f"\n\n**Note of this model:** {escape(model.caution)}." if model.caution else ""
        config = model.config
        return (
            f"# {escape(self.title)}\n{config.title}, {escape(config.backbone)}, {config.num_classes} classes,"
            f" input {grid} pixels.{caution}"
        )

    def sample_buttons(self) -> str:
        """Return the samples as buttons."""
        buttons = []
        for index, sample in enumerate(self.explorer.samples):
            picture = self.explorer.thumbnail(sample)
            name = escape(sample.name)
            image = f'<img alt="{name}" title="{name}" src="{uri(picture)}">'
            buttons.append(f'<button type="button" data-index="{index}">{image}</button>')
        return f'<div class="calm-samples">{"".join(buttons)}</div>'


def theme() -> gr.Theme:
    """Return the look of the page, in the fonts of the visitor's system: nothing is loaded from elsewhere."""
    return gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))


def forget(upload: Path) -> None:
    """Delete an uploaded file, and the folder that was made for it unless another visitor's is in it."""
    upload.unlink(missing_ok=True)
    with suppress(OSError):
        upload.parent.rmdir()


def share(value: object) -> float:
    """Return a number that a browser sent, clamped to [0, 1]."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CalmError("the browser sent no place in the picture: try again")
    return min(1.0, max(0.0, float(value)))


def shares(event: gr.EventData, *names: str) -> list[float]:
    """Return numbers of an event by name, see `share`."""
    return [share(event._data.get(name)) for name in names]
