"""``calm app``: a page in the browser to explore what a model sees in pictures.

`calm.app.session` computes, `calm.app.page` shows. Gradio is imported when the page is made.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calm.errors import CalmError
from calm.files import read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from calm.app.session import Explorer, Sample
    from calm.model import CalmModel

MOST_SAMPLES = 48
MOST_VISITORS = 100  # whose pictures are kept at once: the one who has waited longest is forgotten


def serve(
    *,
    model: str,
    data: Path | None = None,
    beside: str | None = None,
    samples: int = 12,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    share: bool = False,
    max_upload_mb: int = 20,
    device: str = "auto",
) -> None:
    """Explore in a browser what a model sees: maps, regions, classes against each other, erasures, other methods.

    The page is served until Ctrl-C. Each visitor sees only their own pictures: uploads are deleted as soon as they are
    read, and what was computed of them is forgotten when the tab is closed.

    Args:
        model: a run folder of calm train, a saved model, or a hub id.
        data: a folder of pictures, in any layout that calm train reads, to take samples from: of its test split, evenly
            over the classes, or of all if it has no splits. Default: what the model was trained on, if it is there.
        beside: another model whose map is shown side by side, such as a CAM of the same classes.
        samples: how many pictures of the data, at most 48.
        host: the address to serve on. The default can be reached from this machine alone; 0.0.0.0 from others, all of
            whom may then use the model.
        port: the port; default: the first free one from 7860.
        open_browser: open the page in a browser.
        share: also serve the page to anyone who has its address, through a server of Gradio, for a week.
        max_upload_mb: largest file that is taken, in megabytes.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.

    Raises:
        CalmError: a wrong option, a model or data that cannot be read, or no free port.
    """
    if not 1 <= samples <= MOST_SAMPLES:
        raise CalmError(f"samples is {samples}: give 1 to {MOST_SAMPLES}")
    if max_upload_mb < 1:
        raise CalmError(f"max_upload_mb is {max_upload_mb}: give at least 1")
    if port is not None and not 1 <= port <= 65535:
        raise CalmError(f"port is {port}: give 1 to 65535")
    with socket.socket() as probe:  # Gradio would say it after the model is loaded, and at length
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise CalmError(f"cannot serve on {host}, port {port or 'any'}: {error.strerror or error}") from error
    explorer = make_explorer(model, data, [beside] if beside else [], samples, device)
    title = Path(model).resolve().name if Path(model).exists() else model
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as after Ctrl-C: the uploads are deleted
    with running(explorer, title, host=host, port=port, max_upload_mb=max_upload_mb, share=share) as (url, page):
        print(f"calm: serving {title} at {url}; Ctrl-C ends it", flush=True)
        if page.share_url:
            print(f"calm: and to everyone at {page.share_url}", flush=True)
        if open_browser:
            import webbrowser

            webbrowser.open(url)
        with suppress(KeyboardInterrupt):
            signal.pause()


def make_explorer(model: str, data: Path | None, beside: Sequence[str], samples: int, device: str) -> Explorer:
    """Load the models and find samples; see `serve`."""
    from calm.app.session import Explorer
    from calm.inference import resolve_device
    from calm.model import load

    place = resolve_device(device)
    loaded = load(model).to(place)
    others = {f"model {Path(name).name}": load(name).to(place) for name in beside}
    if len(others) < len(beside):
        raise CalmError("two models beside have the same name: copy or rename one of the folders")
    found: Sequence[Sample] = ()
    if data is not None:
        found = find_samples(data, loaded, samples)
    elif (own := trained_on(Path(model))) is not None:
        with suppress(CalmError):  # data that have moved or changed: nobody asked for them
            found = find_samples(own, loaded, samples)
    return Explorer(loaded, others, found)


def trained_on(model: Path) -> Path | None:
    """Return the folder of data that the run of a model names, if it has one and the folder is there."""
    for file in (model / "config.yaml", model.parent / "config.yaml"):
        if file.is_file():
            config = read_yaml(file, "configuration")
            data = config.get("data") if isinstance(config, dict) else None
            return Path(data) if isinstance(data, str) and Path(data).is_dir() else None
    return None


def find_samples(data: Path, model: CalmModel, count: int) -> list[Sample]:
    """Return pictures of a data set, evenly over the classes; labels only where model and data share class names."""
    from calm.app.session import Sample
    from calm.data.loading import has_splits, load_split

    split = load_split(data, "test" if has_splits(data) else "all", strict=False)
    index = {name: i for i, name in enumerate(model.class_names)}
    of_class: dict[int, list[Sample]] = {}
    for record in split.records:
        label = index.get(split.class_names[record.label])
        of_class.setdefault(record.label, []).append(Sample(record.path, record.path.name, label, split.exif))
    rounds = max(map(len, of_class.values()))
    in_turn = [group[turn] for turn in range(rounds) for group in of_class.values() if turn < len(group)]
    step = max(1, len(of_class) // count)  # classes are often sorted, and relatives are neighbours
    return (in_turn[: len(of_class)][::step] + in_turn[len(of_class) :])[:count]


@contextmanager
def running(
    explorer: Explorer, title: str, *, host: str, port: int | None, max_upload_mb: int, share: bool = False
) -> Iterator[tuple[str, Any]]:
    """Serve the page while the block runs: yield its address and the Gradio page.

    Raises:
        CalmError: No port is free.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    from calm.app.page import HERE, Page, theme

    with TemporaryDirectory(prefix="calm-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = Page(explorer, title).build()
        try:
            _, url, _ = page.queue(api_open=False).launch(
                server_name=host,
                server_port=port,
                share=share,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,  # else the browser keeps what was done, for whoever uses it next
                max_file_size=max_upload_mb * 2**20,
                ssr_mode=False,
                enable_monitoring=False,
                state_session_capacity=MOST_VISITORS,
                theme=theme(),
                css=(HERE / "page.css").read_text(encoding="utf-8"),
            )
        except (OSError, ValueError) as error:
            raise CalmError(f"cannot serve on {host}: {error}") from error
        try:
            yield url, page
        finally:
            page.close(verbose=False)
