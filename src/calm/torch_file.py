"""Read a file that ``torch.save`` wrote, and that nobody vouches for: nothing in it is run."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from calm.documents import open_regular
from calm.errors import CalmError

__all__ = ["read_torch"]


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
            _check_zip(file)
        if start.startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
            raise CalmError(
                f"{path} is a text page, not the file itself: download it again, and look at its size"
            )
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


def _check_zip(file: BinaryIO) -> None:
    """Raise for an archive with a wrong checksum, which PyTorch does not compare, or one that would be larger unpacked
    than it is: PyTorch does not compress, but unpacks."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type for member in members):
                raise ValueError("compressed")
            if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
                raise ValueError("members that overlap")
            if (name := archive.testzip()) is not None:
                raise ValueError(f"{name} has a wrong checksum")
