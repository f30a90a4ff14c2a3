"""Seconds of the processor until `calm --help`, each command's --help and the package's parts are there.

Each is run in a process of its own, several times; the median is shown, and what of the large libraries it has
imported. Prints Markdown tables.

Run: python benchmarks/startup.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import measure

from calm.cli import COMMANDS

LARGE = (
    "torch",
    "torchvision",
    "torchmetrics",
    "lightning",
    "timm",
    "captum",
    "pytorch_grad_cam",
    "cv2",
    "matplotlib",
    "tensorboard",
    "gradio",
    "scipy",
    "numpy",
    "PIL",
)
LIMIT = 0.5
PARTS = ("import calm", "import calm; calm.load", "import calm; calm.create_model", "import torch")


def start(code: str, rounds: int) -> tuple[float, list[str]]:
    """Median seconds of the processor of a Python process that runs ``code``, and the large libraries in it."""
    report = f"\nimport json, sys\nprint(json.dumps([n for n in {LARGE!r} if n in sys.modules]), file=sys.stderr)"
    times = []
    for _ in range(rounds):
        before = children()
        done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
        times.append(children() - before)
    return measure.median(times), json.loads(done.stderr.splitlines()[-1])


def children() -> float:
    """Seconds that processes started from here have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), help="whose --help is run")
    parser.add_argument("--code", nargs="+", default=PARTS, help="what else is timed")
    flags = parser.parse_args()
    rows = []
    for name in ("", *flags.commands):
        words = [*name.split(), "--help"]
        seconds, imported = start(f"from calm.cli import main\nmain({words!r})", flags.rounds)
        verdict = measure.verdict(seconds, LIMIT)
        rows.append([f"`calm {' '.join(words)}`", f"{seconds:.2f}", verdict, ", ".join(imported) or "none"])
    print(measure.table(["command", "seconds", f"target {LIMIT} s", "large libraries imported"], rows) + "\n")
    rows = []
    for code in flags.code:
        seconds, imported = start(code, flags.rounds)
        rows.append([f"`{code}`", f"{seconds:.2f}", ", ".join(imported) or "none"])
    print(measure.table(["code", "seconds", "large libraries imported"], rows))


if __name__ == "__main__":
    main()
