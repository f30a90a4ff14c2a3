"""``calm attribute``: explain image files, write overlays and maps, and print what the model considered."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from calm.config import Precision, parse_code
from calm.errors import CalmError
from calm.files import ahead, atomic_path, check_writable, write_bytes
from calm.report.attributions import collected, print_explanation, record_of, thumbnail, write_gallery, write_results

# What a function needs of the rest is imported in it, so that the help page need not wait for PyTorch.
if TYPE_CHECKING:
    from jaxtyping import Float
    from rich.console import Console
    from torch import Tensor

    from calm.explain import Answer, Explanation, Query
    from calm.images import Preprocessing
    from calm.model import CalmModel
    from calm.render import Picture

BATCH_BYTES = 3 * 2**26  # bytes of decoded pictures above which a batch is explained before it has its full number;
# as many are read ahead, and as many, with their maps, wait to be written
MOST_THREADS = 16  # that read, draw and write


def attribute_files(
    images: list[str],
    *,
    model: str,
    target: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    superclass: str | None = None,
    versus: str | None = None,
    signed: bool | None = None,
    prior_exponent: float = 1.0,
    out: Path = Path("attributions"),
    grid: bool = False,
    plain: bool = False,
    html: bool = False,
    overwrite: bool = False,
    batch_size: int = 16,
    device: str = "auto",
    precision: Precision = "32-true",
) -> Path:
    """Show where a model saw the evidence: overlay pictures, raw maps, and the classes it considered.

    For each image NAME it writes NAME.KIND.png and NAME.KIND.npy, and at the end results.json. The first is the
    overlay, with a ring at the map's peak: of the size of the picture, enlarged if that is small, shrunk to 4
    megapixels if it is larger; below it are the scale of the colours, the class and its probability, and the
    predicted class if that is another. The second is the map: float32, at the size of the image, in its own unit
    and not normalised. A value of a joint map is p(y, z | x), the probability of one cell of the model's grid;
    resized to the image it keeps that unit, so it is the map of --grid, not the resized one, that sums to p(y | x).

    The colours of CALM's maps are multiples of uniform, the value of a map that knows nothing of the place, and
    end at 4 or, if that is higher, at the map's peak: so a flat map looks flat. Other methods have no such unit;
    their maps are stretched to their own range, which the scale names.

    Earlier results are kept: where a file has the name already, the new ones are NAME-2.KIND.png and so on, and
    results-2.json. Pictures are turned upright as their EXIF data says.

    Args:
        images: image files, folders (searched at all depths) and patterns such as 'photos/*.jpg'.
        model: a run folder of calm train, a saved model, or a hub id.
        target: the class to explain, by name or index. Default: the most probable one in each image.
        kind: which of the model's own maps: joint, posterior, prior, ... for CALM; cam, ... for CAM; and, with
            --versus, evidence, whose differences add up to the expected log-odds of the two classes, in nats.
            Default: joint or cam.
        method: instead of a kind, any attribution method: integrated-gradients, smoothgrad, gradcam, ...
        superclass: names or indices of classes with commas between them, to ask for their sum.
        versus: a second class: the map becomes the absolute difference, why the target and not this class; in
            the overlay red speaks for the target, blue for the other.
        signed: write the map of --versus with its sign: above 0 for the target, below 0 for the other. Default: true
            for evidence, false for other methods.
        prior_exponent: read CALM's maps with the prior raised to this power, normalised: below 1, more of the
            places that recognise the class show. The predictions stay as they are.
        out: folder for the results. Inputs are never overwritten.
        grid: also write the map on the model's own grid, NAME.KIND.grid.npy.
        plain: overlays without scale, class and probability below them.
        html: also write gallery.html, a page of all pictures with their maps, to sort and filter, with small pictures
            for it, NAME.KIND.thumb.jpg. Pictures in folders that are called like classes are compared with these.
        overwrite: replace earlier results of the same names instead of numbering the new ones.
        batch_size: images in one pass through the model; fewer if they are very large.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.
        precision: of predictions and the model's own maps: 32-true (float32) or bf16-mixed (bfloat16), which is
            faster on GPUs and on processors that compute it, and changes them a little; other methods keep float32.

    Returns:
        The file results.json, or results-2.json, ...

    Raises:
        CalmError: a wrong option, before anything is written; or, after all others were done, images that
            could not be read, named.
    """
    from rich.console import Console

    from calm.baselines import BASELINES
    from calm.explain import complete, draw, resolve_query

    if batch_size < 1:
        raise CalmError(f"batch size must be at least 1, got {batch_size}")
    inputs, missing = find_images(images, out)
    loaded = _load(model, device)
    query = resolve_query(
        loaded,
        target=target,
        kind=kind,
        method=method,
        superclass=superclass,
        versus=versus,
        signed=signed,
        prior_exponent=prior_exponent,
    )
    if grid and query.method in BASELINES:
        raise CalmError(f"method {query.method!r} has no grid: leave out --grid, or choose a kind of the model")
    label = query.method + "-signed" * query.signed + ("" if query.versus is None else "-difference")
    suffixes = {"overlay": f".{label}.png", "map": f".{label}.npy"}
    if grid:
        suffixes["grid"] = f".{label}.grid.npy"
    if html:
        suffixes["thumbnail"] = f".{label}.thumb.jpg"
    names = _result_names(inputs, out, suffixes, overwrite)
    check_writable(out)
    console = Console(soft_wrap=True)
    failed = [{"file": name, "error": f"no image in {name!r}"} for name in missing]
    classes = loaded.class_names
    label_of = {name: index for index, name in enumerate(classes)}.get

    def write(item: tuple[_Input, Answer]) -> tuple[Path, Explanation, dict[str, str]]:
        source, answer = item
        explanation = complete(answer, source.size, query)
        shown = loaded.preprocessing.picture(source.picture)
        drawn = draw(
            shown, explanation, query, () if plain else classes, label=label_of(source.path.resolve().parent.name)
        )
        files = _write(out, names[source.path], shown, drawn, explanation, suffixes)
        return source.path, explanation, files

    with collected() as done, _threads() as pool, _progress(console, len(inputs)) as advance:
        queue = partial(ahead, pool, depth=batch_size + MOST_THREADS, limit=BATCH_BYTES)
        read = queue(partial(_read, loaded.preprocessing), inputs, size=partial(_bytes, loaded.preprocessing.channels))
        workers = _networks(loaded, query) if len(inputs) > batch_size else 0
        batches = _batches(read, batch_size // max(1, workers) or 1, failed)
        explain = partial(_explain, loaded, query, precision, loaded.optimized_for_inference() if workers else None)
        answers = chain.from_iterable(
            queue(explain, batches, depth=workers + 1, size=lambda batch: sum(one.picture.size for one in batch))
            if workers > 1
            else map(explain, batches)
        )
        # Beside picture, map and its file are in memory while one is written.
        for path, explanation, files in queue(write, answers, size=lambda item: 4 * item[0].picture.size):
            about = path, explanation, query, classes, label_of(path.resolve().parent.name)
            done.append(record_of(*about) | {"files": files})
            print_explanation(console, *about)
            advance()
        how = {"model": model, "method": query.method, "signed": query.signed, "prior_exponent": query.prior_exponent}
        how |= {} if precision == "32-true" else {"precision": precision}
        how |= {"caution": loaded.caution} if loaded.caution else {}
        results = out / _free("results.json", out, overwrite)
        write_results(results, how, done, failed)
        console.print(f"{done.count} explained, written to {out}", markup=False, highlight=False)
        if html:
            page = write_gallery(out / _free("gallery.html", out, overwrite), how, done, classes)
            console.print(f"open {page} in a browser", markup=False, highlight=False)
    if loaded.caution:
        console.print(f"Note of this model: {loaded.caution}", markup=False, highlight=False)
    if failed:
        errors = "\n".join(f"  {failure['error']}" for failure in failed)
        raise CalmError(f"{len(failed)} of {len(failed) + done.count} images could not be explained:\n{errors}")
    return results


def _load(source: str, device: str) -> CalmModel:
    from calm.inference import resolve_device
    from calm.model import load

    place = resolve_device(device)  # before the model is read, which may take a while
    return load(source, map_location="cpu").to(place).eval()


def find_images(entries: Sequence[str], out: Path) -> tuple[dict[Path, str], list[str]]:
    """Find the images that the entries of a command line name.

    Args:
        entries: image files; folders, searched at all depths for files with an image's suffix; patterns with ``*``,
            ``?``, ``[...]`` or ``**``.
        out: folder of the results: images in it are passed over, unless they are named one by one.

    Returns:
        The images, each once and in the order named (folders and patterns sorted), each with the name, a relative path
        without suffix, that its results would like to have; and the entries without an image.

    Raises:
        CalmError: no image at all, a name that is not UTF-8 text, or ``out`` is a loop of links.
    """
    from calm.data.records import is_text

    try:
        out = out.resolve()
    except (OSError, RuntimeError) as error:
        raise CalmError(f"cannot write to {out}: {error}") from error
    matches = {entry: list(_matches(entry, out)) for entry in entries}
    found: dict[Path, tuple[Path, str]] = {}
    for path, name in chain(*matches.values()):
        if not is_text(str(path)):
            raise CalmError(f"the name of {str(path)!r} is not UTF-8 text: rename it")
        found.setdefault(path.resolve(), (path, name))
    if not found:
        from calm.data.loading import SUFFIXES

        listed = ", ".join(map(repr, entries)) or "an empty list"
        fix = "give image files, folders of them, or patterns in quotes"
        if any(map(os.path.isdir, entries)):
            fix = f"files are read that end in {' '.join(sorted(SUFFIXES))}; turn others into JPEG or PNG"
        raise CalmError(f"no image found in {listed}: {fix}")
    return dict(found.values()), [entry for entry, images in matches.items() if not images]


def _matches(entry: str, out: Path) -> Iterator[tuple[Path, str]]:
    """Yield the image files of an entry, each with the name that its results would like to have."""
    path = Path(entry)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a name that no file can have
        return
    if is_file:
        yield path, path.stem
    elif is_folder:
        from calm.data.loading import files_below

        for file in sorted(files_below(path)):
            if _is_image(file, path, out):
                yield file, file.relative_to(path).with_suffix("").as_posix()
    else:
        for match in sorted(glob.glob(entry, recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute pattern)
            if _is_image(Path(match), Path(match).parent, out):
                yield Path(match), Path(match).stem


def _is_image(file: Path, folder: Path, out: Path) -> bool:
    from calm.data.loading import is_image

    return is_image(file, folder) and file.is_file() and not file.resolve().is_relative_to(out)


def _numbered(name: str, taken: Callable[[str], bool]) -> str:
    """Return ``name``, or name-2, name-3, ... if it is taken."""
    return next(word for word in chain([name], (f"{name}-{n}" for n in count(2))) if not taken(word))


def _free(name: str, out: Path, overwrite: bool) -> str:
    """Return a file's name, or with -2, -3, ... in it if it is taken in ``out`` and may not be overwritten."""
    stem, _, suffix = name.partition(".")
    return f"{_numbered(stem, lambda stem: not overwrite and (out / f'{stem}.{suffix}').exists())}.{suffix}"


