"""Small files that claim much: refused by CalmError that names them, in little time and memory.

All are read in one process whose memory is limited, so that a reader which allocates what a header says cannot hide it.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_lines, write_pack
from fuzz_corpus import corpus
from fuzzing import in_child, refused_cheaply
from PIL import Image
from stress_counts import FULL

import calm

pytestmark = pytest.mark.stress


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + end


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan's header comes again and again: each costs the decoder all blocks."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "jpeg", progressive=True)
    whole = buffer.getvalue()
    start = whole.rindex(b"\xff\xda")
    header = whole[start : start + 2 + int.from_bytes(whole[start + 2 : start + 4], "big")]
    return whole[:-2] + header * scans + whole[-2:]


def bombs() -> dict[str, bytes]:
    """Small files that claim much."""
    files = corpus()
    jpeg, gif, webp = files["plain.jpg"], files["plain.gif"], files["lossless.webp"]
    frame = jpeg.index(b"\xff\xc0") + 5
    big = struct.pack(">I", 50_000)
    tags = b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in [(256, 50_000), (257, 50_000), (258, 8), (259, 1), (262, 1), (273, 8), (279, 10)]
    )
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xfe\x3f\x00" * 2
    return {
        "header.png": png(50_000, 50_000),
        "below-the-limit.png": png(9_400, 9_400),
        "text.png": png(8, 8, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 * 2**20), 1))),
        "profile.png": png(8, 8, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100 * 2**20), 1))),
        "header.jpg": jpeg[:frame] + b"\xff\xdc\xff\xdc" + jpeg[frame + 4 :],
        "scans.jpg": many_scans(2000, 20_000),
        "header.gif": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "header.webp": b"RIFF" + struct.pack("<I", len(webp) + 10) + b"WEBP" + extended + webp[12:],
        "header.bmp": files["plain.bmp"][:18] + big[::-1] * 2 + files["plain.bmp"][26:],
        "header.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 7) + tags + bytes(4),
        "header.ppm": b"P6 90000 90000 255\n" + bytes(100),
        "header-text.ppm": b"P3 9000 9000 255\n" + b"1 " * 1000,
    }


def laughs(levels: int = 12) -> str:
    """A billion and more values in twelve lines of YAML."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def group_bombs() -> dict[str, str]:
    """For parts/groups.yaml."""
    points = laughs().splitlines()[-1].partition(": ")[2]
    anchors = "".join(f"- {{name: {line}}}\n" for line in laughs().splitlines()[:-1]).replace(
        ": &", " , words: &"
    )
    return {
        "laughs": anchors + f"- {{name: a, words: [a], points: {points}}}",
        "deep": "[" * 19_000,
        "long": "[" + "1," * 9_500 + "1]",
        "base 60": "- 1" + ":59" * 6_000,
        "digits": "- " + "9" * 19_000,
        "huge": "x" * 10**6,
    }


