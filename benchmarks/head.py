"""The head alone, forward and backward: CALM-EM beside the cheapest loss of the same logits, and beside other ways.

The limit is cross-entropy on the mean of conv_last's logits: three matrix products (logits, gradient of the features,
gradient of the weights) and almost nothing else. "ReLU prior, half dead" has no mass at half of the locations, which
are skipped; "logits not kept" is `keep_logits=False`; "8 drawn" is the sampled E-step. Time is of all ways in turn,
peak memory of a process of its own, above the features and weights. Tables below have the location scores alone and the
variance of the sampled gradient. Prints Markdown.

Run: python benchmarks/head.py [--classes 200 1000] [--channels 2048 --grid 28 --batch 16] [--channels_last]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass

import measure
import torch
import torch.nn.functional as F
from straightforward import StraightforwardHead
from torch import Tensor

from calm.fused import Unscored
from calm.latent import draw
from calm.model import CalmHead

LIMIT, OURS, CHUNKED, PLAIN = (
    "cross-entropy of the mean",
    "CALM-EM",
    "logits not kept",
    "straightforward CALM-EM",
)
DRAWN, HALF = "8 drawn", "ReLU prior, half dead"
WAYS = (LIMIT, OURS, CHUNKED, HALF, DRAWN, PLAIN)
TARGETS = {OURS: (1.05, 1.05), CHUNKED: (1.4, None)}
FASTER = 2
"""Target of CALM-EM's time against the straightforward way's."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the head."""

    classes: int
    channels: int
    grid: int
    batch: int
    channels_last: bool = False


def step(way: str, setting: Setting) -> Callable[[], None]:
    """A function that runs the head forward and backward once, on features that need a gradient."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(setting.batch, setting.channels, setting.grid, setting.grid, device=device).relu_()
    if setting.channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    targets = torch.randint(setting.classes, (setting.batch,), device=device)
    plain = way == PLAIN
    made = StraightforwardHead if plain else CalmHead
    head = made(setting.channels, setting.classes).to(device)
    if way == CHUNKED:
        head.keep_logits = False
    if way == HALF:
        head.activation = "relu"
        with torch.no_grad():
            head.attention.bias -= torch.stack([head.attention(image) for image in features]).median()

    def loss() -> Tensor:
        if plain:
            return head.loss(features, targets)
        if way == LIMIT:
            return F.cross_entropy(head.conv_last(features).mean(dim=(2, 3)), targets)
        return head(features).loss(targets, samples=8 if way == DRAWN else None)

    def once() -> None:
        features.grad = None
        head.zero_grad()
        loss().backward()

    return once


def one_step(way: str, *setting: object) -> None:
    """For the process that measures memory."""
    step(way, Setting(*setting))()


def inputs_only(way: str, *setting: object) -> None:
    """Features and weights, and no step."""
    step(way, Setting(*setting))


def peak(way: str, setting: Setting) -> float:
    """MiB of a step, above features and weights."""
    words = (way, *astuple(setting))
    return measure.peak_memory(one_step, *words) - measure.peak_memory(inputs_only, *words)


def compare(setting: Setting, rounds: int) -> list[list[object]]:
    """Rows of the table."""
    times = measure.seconds({way: step(way, setting) for way in WAYS}, rounds)
    memory = {way: peak(way, setting) for way in WAYS}
    rows: list[list[object]] = []
    for way in WAYS:
        slower, larger = measure.ratio(times[way], times[LIMIT]), memory[way] / memory[LIMIT]
        limits = TARGETS.get(way, (None, None))
        judged = [
            "" if limit is None else measure.verdict(value, limit)
            for value, limit in zip((slower, larger), limits, strict=True)
        ]
        faster = measure.ratio(times[PLAIN], times[way])
        beside = measure.verdict(faster, FASTER, least=True) if way == OURS else ""
        rows.append(
            [
                setting.classes,
                way,
                f"{1000 * measure.median(times[way]):.0f}",
                f"{slower:.2f}",
                judged[0],
                f"{faster:.2f}",
                beside,
                f"{memory[way]:.0f}",
                f"{larger:.2f}",
                judged[1],
            ]
        )
    return rows


def location_scores(setting: Setting, rounds: int) -> list[list[str]]:
    """Rows of the table: forward and backward of the location scores, by our product and by the layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = torch.randn(setting.batch, setting.channels, setting.grid, setting.grid, device=device)
    features.requires_grad_()
    head = CalmHead(setting.channels, 2).to(device)
    ways = {
        "product (ours)": lambda: (
            Unscored(features, head.conv_last, head.attention).scores().sum().backward()
        ),
        "convolution": lambda: head.attention(features).sum().backward(),
    }
    times = measure.seconds(ways, rounds)
    return [[way, f"{1000 * measure.median(taken):.0f}"] for way, taken in times.items()]


