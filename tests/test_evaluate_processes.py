"""`calm evaluate` in two processes: the same figures as in one, one table, and one message if something is wrong."""

from __future__ import annotations

import json
import math
import random
import socket
import time
from pathlib import Path

import evaluate_process
import pytest
import torch
from forks import Fork
from stress import trees
from stress_counts import FULL, count

import calm
import calm_birds
from calm.cli import main
from calm.data import load_split
from calm.errors import CalmError
from calm.evaluate import distributed
from calm.evaluate.distributed import all_gather, gather_dict, process_group, share
from calm_birds import write_birds


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def launch(command_lines: list[list[str]], folder: Path, size: int = 2) -> list[Fork]:
    """Start the processes that run the command lines together; what they say goes to a folder."""
    tasks = list(zip(command_lines, ports(len(command_lines)), strict=True))
    return [
        Fork(folder, evaluate_process.run, tasks, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1")
        for rank in range(size)
    ]


def ends(running: list[Fork]) -> list[tuple[str, str]]:
    """What each process said on its two outputs."""
    return [fork.end(500)[1:] for fork in running]


def stored(out: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(out.glob("*/*.json")):
        read = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.name}"] = read
    return found


def same(one, two, where: str) -> None:
    """Equal but for the last bits of numbers: sums are added up in another order."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for place, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}/{place}")
    elif isinstance(one, float):
        assert math.isclose(one, two, rel_tol=1e-12, abs_tol=1e-12), (where, one, two)
    else:
        assert one == two, where


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_birds(root / "birds", species=3, images_per_species=10, size=40, seed=2, workers=1)
    torch.manual_seed(0)
    size = calm.Preprocessing(size=(48, 48))
    names = load_split(root / "birds", "test").class_names
    model = calm.create_model("tiny_resnet", 3, "calm-em", class_names=names, preprocessing=size)
    model.save_pretrained(root / "model")
    return root


@pytest.mark.slow
def test_evaluate_in_two_processes_gives_the_figures_of_one(place, tmp_path, capsys):
    split = load_split(place / "birds", "test")
    assert len(split.records) == 9  # batches of 4, 4 and 1: the first process has two of them
    broken = tmp_path / "broken"
    calm_birds.write_birds(broken, species=3, images_per_species=10, size=40, seed=2, workers=1)
    bad = load_split(broken, "test").records[5]  # of the second process
    bad.path.write_bytes(bad.path.read_bytes()[:99])

    def words(benchmark: str, out: str, *more: str, data: Path = place / "birds") -> list[str]:
        flags = ["--model", str(place / "model"), "--data", str(data), "--out", str(tmp_path / out)]
        return [benchmark, *flags, "--replicates", "20", "--device", "cpu", *more]

    def command_lines(out: str) -> list[list[str]]:
        return [
            words("all", out, "--batch_size", "4"),
            words("insertion-deletion", out, "--batch_size", "4", "--points", "2"),
            words("randomisation", out, "--batch_size", "2", "--order", "all", "--images", "5"),
        ]

    idle = words("classification", "idle", "--batch_size", "99")  # one batch: the second process has none
    wrong = [
        words("classification", "broken", "--batch_size", "4", data=broken),
        words("localization", "wrong", "--fill", "blur"),
        [],  # a crash
    ]
    said = ends(launch([*command_lines("two"), idle, *wrong], tmp_path / "said"))
    assert all("codes [0, 0, 0, 0, 2, 2, 2]" in out for out, _ in said), said
    one, two = (tmp_path / name for name in ("one", "two"))
    for line in command_lines("one"):
        assert main(["evaluate", *line]) == 0
    assert stored(one).keys() == stored(two).keys()
    assert len(stored(one)) == 6
    for name, ours in stored(one).items():
        theirs = stored(two)[name]
        assert (ours["provenance"]["processes"], theirs["provenance"]["processes"]) == (1, 2)
        assert theirs["scores"] or name.startswith("randomisation")
        for part in ("figures", "curves", "scores", "details"):
            same(ours[part], theirs[part], f"{name}/{part}")
    for name in ("table.csv", "table.md"):
        assert (one / name).read_text() == (two / name).read_text()
    assert len(json.loads((tmp_path / "idle/table.json").read_text())) == 3
    capsys.readouterr()
    (first, first_errors), (second, second_errors) = said
    assert first.count("CALM-EM joint") >= 4
    assert second.splitlines() == ["codes [0, 0, 0, 0, 2, 2, 2]"]
    assert str(bad.path) in first_errors.splitlines()[0]
    assert "localization does not read --fill" in first_errors.splitlines()[1]
    assert "process 1 of 2 failed, see above: KeyError('lost')" in first_errors.splitlines()[2]
    assert len(first_errors.splitlines()) == 3
    assert second_errors.startswith("Traceback")
    assert second_errors.endswith("KeyError: 'lost'\n")


@pytest.mark.slow
@pytest.mark.stress
def test_evaluate_killed_keeps_what_it_finished(place, tmp_path, capsys):
    def words(out: Path) -> list[str]:
        flags = ["--model", str(place / "model"), "--data", str(place / "birds"), "--out", str(out)]
        return ["all", *flags, "--replicates", "20", "--device", "cpu", "--batch_size", "1"]

    assert main(["evaluate", *words(tmp_path / "alone")]) == 0
    alone = stored(tmp_path / "alone")
    chance = random.Random(0)
    longest, kept = 10.0, set()
    for number in range(count(reduced=2, full=30)):
        out = tmp_path / str(number)
        running = launch([words(out)], tmp_path / "said")
        began = time.monotonic()
        running[0].process.join(chance.uniform(0, longest))
        if running[0].process.exitcode is not None:
            longest = time.monotonic() - began
        for fork in running:  # torchrun, too, ends all where one is lost
            fork.process.kill()
        ends(running)
        kept.add(len(stored(out)))  # whole files, or this fails to read them
        assert all("codes [0]" in text for text, _ in ends(launch([words(out)], tmp_path / "said")))
        for name, ours in alone.items():
            same(ours["figures"], stored(out)[name]["figures"], f"{number}: {name}")
        assert not trees.hidden(out)
    capsys.readouterr()
    assert not FULL or {0, 4} <= kept


def test_process_group_refuses_a_launcher_without_address(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CalmError, match=r"WORLD_SIZE is 2, .*RANK.*: start them with torchrun"), process_group():
        pytest.fail("ran")


def test_process_group_of_one_process_has_everything():
    with process_group():
        assert share([1, 2, 3]) == [1, 2, 3]
        assert all_gather("x") == ["x"]
        assert gather_dict({2: "b", 0: "a"}) == {0: "a", 2: "b"}


def test_device_of_process_is_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "resolve_device", lambda name: name)
    monkeypatch.setenv("LOCAL_RANK", "1")  # of the second machine, perhaps
    assert distributed.device_of_process("cuda") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(CalmError, match="process 2 of this machine has no GPU of its own, 2 are visible"):
        distributed.device_of_process("cuda")


def test_share_deals_each_item_to_one_process(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        dealt.append(list(share(range(8))))
    assert dealt == [[0, 3, 6], [1, 4, 7], [2, 5]]
