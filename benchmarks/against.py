"""This build beside an older commit: the same tasks in turns, seconds of each and their ratio. Prints Markdown.

The older commit is checked out and installed, without its dependencies, into an environment of its own below
``build/against``, which takes the libraries of the environment that runs this script: what differs is calm alone. Each
task is prepared once by each side in a process of its own, the way that its build's own commands compute; then the
sides take turns, the first of each round changing, and the ratio is the median over the rounds. Both must compute the
same: the script says how far the tasks' figures are apart. Commands are whole processes, start-up included. A task in
bfloat16 is float32 in a build whose commands have no bfloat16.

Run: python benchmarks/against.py COMMIT [TASK ...] [--rounds 5 --threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import measure
import torch

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], float]

# --- what is timed: functions that prepare a task in a folder and return it; each gives a figure to compare ----------


def forward(backbone: str, batch: int, *, half: bool = False, **options: object) -> Callable[[Path], Step]:
    """Prediction and the map of one class of CALM-EM, 200 classes, of random images of 224x224 pixels."""

    def prepare(folder: Path) -> Step:
        import calm

        torch.manual_seed(0)
        calm.create_model(backbone, 200, "calm-em", **options).save_pretrained(folder / "model")
        model = calm.load(folder / "model").eval()
        fast = hasattr(model, "optimized_for_inference")
        model = model.optimized_for_inference() if fast else model
        images = torch.randn(batch, 3, 224, 224)

        def step() -> float:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half and fast):
                output = model(images)
                return float(output.attribute(torch.zeros(batch, dtype=torch.long)).sum() + output.probs[:, 0].sum())

        return step

    return prepare


def training(backbone: str, batch: int, *, half: bool = False, **options: object) -> Callable[[Path], Step]:
    """A step of CALM-EM with SGD, 200 classes, random images of 224x224 pixels."""

    def prepare(folder: Path) -> Step:
        import calm

        torch.manual_seed(0)
        model = calm.create_model(backbone, 200, "calm-em", **options).train()
        fast = hasattr(model, "optimized_for_inference")
        if fast:
            model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        images, targets = torch.randn(batch, 3, 224, 224), torch.arange(batch)

        def step() -> float:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half and fast):
                loss = model.loss(images, targets)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return prepare


def command(*words: str, photographs: int = 0, birds: int = 0) -> Callable[[Path], Step]:
    """A command on 240 birds and an untrained resnet18 of 96 pixels; or on photographs and timm's resnet18 of 224 and
    200 classes; or on test images of ``birds``, as many of each of 20 species, and narrow_resnet of 64. {data}, {model}
    and {out} stand for its folders. The figure is the sum of a benchmark's."""

    def prepare(folder: Path) -> Step:
        import calm

        torch.manual_seed(0)
        small = ("narrow_resnet", 20, 64) if birds else ("resnet18", 8, 96)
        backbone, classes, size = ("timm/resnet18", 200, 224) if photographs else small
        preprocessing = calm.Preprocessing(size=(size, size))
        calm.create_model(backbone, classes, "calm-em", preprocessing=preprocessing).save_pretrained(folder / "model")
        calls = iter(range(10**6))

        def run(*words: str) -> float:
            places = {"data": folder / "data", "model": folder / "model", "out": folder / f"out{next(calls)}"}
            line = [str(Path(sys.executable).with_name("calm")), *(word.format(**places) for word in words)]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(line)}: exit status {done.returncode}\n{done.stderr}")
            results = [json.loads(path.read_text()) for path in places["out"].glob(f"{words[1]}/*.json")]
            return sum(value for result in results for value, *_ in result["figures"].values())

        if photographs:
            (folder / "data" / "images").mkdir(parents=True)
            for number in range(photographs):
                measure.photograph(number).save(folder / "data" / "images" / f"{number:04}.jpg", quality=90)
        else:
            images, test = (birds + 5, birds / (birds + 5)) if birds else (30, 0.3)
            drawn = {"species": classes, "images_per_species": images, "test_fraction": test, "size": size}
            run("data", "birds", "{data}", "--workers=1", *(f"--{name}={value}" for name, value in drawn.items()))
        return lambda: run(*words)

    return prepare