def variance(sharpness: float, samples: int, draws: int = 300) -> tuple[float, dict[str, float]]:
    """How much the sampled gradient of conv_last varies: mean squared distance to its expectation over the squared
    norm of that, by the way locations are drawn. And the number of locations that the posterior is spread over
    (exponential of its entropy)."""
    torch.manual_seed(0)
    head, features = CalmHead(64, 50), torch.randn(4, 64, 14, 14)
    with torch.no_grad():
        head.attention.weight *= sharpness
        head.conv_last.weight *= 3
    targets = torch.arange(4)
    output = head(features)
    row = output.target_rows(targets).detach()
    posterior, prior = row.flatten(1).softmax(1), output.prior.detach().flatten(1)

    def gradient(weights: Tensor) -> Tensor:
        """Of -sum over locations of weight times log p(y | x, z), mean over the images."""
        conditional = head.conv_last(features).log_softmax(1).flatten(2)[torch.arange(4), targets]
        (found,) = torch.autograd.grad(-(weights * conditional).sum(1).mean(), head.conv_last.weight)
        return found

    def shares(places: Tensor) -> Tensor:
        return torch.zeros_like(posterior).scatter_add_(1, places, torch.full(places.shape, 1 / samples))

    def independent(mass: Tensor) -> Tensor:
        return shares(torch.multinomial(mass, samples, replacement=True))

    ways = {
        "systematic, from the posterior (ours)": lambda: shares(draw(posterior[:, None], samples)),
        "independent, from the posterior": lambda: independent(posterior),
        "independent, from the prior, weighted": lambda: independent(prior) * posterior / prior,
    }
    exact = gradient(posterior)
    found = {
        name: float(
            torch.stack([(gradient(way()) - exact).square().sum() for _ in range(draws)]).mean()
            / exact.square().sum()
        )
        for name, way in ways.items()
    }
    return float(torch.special.entr(posterior).sum(1).exp().mean()), found


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--many", type=int, default=10000, help="classes, for memory only")
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--grid", type=int, default=28, help="locations of a side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=300, help="for the variance")
    asked = parser.parse_args()
    form = "channels last" if asked.channels_last else "channels first"
    print(
        f"{asked.channels} channels, {asked.grid}x{asked.grid} locations, batch {asked.batch}, fp32, {form}:\n"
    )
    settings = [
        Setting(classes, asked.channels, asked.grid, asked.batch, asked.channels_last)
        for classes in (*asked.classes, asked.many)
    ]
    rows = [row for setting in settings[:-1] for row in compare(setting, asked.rounds)]
    header = [
        "classes",
        "way",
        "ms",
        "time over limit",
        "target",
        "straightforward / this",
        f"target {FASTER}",
    ]
    print(measure.table([*header, "peak MiB", "memory over limit", "target"], rows) + "\n")
    for way in (OURS, PLAIN):
        print(f"What takes the time of {way} with {settings[-2].classes} classes:\n")
        print(measure.hottest(step(way, settings[-2])) + "\n")
    weights = asked.many * asked.channels / 2**18
    print(f"With {asked.many} classes, whose weights' gradient alone takes {weights:.0f} MiB:\n")
    peaks = [[way, f"{peak(way, settings[-1]):.0f}"] for way in (LIMIT, OURS, CHUNKED)]
    print(measure.table(["way", "peak MiB"], peaks) + "\n")
    print("Location scores alone, forward and backward:\n")
    print(measure.table(["way", "ms"], location_scores(settings[0], asked.rounds)) + "\n")
    print("Variance of the sampled gradient of `conv_last`, over its squared norm (196 locations):\n")
    found = [
        [f"{spread:.0f}", samples, *(f"{value:.3f}" for value in by_way.values())]
        for sharpness in (1.0, 10.0)
        for samples in (1, 4, 16)
        for spread, by_way in [variance(sharpness, samples, asked.draws)]
    ]
    names = list(variance(1.0, 1, 1)[1])
    print(measure.table(["posterior spread over", "drawn", *names], found))


if __name__ == "__main__":
    main()
