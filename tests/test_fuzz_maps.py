"""Untrusted folders of `.npy` maps: read right, or refused by CalmError that names the file."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import Marker, cases, damaged, outcome
from hypothesis import given, strategies as st

from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.subject import MapFolder, open_map_folder

pytestmark = pytest.mark.stress

SIZE = (6, 5)
SPLIT = Split("test", (Record("birds/a.jpg", Path("birds/a.jpg"), 0),), ("x", "y"), Path())
TRUTH = np.random.default_rng(0).random(SIZE).astype(np.float16).astype(np.float64)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=True)
    return buffer.getvalue()


def read(folder: Path) -> MapFolder | None:
    found = outcome(lambda: open_map_folder(folder, SPLIT, size=SIZE), "birds/a.npy")
    if found is not None:
        maps = found.maps([0])
        assert maps.shape == (1, *SIZE)
        assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "birds").mkdir()
    return tmp_path


@cases(150, 3000)
@given(
    dtype=st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<f2", ">f2"]),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0)]),
    data=st.data(),
)
def test_open_map_folder_of_damaged_maps(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, fortran: bool, version: tuple[int, int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "maps"
    (folder / "birds").mkdir(parents=True, exist_ok=True)
    whole = npy(np.asarray(TRUTH.astype(dtype), order="F" if fortran else "C"), version)
    (folder / "birds" / "a.npy").write_bytes(whole)
    found = read(folder)
    assert found is not None
    np.testing.assert_array_equal(found.maps([0])[0].numpy(), TRUTH)
    (folder / "birds" / "a.npy").write_bytes(data.draw(damaged(whole)))
    read(folder)


def header(text: str) -> bytes:
    """A file of 30 float64 zeros with this header."""
    line = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(240)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no array"),
        (b"PK\x03\x04" + bytes(50), "no array"),
        (b"<html>", "no array"),
        (npy(np.full(SIZE, np.nan)), "NaN or infinite"),
        (npy(np.full(SIZE, np.inf, np.float16)), "NaN or infinite"),
        (npy(np.full(SIZE, 1.5, ">f8")), r"leave \[0, 1\]"),
        (npy(np.full(SIZE, -1, ">i2")), r"leave \[0, 1\]"),
        (npy(np.zeros((5, 6))), r"another shape.*\(5, 6\)"),
        (npy(np.zeros(())), "another shape"),
        (npy(np.zeros((0, 5))), "another shape"),
        (npy(np.zeros(SIZE, "c16")), "no array"),
        (npy(np.zeros(SIZE, "U3")), "no array"),
        (npy(np.zeros(SIZE, "M8[s]")), "no array"),
        (npy(np.zeros(SIZE, [("a", "f4")])), "no array"),
        (npy(np.zeros((*SIZE,), "V8")), "no array"),
        (npy(np.zeros(SIZE))[:-1], "greater than file size"),
        (npy(np.zeros(SIZE)) + b"\0", "longer than its header says"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (6, 7)}"), "greater than file size"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-6, -5)}"), "no array"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (True, 30)}"), "no array|another shape"),
        (header("{'descr': '(3,)f8', 'fortran_order': False, 'shape': (6, 5)}"), "no array"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (6, 5"), "no array"),
        (header("open('marker', 'w')"), "no array"),
    ],
)
def test_open_map_folder_refuses_what_is_no_map(folder: Path, content: bytes, words: str) -> None:
    (folder / "birds" / "a.npy").write_bytes(content)
    with pytest.raises(CalmError, match=f"(?s){words}.*") as caught:
        open_map_folder(folder, SPLIT, size=SIZE)
    assert "birds/a.npy" in str(caught.value)
    assert not Path("marker").exists()


def test_open_map_folder_never_unpickles_objects(folder: Path) -> None:
    marker = folder / "marker"
    array = np.empty(SIZE, dtype=object)
    array.fill(Marker(marker))
    for content in (npy(array), pickle.dumps(Marker(marker))):
        (folder / "birds" / "a.npy").write_bytes(content)
        with pytest.raises(CalmError, match=r"birds/a\.npy"):
            open_map_folder(folder, SPLIT, size=SIZE)
    assert not marker.exists()


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to(os.devnull)]
)
def test_open_map_folder_refuses_what_is_no_regular_file(folder: Path, make: Callable[[Path], Any]) -> None:
    make(folder / "birds" / "a.npy")
    with pytest.raises(CalmError, match=r"birds/a\.npy"):
        open_map_folder(folder, SPLIT, size=SIZE)


def test_maps_names_a_map_that_vanished_since_the_check(folder: Path) -> None:
    path = folder / "birds" / "a.npy"
    path.write_bytes(npy(TRUTH))
    maps = open_map_folder(folder, SPLIT, size=SIZE)
    path.unlink()
    with pytest.raises(CalmError, match=r"a\.npy: no such file"):
        maps.maps([0])
