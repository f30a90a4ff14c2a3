"""What the benchmarks share: times of several ways in turn, peak memory, Markdown tables, the machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = [
    "Way",
    "bar",
    "hottest",
    "machine",
    "median",
    "overhead",
    "peak_and_result",
    "peak_memory",
    "photograph",
    "ratio",
    "seconds",
    "table",
    "verdict",
]

Way = Callable[[], object]


def clock() -> float:
    """Seconds. With one thread and no GPU, those of the processor: what other programs take does not count. Otherwise
    of the wall, after the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(ways: Mapping[str, Way], rounds: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each way in each round. The ways take turns, from a new one in each round, so that a slow moment of
    the machine meets all of them.

    Args:
        ways: what to time, by name.
        rounds: how often.
        warm: rounds before that are not counted.
    """
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm + rounds):
        first = turn % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            start = clock()
            ways[name]()
            taken = clock() - start
            if turn >= warm:
                times[name].append(taken)
    return times


def median(times: Sequence[float]) -> float:
    """Median seconds."""
    return statistics.median(times)


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of time over the reference's time in the same round; of the medians, where the rounds
    are not as many."""
    if len(times) != len(reference):
        return median(times) / median(reference)
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def overhead(value: float) -> str:
    """A ratio as what it adds, in percent."""
    return f"{100 * (value - 1):+.1f} %"


def peak_memory(way: Callable[..., object], *args: object) -> float:
    """Peak MiB of ``way(*args)`` in a process of its own, above what the process holds after it has imported torch.

    On the GPU: of what PyTorch has allocated there. ``way`` must be a function of a module, for it is called in a new
    process by its name. The C library gives what is freed back to the system at once: otherwise the peak is
    mostly that of what it keeps.
    """
    return peak_and_result(way, *args, give_back=True)[0]


def peak_and_result(way: Callable[..., object], *args: object, give_back: bool = False) -> tuple[float, Any]:
    """`peak_memory`, and what ``way`` returns. Without ``give_back`` the process is as others are, also for a clock."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, torch.get_num_threads(), way, args))
    former = dict(os.environ)
    os.environ.update(_GIVE_BACK if give_back else {})
    try:
        process.start()
    finally:
        for name in os.environ.keys() - former.keys():
            del os.environ[name]
    sender.close()
    try:
        peak, result = receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {way.__name__}{args} failed") from None
    finally:
        process.join()
    return peak, result


_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""For glibc."""


def _report_peak(sender: Connection, threads: int, way: Callable[..., object], args: tuple[object, ...]) -> None:
    torch.set_num_threads(threads)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries' own buffers
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    result = way(*args)
    gpu = torch.cuda.is_available()
    sender.send((torch.cuda.max_memory_allocated() / 2**20 if gpu else _resident("VmHWM") - before, result))


def _resident(name: str) -> float:
    """MiB of this process by a line of Linux's /proc/self/status: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def photograph(seed: int, height: int = 375, width: int = 500) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / np.maximum(distance, 1 / width)
    pixels = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 128 + 48 * (0.8 * pixels.mean(axis=0) + 0.2 * pixels) / pixels.std()  # colours that go together
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; columns after the first are set to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdict(value: float, limit: float, *, least: bool = False) -> str:
    """Whether a value keeps to its target: at most ``limit``, or with ``least`` at least."""
    return "met" if (value >= limit if least else value <= limit) else "**not met**"


def bar(text: str) -> str:
    """Text that can stand in a cell of a table."""
    return text.replace("|", "\\|")


def hottest(way: Way, count: int = 6) -> str:
    """A table of the operations that take most of a way's time, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
    for _ in range(2):  # the first has the profiler's own start
        with profile(activities=activities, acc_events=True) as seen:
            way()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    rows = [
        (f"`{bar(event.key)}`", event.count, f"{getattr(event, key) / 1000:.1f}", f"{getattr(event, key) / total:.1%}")
        for event in events[:count]
    ]
    return table(["operation", "calls", "ms", "share"], rows)


def machine() -> str:
    """This machine and its software, in a line."""
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    parts = [
        f"{cores} core{'s' * (cores > 1)} of {_processor()} ({platform.machine()})",
        f"{threads} thread{'s' * (threads > 1)}",
        f"PyTorch {torch.__version__}",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    ]
    return ", ".join(parts)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unnamed processor")
