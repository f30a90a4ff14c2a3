"""Read a file that ``torch.save`` wrote, and that nobody vouches for: nothing in it is run."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO

from calm.documents import open_regular
from calm.errors import CalmError

__all__ = ["read_torch"]

MOST_SHARED = 45
"""Times that a pickle may use a tuple again: no more than 3 ** 15 tuples in all come of so many."""

_OLD_PICKLES = 5
"""The format before the zip format: magic number, version, machine, content, keys of the storages."""


def read_torch(path: Path, what: str, *, map_location: Any = "cpu") -> Any:
    """Tensors and plain Python values of a file.

    Args:
        path: the file, in PyTorch's zip format or in the one before it.
        what: what it is, for messages.
        map_location: where the tensors go, as for ``torch.load``.

    Raises:
        CalmError: naming the file: it is missing, no file of PyTorch's, damaged (the zip format has checksums),
            compressed, or asks for anything but tensors and plain values.
    """
    import torch

    try:
        with open_regular(path, what) as file:
            start = file.read(256).lstrip().lower()
            if start.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
                raise CalmError(
                    f"{path} is a text page, not the file itself: download it again, and look at its size"
                )
            _check_pickles(file)
        return torch.load(path, map_location=map_location, weights_only=True)
    except CalmError:
        raise
    except OSError as error:
        raise CalmError(f"cannot read {what} {path}: {error}") from error
    except Exception as error:  # a damaged file can make the restricted unpickler fail in any way
        asked = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        why = (
            f"it asks for {asked[1]:.200}, which weights do not need"
            if asked
            else "it is damaged or no PyTorch file"
        )
        raise CalmError(
            f"{path} is not a checkpoint that can be read safely: {why}; nothing in it was run"
        ) from error


def _check_pickles(file: BinaryIO) -> None:
    """Look at the pickles before anything is made of them.

    Raises:
        ValueError: an archive with a wrong checksum, which PyTorch does not compare; one that would be larger unpacked
            than it is (PyTorch does not compress, but unpacks); more than `MOST_SHARED` uses of tuples made before.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(_OLD_PICKLES):
            _check_shared(file)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type for member in members):
            raise ValueError("compressed")
        if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
            raise ValueError("members that overlap")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} has a wrong checksum")
        for member in members:
            if member.filename.endswith(".pkl"):
                with archive.open(member) as pickled:
                    _check_shared(pickled)


def _check_shared(file: IO[bytes]) -> None:
    """Raise for a pickle that builds tuples of tuples of tuples, each from the last one twice: a few bytes more double
    the time to look one up in a dict. Optimisers share a tuple or two."""
    tuples: set[object] = set()
    made, uses, memorized = "", 0, 0
    for code, argument, _ in pickletools.genops(file):
        if "PUT" in code.name or code.name == "MEMOIZE":
            place = memorized if code.name == "MEMOIZE" else argument
            memorized += 1
            if made.startswith("TUPLE"):
                tuples.add(place)
        elif "GET" in code.name:
            uses += argument in tuples
            if uses > MOST_SHARED:
                raise ValueError("tuples of tuples")
        made = code.name