def lying_map(shape: str, dtype: str = "<f8") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def test_bombs_are_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    tasks: list[tuple[str, Path]] = []

    def add(reader: str, name: str, content: str | bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        tasks.append((reader, path))

    for name, image in bombs().items():
        add("image", name, image)
        add("segmentation", name, image)
    for name, text in group_bombs().items():
        add("groups", f"groups-{name}/parts/groups.yaml", text)
        add("config", f"{name}.yaml", text)
    add("config", "laughs-in-a-field.yaml", laughs() + "\ndata: *l11\n")
    add("maps", "map1/a.npy", lying_map("(8, 800000000000)"))
    add("maps", "map2/a.npy", lying_map("(8, 8)", "<f8"))
    add("maps", "map3/a.npy", lying_map("(200000000, 8)"))
    add("maps", "map4/a.npy", lying_map("(8, 8)", "|S1000000000"))
    tasks += many_parts(tmp_path / "cub") + far_label(tmp_path / "pack") + checkpoints(tmp_path)
    refused_cheaply(tasks)


def many_parts(root: Path) -> list[tuple[str, Path]]:
    """A table of 100,000 images times 100,000 parts."""
    write_lines(root / "images.txt", [f"{i} {i}.jpg" for i in range(1, 100_001)])
    write_lines(root / "parts" / "parts.txt", [f"{i} part" for i in range(1, 100_001)])
    write_lines(root / "parts" / "part_locs.txt", [])
    return [("part points", root / "parts" / "parts.txt")]


def far_label(root: Path) -> list[tuple[str, Path]]:
    """Names for 10^18 classes."""
    path = write_pack(root, classes=None) / "metadata" / "train" / "class_labels.txt"
    path.write_text(path.read_text().replace(",1", ",999999999999999999"))
    return [("labels", path)]


def checkpoints(folder: Path) -> list[tuple[str, Path]]:
    """More classes than weights, inputs as large as the memory, weights of 10^9 rows that take no byte."""
    model = calm.create_model("tiny_resnet", 3).save_pretrained(folder / "model")
    found = []
    for name, change in {"classes": {"num_classes": 3_000_000}, "none": {}}.items():
        copy = Path(shutil.copytree(model, folder / name))
        card = json.loads((copy / "calm.json").read_text())
        card["model"] |= change
        if change:
            card["class_names"] = ["x"] * 3_000_000
        else:
            card["preprocessing"]["size"] = [10**6, 10**6]
        (copy / "calm.json").write_text(json.dumps(card))
        found.append(("model", copy / "calm.json"))
    copy = Path(shutil.copytree(model, folder / "header"))
    (copy / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    found.append(("model", copy / "model.safetensors"))
    torch.save(
        {"architecture": "resnet50", "state_dict": {"conv_last.weight": torch.zeros(10**9, 0, 1, 1)}},
        folder / "hollow.pth.tar",
    )
    return [*found, ("released", folder / "hollow.pth.tar")]


def explained(folder: Path, sizes: dict[str, tuple[int, int]], megabytes: int) -> dict[str, tuple[int, int]]:
    """Let `calm attribute` explain pictures, (width, height), with so much memory; the sizes of their overlays."""
    calm.create_model("tiny_resnet", 7).save_pretrained(folder / "model")
    for name, size in sizes.items():
        Image.new("RGB", size, (9, 200, 30)).save(folder / f"{name}.png", compress_level=1)
    tasks = [("attribute", folder / f"{name}.png") for name in sizes]
    found = {}
    for name, result in zip(sizes, in_child(tasks, megabytes=megabytes), strict=True):
        assert result["kind"] == "ok", (name, result)
        written = np.load(folder / "out" / f"{name}.joint.npy", mmap_mode="r")
        assert (written.shape, written.dtype) == (sizes[name][::-1], np.float32)
        with Image.open(folder / "out" / f"{name}.joint.png") as overlay:
            found[name] = overlay.size
    return found


def test_thin_and_large_pictures_are_explained_in_bounded_memory(tmp_path: Path) -> None:
    """The overlay of a line as high as SMALLEST_PICTURE would have 13 million columns."""
    sizes = {
        "wide": (60_000, 1),
        "high": (1, 60_000),
        "one": (1, 1),
        "short": (300, 2),
        "large": (3600, 2800),
    }
    assert explained(tmp_path, sizes, 700) == {
        "wide": (60_000, 1),
        "high": (1, 60_000),
        "one": (224, 224),
        "short": (1800, 12),
        "large": (2268, 1764),
    }


@pytest.mark.skipif(not FULL, reason="takes two minutes: CALM_STRESS=full")
def test_the_largest_pictures_are_explained_in_bounded_memory(tmp_path: Path) -> None:
    sizes = {"square": (9400, 9400), "line": (80_000_000, 1), "column": (2, 40_000_000)}
    assert explained(tmp_path, sizes, 3500) == {
        "square": (2000, 2000),
        "line": (65_535, 1),
        "column": (1, 65_535),
    }
