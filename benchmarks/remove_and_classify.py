"""Remove-and-classify: its cost beside that of its forward passes, and beside a loop. Prints Markdown tables.

Ours computes with the model's copy for inference, as `calm evaluate` does, in float32 and in bfloat16; "plain model" is
the same with the model as it is, which the loop uses as well.

Everything but reading images is timed, in seconds of the processor (other programs do not count): the map, the orders,
the erasing, the metric with its bootstrap. The loop sorts every image's map for each share, draws its random pixels
anew, and takes a pass of its own for the map.

Run: python benchmarks/remove_and_classify.py [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

import torch

from calm.evaluate.erasing import after_erasing
from calm.evaluate.subject import model_subject
from calm.heatmaps import resize_and_normalize
from calm.images import Preprocessing
from calm.metrics.erasing import FRACTIONS, RemoveAndClassify, erasing_order, filling, first_pixels, random_order
from calm.model import create_model

SETTINGS = [("small_resnet", 96, 8), ("tf_efficientnet_lite0", 224, 8), ("resnet50", 224, 2)]


def passes(subject, images, labels):
    """The forward passes alone: one for map and prediction, two per share."""
    for _ in range(1 + 2 * len(FRACTIONS)):
        _ = subject.predict(images).probs


def ours(subject, images, labels):
    """A batch, as `calm.evaluate.erasing` treats it."""
    metric = RemoveAndClassify()
    keys = torch.arange(len(images))
    prediction = subject.predict(images)
    whole = prediction.probs.argmax(1) == labels
    maps = resize_and_normalize(prediction.maps(labels[:, None])[:, 0], tuple(images.shape[-2:]), subject.normalization)
    random = random_order(keys, maps[0].numel())
    filler = filling(images, "zero", keys=keys)

    def classify(batch):
        return subject.predict(batch).probs

    topk, _ = after_erasing(classify, images, erasing_order(maps, random), filler, labels, FRACTIONS)
    chance, _ = after_erasing(classify, images, random, filler, labels, FRACTIONS)
    metric.update(topk, chance, whole, keys)


def straightforward(subject, images, labels):
    """Image by image and share by share, each with a sort, the erased images classified in a batch."""
    _ = subject.predict(images).probs
    grid = subject.predict(images).maps(labels[:, None])[:, 0]
    maps = resize_and_normalize(grid, tuple(images.shape[-2:]), subject.normalization)
    pixels = maps[0].numel()
    for share in FRACTIONS:
        for by_map in (True, False):
            erased = images.clone()
            for i in range(len(images)):
                order = maps[i].flatten().argsort(descending=True) if by_map else torch.randperm(pixels)
                erased[i].flatten(1)[:, order[: round(share * pixels)]] = 0
            _ = subject.predict(erased).probs


def selection(order, rounds):
    """Milliseconds per image: one selection for all shares, a sort for all, a sort for each."""
    counts = [round(share * order.shape[1]) for share in FRACTIONS]
    ways = {
        "one selection for all shares": lambda: first_pixels(order, counts),
        "one sort for all shares": lambda: order.sort(dim=1),
        "a sort for each share": lambda: [order.sort(dim=1) for _ in counts],
    }
    return {name: 1000 * least(way, rounds) / len(order) for name, way in ways.items()}


def least(function, rounds):
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the least time of so many is shown")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; the time of all is added up")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {arguments.threads} thread(s), PyTorch {torch.__version__}\n")
    print(
        "| ms/image | pixels | batch | ours, plain model | ours | its 11 passes | over them | ours, bf16 | loop |",
        end="",
    )
    print(" plain / ours | plain / bf16 | loop / ours |\n|" + "---|" * 12)
    for backbone, size, batch in SETTINGS:
        model = create_model(backbone, 200, preprocessing=Preprocessing(size=(size, size)))
        fast = model.optimized_for_inference()
        plain, subject = model_subject(model), model_subject(model, predictor=fast)
        half = model_subject(model, predictor=fast, precision="bf16-mixed")
        images, labels = torch.randn(batch, 3, size, size), torch.randint(200, (batch,))
        ways = [(ours, plain), (ours, subject), (passes, subject), (ours, half), (straightforward, plain)]
        times = [float("inf")] * len(ways)
        with torch.no_grad():
            passes(subject, images, labels)
            for _ in range(arguments.rounds):  # in turn, so that a busy moment meets all of them
                for i, (way, whose) in enumerate(ways):
                    start = time.process_time()
                    way(whose, images, labels)
                    times[i] = min(times[i], 1000 * (time.process_time() - start) / batch)
        before, own, alone, halved, loop = times
        over = f"{100 * (own / alone - 1):+.1f} %"
        values = [f"{before:.1f}", f"{own:.1f}", f"{alone:.1f}", over, f"{halved:.1f}", f"{loop:.1f}"]
        ratios = [f"{value:.2f}" for value in (before / own, before / halved, loop / own)]
        print("|", " | ".join([backbone, f"{size}x{size}", str(batch), *values, *ratios]), "|", flush=True)
    print("\n| masks of a 224x224 map, five shares | ms/image |\n|---|---|")
    order = erasing_order(torch.rand(16, 224, 224), random_order(torch.arange(16), 224 * 224))
    for name, taken in selection(order, arguments.rounds).items():
        print(f"| {name} | {taken:.2f} |")
    print(f"\nPeak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
