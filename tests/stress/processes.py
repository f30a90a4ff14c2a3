"""Commands of calm as processes of their own, forked from one that has imported everything: a start takes milliseconds.

As a script this is the server. It reads a task a line from standard input and answers with a line when the task's
process has started, and with another when it has ended. An audit hook, there before the first import, writes down
which files Python opens, makes, renames and deletes, and which addresses it asks for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calm

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
NETWORK = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostby")
COMMANDS = ("train", "evaluate", "data birds", "data prepare", "convert")
LATER = ("calm.train.run", "torch.utils.tensorboard", "calm.cli.evaluate", "calm.released", "calm.data.cues")
"""Modules that a command imports when it runs."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative: the signal that ended it.
        text: standard output and standard error.
        seconds: from fork to end.
        changes: [event, path] for everything it changed in the file system, in order; empty if it was killed.
        reads: files that Python opened for reading.
        contacts: addresses that it asked for.
    """

    code: int
    text: str
    seconds: float
    changes: tuple[tuple[str, str], ...]
    reads: tuple[str, ...]
    contacts: tuple[str, ...]

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.code == -signal.SIGKILL


class Server:
    """Starts commands.

    Attributes:
        at_import: what importing the package did.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        self.at_import = Ended(0, "", 0.0, **self._answer())

    def run(
        self,
        words: Sequence[str],
        *,
        cwd: Path | None = None,
        kill_after: float | None = None,
        kill_at: int | None = None,
        largest: int | None = None,
        powerless: bool = False,
    ) -> Ended:
        """Run ``calm WORDS`` to its end.

        Args:
            words: of the command line.
            cwd: working folder; None: an empty one.
            kill_after: seconds after which it is killed.
            kill_at: it is killed before it makes this change (from 0) to the file system.
            largest: bytes that a file may have; a write beyond fails.
            powerless: permissions count even if this is the super-user.
        """
        output = self._folder / "output"
        task = {
            "words": list(words),
            "cwd": str(cwd or self._folder / "cwd"),
            "output": str(output),
            "kill_after": kill_after,
            "kill_at": kill_at,
            "largest": largest,
            "powerless": powerless,
        }
        assert self._process.stdin is not None
        print(json.dumps(task), file=self._process.stdin, flush=True)
        ended = self._answer()
        return Ended(text=output.read_text(errors="replace"), **ended)

    def surroundings(self) -> list[Path]:
        """What lies in the home, the working folder and the folder for temporary files: nothing, at the start."""
        return [path for name in ("home", "tmp", "cwd") for path in (self._folder / name).rglob("*")]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer | {
            "changes": tuple(map(tuple, answer["changes"])),
            "reads": tuple(answer["reads"]),
            "contacts": tuple(answer["contacts"]),
        }


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server whose HOME, caches and temporary files lie in ``folder``, in ``home`` and ``tmp``, empty at first."""
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    (folder / "tmp").chmod(0o1777)
    for path in (folder, folder / "home", folder / "cwd"):
        path.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=environment(folder),
        cwd=folder / "cwd",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)
        assert process.stdout is not None
        process.stdout.close()


def environment(folder: Path) -> dict[str, str]:
    """Of a process that finds an empty home and an empty folder for temporary files, and calculates in one thread."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = {
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home" / "cache"),
        "TMPDIR": str(folder / "tmp"),
    }
    source = {"PYTHONPATH": str(Path(calm.__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | threads | places | source | {"COLUMNS": "200"}


class _Watch:
    """What this process did, as the audit hook sees it."""

    def __init__(self) -> None:
        self.kill_at: int | None = None
        self.changes: list[tuple[str, str]] = []
        self.reads: dict[str, None] = {}
        self.contacts: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._change("open", path)
            elif _path(path).is_absolute() or _path(path).exists():  # else relative to a folder that shutil has open
                self.reads[_absolute(path)] = None
        elif event in CHANGES:
            two = event in ("os.rename", "os.link")
            self._change(event, arguments[1 if two else 0], arguments[-1])
        elif event.startswith(NETWORK):
            address = arguments[1] if event.startswith(("socket.connect", "socket.send")) else arguments[0]
            if not isinstance(address, (str, bytes)) or event.startswith("socket.get"):
                self.contacts.append(f"{event} {address!r}")  # a path is a socket of this machine

    def _change(self, event: str, path: Any, folder: Any = -1) -> None:
        if isinstance(folder, int) and folder >= 0 and not isinstance(path, int):
            path = Path(f"/proc/self/fd/{folder}").readlink() / _path(path)
        name = _absolute(path)
        if name == os.devnull or "__pycache__" in Path(name).parts:  # where Numba keeps what it compiled
            return
        if len(self.changes) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.changes.append((event, name))

    def forget(self) -> None:
        self.changes, self.reads, self.contacts = [], {}, []

    def seen(self) -> dict[str, Any]:
        return {"changes": self.changes, "reads": list(self.reads), "contacts": self.contacts}


def _absolute(path: Any) -> str:
    return f"descriptor {path}" if isinstance(path, int) else str(_path(path).absolute())


def _path(path: Any) -> Path:
    return Path(os.fsdecode(path))


def _serve() -> None:
    watch = _Watch()
    sys.addaudithook(watch)
    from importlib import import_module

    from calm.files import use_temporary_caches

    use_temporary_caches()  # as the command line does before it imports a command
    import torch

    from calm.cli import COMMANDS as TABLE
    from calm.evaluate.registry import BENCHMARKS

    for module in (*(TABLE[name].function.partition(":")[0] for name in COMMANDS), *LATER):
        import_module(module)
    for row in BENCHMARKS.values():
        row.load()

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps(watch.seen()), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        began = time.monotonic()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(task, watch, writer)
        os.close(writer)
        status, text = _wait(pid, reader, None if task["kill_after"] is None else began + task["kill_after"])
        seconds = time.monotonic() - began
        os.close(reader)
        seen = json.loads(text) if text else {"changes": [], "reads": [], "contacts": []}
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "seconds": seconds, **seen}), file=answers, flush=True)
    os._exit(0)  # taking the libraries down takes seconds


def _wait(pid: int, reader: int, deadline: float | None) -> tuple[int, bytes]:
    """The status of the child when it has ended, which it does at the deadline at the latest, and what it wrote.

    That is read meanwhile, as a child that writes more than a pipe holds would not end otherwise.
    """
    os.set_blocking(reader, False)
    written = b""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended and deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0)
        with suppress(BlockingIOError):
            while chunk := os.read(reader, 1 << 16):
                written += chunk
        if ended:
            return status, written
        time.sleep(0.0005)


def _work(task: dict[str, Any], watch: _Watch, writer: int) -> None:
    """The child: the command, and what it did into the pipe."""
    import resource
    import traceback

    os.chdir(task["cwd"])
    target = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, place in ((nothing, 0), (target, 1), (target, 2)):
        os.dup2(source, place)
    if task["powerless"] and os.geteuid() == 0:
        _give_up_capabilities()
    if task["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest"], task["largest"]))
    watch.forget()
    watch.kill_at = task["kill_at"]
    try:
        from calm.cli import main

        code = main(task["words"])
    except BaseException:
        traceback.print_exc()
        code = 1
    watch.kill_at = None
    sys.stdout.flush()
    sys.stderr.flush()
    seen = json.dumps(watch.seen())
    with os.fdopen(writer, "w") as stream:
        stream.write(seen)
    os._exit(code)


def _give_up_capabilities() -> None:
    """From now on the super-user may do what the owner of a file may, and no more (Linux)."""
    import ctypes

    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    _serve()