def _result_names(
    inputs: Mapping[Path, str], out: Path, suffixes: Mapping[str, str], overwrite: bool
) -> dict[Path, str]:
    """Return the name of each image's results, which is unique, in any case, in this call and, unless they may be
    overwritten, among the files in ``out``; a `CalmError` if an input would be overwritten."""
    if out.exists() and not out.is_dir():
        raise CalmError(f"--out {out} is a file: name a folder")
    sources = {path.resolve() for path in inputs}
    names: dict[Path, str] = {}
    used: set[str] = set()  # without case, which not every file system tells apart

    def taken(name: str) -> bool:
        there = any((out / (name + suffix)).exists() for suffix in suffixes.values())
        return name.casefold() in used or (there and not overwrite)

    for path, wanted in inputs.items():
        names[path] = _numbered(wanted, taken)
        used.add(names[path].casefold())
        for suffix in suffixes.values():
            if (written := (out / (names[path] + suffix)).resolve()) in sources:
                raise CalmError(f"the result for {path} would overwrite the input {written}: choose another --out")
    return names


class _Input(NamedTuple):
    """A picture that was read, and the model's input of it."""

    path: Path
    picture: Picture
    image: Float[Tensor, "c H W"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.picture.shape[0], self.picture.shape[1]


def _read(preprocessing: Preprocessing, path: Path) -> _Input | tuple[Path, CalmError]:
    """Read a picture and resize it for the model; return the error of an unreadable one."""
    try:
        picture = preprocessing.read(path)
        return _Input(path, picture, preprocessing.one(picture))
    except CalmError as error:
        return path, error


def _bytes(channels: int, path: Path) -> int:
    """Return the size in bytes of a decoded picture by the file's header, or of the file where that says nothing."""
    from calm.images import image_size

    width, height = image_size(path) or (0, 0)
    return width * height * channels or (path.stat().st_size if path.is_file() else 0)


def _batches(
    inputs: Iterable[_Input | tuple[Path, CalmError]], batch_size: int, failed: list[dict[str, str]]
) -> Iterator[list[_Input]]:
    """Collect pictures in batches, smaller ones if the pictures are large; append unreadable ones to ``failed``."""
    batch: list[_Input] = []
    for one in inputs:
        if isinstance(one, _Input):
            batch.append(one)
        else:
            failed.append({"file": str(one[0]), "error": str(one[1])})
        if len(batch) == batch_size or sum(each.picture.size for each in batch) > BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _networks(model: CalmModel, query: Query) -> int:
    """Return how many threads may each run the network on a part of a batch: one core does more of the work than its
    share of all cores that wait for each other. Only networks that are known to keep nothing between calls; the other
    methods' hooks and gradients, and the user's own code, take a batch at a time."""
    import torch

    from calm.baselines import BASELINES

    alone = model.device.type != "cpu" or query.method in BASELINES or parse_code(model.config.backbone)
    return 1 if alone else min(MOST_THREADS, torch.get_num_threads())


def _explain(
    model: CalmModel, query: Query, precision: Precision, predictor: CalmModel | None, batch: list[_Input]
) -> list[tuple[_Input, Answer]]:
    """Return the pictures of a batch, each with the model's answer."""
    import torch

    from calm.explain import answer

    images = torch.stack([each.image for each in batch]).to(model.device)
    return list(zip(batch, answer(model, images, query, predictor=predictor, precision=precision), strict=True))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Run the block with threads that read, draw and write beside the network; an error stops what has not begun."""
    import torch

    threads = torch.get_num_threads()
    # In each, PyTorch computes alone, as in the thread of its DataLoader: the setting is one of the thread.
    pool = ThreadPoolExecutor(min(MOST_THREADS, threads), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads to come, which take the number that was set last


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar below the answers, if they are printed to a terminal, or else on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = console if console.is_terminal else Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=total < 20 or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _write(
    out: Path, name: str, picture: Picture, drawn: Picture, explanation: Explanation, suffixes: dict[str, str]
) -> dict[str, str]:
    """Write the files of one image, ``drawn`` its overlay; return the path in ``out`` of each."""
    import numpy as np

    from calm.explain import drawn_size
    from calm.render import encode_png

    for what, suffix in suffixes.items():
        if what == "overlay":
            with atomic_path(out / (name + suffix)) as temporary:
                temporary.write_bytes(encode_png(drawn))
        elif what == "thumbnail":
            write_bytes(out / (name + suffix), thumbnail(picture, drawn[: drawn_size(*explanation.size)[0]]))
        else:  # in memory first, since numpy.save does not say why a disk cannot be written
            file = io.BytesIO()
            np.save(file, (explanation.values if what == "map" else explanation.grid).float().numpy())
            write_bytes(out / (name + suffix), file.getbuffer())
    return {what: name + suffix for what, suffix in suffixes.items()}
