"""What the fuzz suites share: damaged files, and what a reader may do with one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from stress_counts import FULL, count

from calm.errors import CalmError

T = TypeVar("T")

SECONDS = 5.0
"""No case may take longer, of the processor's time: other work on the machine does not count."""

LONGEST_MESSAGE = 20_000
"""Characters of an error: a message does not repeat a whole file."""

MEGABYTES = 1500
"""Address space that a reader may take beyond what the process had before, for files of a few kilobytes."""


def cases(reduced: int, full: int = 1000) -> settings:
    """So many examples: the same ones in every test run, new ones each time in full."""
    return settings(
        max_examples=count(reduced=reduced, full=full),
        derandomize=not FULL,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # a damaged file is not worth minutes of shrinking
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(read: Callable[[], T], *names: str) -> T | None:
    """What a reader returns, or None if it refuses: by CalmError, in few words, naming the file (one of ``names``), and
    soon. Any other exception fails the test by itself."""
    start, result, message = time.process_time(), None, ""
    try:
        result = read()
    except CalmError as error:
        message = str(error)
    assert time.process_time() - start < SECONDS
    assert len(message) < LONGEST_MESSAGE
    assert not message or any(name in message for name in names), f"names no file: {message}"
    return result


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` after one to four accidents: bits that flip, a cut, bytes lost, put in, zeroed or repeated."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        match draw(st.integers(0, 6)):
            case 0 if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = draw(st.binary(max_size=16))
            case 4:
                data[place : place + length] = bytes(len(data[place : place + length]))
            case 5:
                data[place:place] = data[place : place + length]
            case _:
                data[place : place + min(length, 8)] = b"\xff" * min(length, 8)
    return bytes(data)


@st.composite
def damaged_text(draw: st.DrawFn, whole: str, words: Sequence[str]) -> bytes:
    """A text file with some fields replaced by odd ones, lines lost, repeated or exchanged; then perhaps damaged."""
    lines = whole.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(lines) - 1)))
        match draw(st.integers(0, 4)):
            case 0 if lines:
                del lines[place]
            case 1 if lines:
                lines.insert(draw(st.integers(0, len(lines))), lines[place])
            case 2:
                lines.insert(place, draw(st.one_of(st.sampled_from(words), st.text(max_size=20))))
            case _ if lines:
                pieces = [piece for piece in lines[place].replace(",", " , ").split(" ") if piece]
                if pieces:
                    at = draw(st.integers(0, len(pieces) - 1))
                    pieces[at] = draw(st.sampled_from(words))
                lines[place] = " ".join(pieces).replace(" , ", ",")
            case _:
                pass
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data


class Canary:
    """A pickle of it that is loaded without care creates ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.path}'",))


def pickled_canary(path: Path) -> bytes:
    """A plain pickle that would create ``path``."""
    return pickle.dumps(Canary(path))


def in_child(
    tasks: Sequence[tuple[str, Path]], *, seconds: float = 300, megabytes: int = MEGABYTES
) -> list[dict[str, Any]]:
    """Let a process with so little memory beyond its own read files (see `_reader`): for each, "kind" (ok, CalmError,
    or another exception), "message", "seconds", and "megabytes", by which the largest use of memory grew."""
    command = [
        sys.executable,
        "-W",
        "error",
        __file__,
        json.dumps([(name, str(path)) for name, path in tasks]),
        str(megabytes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(tasks), (
        f"died at {tasks[len(results)]}: {done.returncode} {done.stderr[-2000:]}"
    )
    return results


def refused_cheaply(tasks: Sequence[tuple[str, Path]], megabytes: float = 400) -> None:
    """Assert that each file is refused by a CalmError that names it, soon, and in little memory."""
    for (reader, path), result in zip(tasks, in_child(tasks), strict=True):
        assert result["kind"] == "CalmError", (reader, path, result)
        assert path.name in result["message"], (reader, path, result)
        assert len(result["message"]) < LONGEST_MESSAGE
        assert result["seconds"] < SECONDS, (reader, path, result)
        assert result["megabytes"] < megabytes, (reader, path, result)


def _read_maps(path: Path) -> Any:
    from calm.data.records import Record, Split
    from calm.evaluate.subject import open_map_folder

    split = Split("test", (Record("a.jpg", Path("a.jpg"), 0),), ("x", "y"), Path())
    return open_map_folder(path.parent, split, size=(8, 8))


def _reader(name: str) -> Callable[[Path], Any]:
    """A reader of one file, imported only when asked for: some take seconds to import."""
    match name:
        case "image":
            from calm.images import read_rgb

            return read_rgb
        case "segmentation":
            from calm.data.cues import read_segmentation

            return read_segmentation
        case "part points":
            from calm.data.cues import read_part_points

            return lambda path: read_part_points(path.parent.parent)
        case "groups":
            from calm.data.cues import read_part_groups

            return lambda path: read_part_groups(path.parent.parent)
        case "labels":
            from calm.data.loading import load_splits

            return lambda path: load_splits(path.parents[2])
        case "maps":
            return _read_maps
        case "config":
            from calm.cli.train import parse

            return lambda path: parse(["--config", str(path)])
        case "model":
            from calm.model import load

            return lambda path: load(path.parent)
        case "attribute":
            import calm.explain
            from calm.cli.attribute import attribute_files

            assert calm.explain  # what takes seconds to import
            return lambda path: attribute_files(
                [str(path)], model=str(path.parent / "model"), out=path.parent / "out"
            )
        case "released":
            from calm.released import load_released

            return lambda path: load_released(path, method="cam", large_feature_map=True)
    raise KeyError(name)


def _main() -> None:
    tasks = [(_reader(name), Path(path)) for name, path in json.loads(sys.argv[1])]
    with open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = used + int(sys.argv[2]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for read, path in tasks:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        kind, message = "ok", ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                read(path)
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        record = {"kind": kind, "message": message, "seconds": seconds, "megabytes": grown}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    _main()