TASKS: dict[str, Callable[[Path], Step]] = {
    "resnet50 28x28, forward": forward("resnet50", 4, large_feature_map=True),
    "resnet50 28x28, training step": training("resnet50", 4, large_feature_map=True),
    "resnet50 28x28, forward, bfloat16": forward("resnet50", 4, half=True, large_feature_map=True),
    "resnet50 28x28, training step, bfloat16": training("resnet50", 4, half=True, large_feature_map=True),
    "EfficientNet-Lite0 stride 16, forward": forward("tf_efficientnet_lite0", 8, output_stride=16),
    "EfficientNet-Lite0 stride 16, training step": training("tf_efficientnet_lite0", 8, output_stride=16),
    "EfficientNet-Lite0 stride 16, forward, bfloat16": forward("tf_efficientnet_lite0", 8, half=True, output_stride=16),
    "EfficientNet-Lite0 stride 16, training step, bfloat16": training(
        "tf_efficientnet_lite0", 8, half=True, output_stride=16
    ),
    "resnet18, forward": forward("resnet18", 8),
    "calm train, 1 epoch": command(
        "train", "--preset", "small", "--data", "{data}", "--run_dir", "{out}", "--backbone", "tiny_resnet",
        "--epochs", "1", "--hardware.accelerator", "cpu",
    ),
    "calm attribute, 240 pictures": command("attribute", "--model", "{model}", "{data}/images", "--out", "{out}"),
    "calm attribute, 500 photographs": command(
        "attribute", "--model", "{model}", "{data}/images", "--out", "{out}", photographs=500,
    ),
    "calm evaluate remove-and-classify": command(
        "evaluate", "remove-and-classify", "--model", "{model}", "--data", "{data}", "--out", "{out}",
    ),
    **{
        f"calm evaluate localization, {20 * birds} images": command(
            "evaluate", "localization", "--model", "{model}", "--data", "{data}", "--out", "{out}", birds=birds,
        )
        for birds in (10, 50)
    },
}  # fmt: skip

# --- the two sides ---------------------------------------------------------------------------------------------------


def serve(task: str, folder: Path, threads: int) -> None:
    """In a side's process: prepare a task, then take a step for each line of standard input and print its seconds."""
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    step = TASKS[task](folder)
    for _ in sys.stdin:
        began = os.times()
        figure = step()
        ended = os.times()
        taken = {"processor": sum(ended[:4]) - sum(began[:4]), "wall": ended.elapsed - began.elapsed}
        print(json.dumps({**taken, "figure": figure}), file=answers, flush=True)


@contextmanager
def side(python: Path, task: str, threads: int) -> Iterator[Callable[[], dict[str, float]]]:
    """A process of a build that takes a step at each call, and what the step took."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if python != Path(sys.executable):
        environment.pop("PYTHONPATH", None)  # may hold this build
    with tempfile.TemporaryDirectory() as folder:
        words = [str(python), __file__, "--serve", task, folder, str(threads)]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment) as process:
            orders, answers = process.stdin, process.stdout
            assert orders is not None
            assert answers is not None

            def step() -> dict[str, float]:
                print(file=orders, flush=True)
                answer = answers.readline()
                if not answer:
                    raise SystemExit(f"{task}: the process of {python} failed; its message is above")
                taken: dict[str, float] = json.loads(answer)
                return taken

            yield step
            orders.close()


def installed(commit: str) -> Path:
    """Return the interpreter of an environment that holds the commit's calm and otherwise this one's libraries."""
    digits = subprocess.check_output(["git", "rev-parse", "--short=12", commit], cwd=ROOT, text=True).strip()
    folder = ROOT / "build" / "against" / digits
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"installing {digits} into {folder} ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.check_output(ask, text=True).strip())
    # A path file of a path file is not read: the editable calm of this environment stays out.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory() as source:
        archive = subprocess.run(["git", "archive", digits], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", source], input=archive, check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
    (folder / "complete").touch()
    return python


def compare(task: str, pythons: dict[str, Path], rounds: int, threads: int) -> list[object]:
    """Return the table's row of a task."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with ExitStack() as stack:
        steps = {name: stack.enter_context(side(python, task, threads)) for name, python in pythons.items()}
        names = list(steps)
        for turn in range(rounds + 1):  # the first is not counted
            for name in names[turn % 2 :] + names[: turn % 2]:
                taken[name].append(steps[name]())
            print(task, turn, {name: taken[name][-1] for name in names}, file=sys.stderr, flush=True)
    clock = "processor" if threads == 1 else "wall"
    old, new = ([step[clock] for step in taken[name][1:]] for name in ("old", "new"))
    ratios = [a / b for a, b in zip(old, new, strict=True)]
    apart = abs(taken["old"][0]["figure"] - taken["new"][0]["figure"])
    seconds = [f"{measure.median(times):.3g}" for times in (old, new)]
    return [task, *seconds, f"{measure.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{apart:.1g}"]


def main() -> None:
    """Install the older build, run the tasks, print the table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("task", nargs="*", help=f"a part of a name: {', '.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    tasks = [name for name in TASKS if not options.task or any(part in name for part in options.task)]
    pythons = {"old": installed(options.commit), "new": Path(sys.executable)}
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    rows = [compare(task, pythons, options.rounds, options.threads) for task in tasks]
    print(f"old: {options.commit}; seconds of {'the processor' if options.threads == 1 else 'the wall'},"
          f" median of {options.rounds} rounds in {time.monotonic() - began:.0f} s; {measure.machine()}\n")  # fmt: skip
    print(measure.table(["task", "old s", "new s", "old / new", "range", "figures apart"], rows))


if __name__ == "__main__":
    main()
