"""Folders that a command wrote: is every file whole, and are two folders the same."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load

CLOCK = {"seconds", "images_per_second", "finished"}
"""Fields that a clock decides: not compared."""
GROWING = ("log.txt", "tensorboard")
"""Files that are added to while a run lasts, so that they are never whole, and that tell of every start of it. They
are neither checked nor compared."""


def broken(root: Path) -> list[str]:
    """Files below ``root`` that are not whole; hidden names, which a command gives to what it has not finished, are not
    looked at.

    Raises:
        AssertionError: a file whose kind this function does not know.
    """
    found = []
    for path in _files(root, hidden=False):
        try:
            _read(path)
        except AssertionError:
            raise
        except Exception as error:
            found.append(f"{path}: {error!r}")
    return found


def hidden(root: Path) -> list[str]:
    """Files and folders below ``root`` that a command has left unfinished."""
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*"))


def finished(root: Path) -> dict[str, str]:
    """Of every file below ``root`` with its final name, a digest of its bytes."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(root, hidden=False)}


def digests(root: Path) -> dict[str, str]:
    """Of every file below ``root``, what it holds, but for what a clock says and for the folder's own name."""
    found = {}
    for path in _files(root, hidden=True):
        digest = hashlib.sha256()
        _feed(_read(path), digest, str(root.resolve()))
        found[path.relative_to(root).as_posix()] = digest.hexdigest()
    return found


def _files(root: Path, *, hidden: bool) -> list[Path]:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(root).parts for path in paths}
    return [
        path
        for path in paths
        if not any(part in GROWING for part in names[path])
        and (hidden or not any(part.startswith(".") for part in names[path]))
    ]


def _image(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert picture.size
    return data


def _table(data: bytes) -> Any:
    text = data.decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not text.endswith("\n") or any(None in row or None in row.values() for row in rows):
        raise ValueError("a row is cut")
    return rows


def _lines(data: bytes) -> Any:
    text = data.decode()
    if not text.endswith("\n"):
        raise ValueError("the last line is cut")
    return text


READERS: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads,
    ".csv": _table,
    ".yaml": yaml.safe_load,
    ".md": _lines,
    ".txt": _lines,
    ".png": _image,
    ".jpg": _image,
    ".npy": lambda data: np.load(io.BytesIO(data), allow_pickle=False),
    ".safetensors": load,
    ".ckpt": lambda data: torch.load(io.BytesIO(data), weights_only=True),
}


def _read(path: Path) -> Any:
    data = path.read_bytes()
    if path.name.startswith("."):
        return data
    assert path.suffix in READERS, f"no reader for {path}"
    return READERS[path.suffix](data)


def _feed(value: Any, digest: Any, root: str) -> None:
    """Add a value to a digest, with its kind and, in a container, its length."""
    if isinstance(value, dict):
        digest.update(f"dict{len(value)}".encode())
        for name in sorted(value, key=repr):
            if name not in CLOCK:
                _feed(name, digest, root)
                _feed(value[name], digest, root)
    elif isinstance(value, (list, tuple)):
        digest.update(f"list{len(value)}".encode())
        for member in value:
            _feed(member, digest, root)
    elif isinstance(value, torch.Tensor):
        digest.update(f"tensor{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"array{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, bytes):
        digest.update(b"bytes" + hashlib.sha256(value).digest())
    elif isinstance(value, float) and math.isnan(value):
        digest.update(b"nan")
    elif value is None or isinstance(value, (str, int, float, bool)):
        text = value.replace(root, "ROOT") if isinstance(value, str) else value
        digest.update(f"{type(value).__name__}{text!r}".encode())
    else:
        raise AssertionError(f"no digest for {type(value)}")
