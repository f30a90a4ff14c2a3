"""What the fuzz suites share: damaged files, and what a reader may do with one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings, strategies as st
from stress_counts import FULL, count

from calm.errors import CalmError

T = TypeVar("T")

SECONDS = 5.0
"""No case may take longer, of the processor's time: other work on the machine does not count."""

LONGEST_MESSAGE = 20_000
"""Characters of an error: a message does not repeat a whole file."""


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


class Marker:
    """Its pickle, loaded without care, creates the empty file ``path``: a harmless sign that code in a file was run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mknod, (str(self.path),))
