"""Erasing and what is measured with it, against slow loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from calm.errors import CalmError
from calm.metrics.bootstrap import weights
from calm.metrics.erasing import (
    InsertionDeletion,
    RemoveAndClassify,
    erase,
    erasing_order,
    filling,
    first_pixels,
    insertion_deletion_curves,
    random_order,
)


def murmur(bits: int) -> int:
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) % 2**32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) % 2**32
    return bits ^ (bits >> 16)


def slow_numbers(key: int, pixels: int, seed: int) -> list[int]:
    own = murmur(key % 2**32 ^ murmur(seed % 2**32))
    other = murmur((own + 0x9E3779B9) % 2**32)
    return [murmur(murmur((i + own) % 2**32) ^ other) for i in range(pixels)]


def slow_erased(values: list[float], numbers: list[int], count: int) -> set[int]:
    ordered = sorted(range(len(values)), key=lambda i: (values[i], numbers[i]), reverse=True)
    return set(ordered[:count])


def keys_of(count: int) -> Tensor:
    return torch.arange(count) * 7 + 3


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_random_order_is_a_bijection_written_out_in_integers(seed, key, pixels):
    drawn = random_order(torch.tensor([key]), pixels, seed)[0].tolist()
    assert drawn == slow_numbers(key, pixels, seed)
    assert len(set(drawn)) == pixels
    assert min(drawn) >= 0
    assert max(drawn) < 2**32


def test_random_order_does_not_depend_on_the_batch():
    keys = keys_of(6)
    together = random_order(keys, 50, seed=4)
    alone = torch.cat([random_order(keys[i : i + 1], 50, seed=4) for i in reversed(range(6))]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together, random_order(keys, 50, seed=5))


def test_random_order_spreads_pixels_evenly_and_differs_between_images():
    masks = first_pixels(random_order(torch.arange(2000), 64, seed=0), [16])[0]
    # every pixel is erased in a quarter of the images: 500 with a standard deviation of 19.4
    assert (masks.sum(dim=0) - 500).abs().max() < 5 * 19.4
    # two images share 4 of 16 pixels: their mean overlap over 1999 neighbours has a standard deviation of 0.034
    assert abs((masks[1:] & masks[:-1]).sum(dim=1).double().mean() - 4) < 0.17


@given(st.integers(0, 10**6), st.sampled_from(["ties", "plain", "signed zeros", "constant", "infinite"]))
@settings(max_examples=60, deadline=None)
def test_first_pixels_are_those_of_a_sort_by_score_and_random_number(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(3, 4, 5, generator=generator)
    if kind == "ties":
        maps = maps.round()
    elif kind == "signed zeros":
        maps = torch.where(maps > 0, 0.0, -0.0)
    elif kind == "constant":
        maps = torch.full_like(maps, 0.3)
    elif kind == "infinite":
        maps = torch.where(maps > 1, math.inf, torch.where(maps < -1, -math.inf, maps))
    numbers = random_order(keys_of(3), 20, seed)
    counts = random.Random(seed).choices(range(21), k=6)
    masks = first_pixels(erasing_order(maps, numbers), counts)
    for count, mask in zip(counts, masks, strict=True):
        for i in range(3):
            wanted = slow_erased(maps[i].flatten().tolist(), numbers[i].tolist(), count)
            assert set(mask[i].nonzero().flatten().tolist()) == wanted


def test_first_pixels_of_smaller_counts_are_inside_larger_ones():
    masks = first_pixels(random_order(keys_of(4), 100), [10, 30, 50])
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()
    assert masks.sum(dim=2).tolist() == [[10] * 4, [30] * 4, [50] * 4]


def test_erasing_order_of_a_constant_map_is_the_random_one():
    numbers = random_order(keys_of(3), 30)
    order = erasing_order(torch.zeros(3, 5, 6), numbers)
    assert torch.equal(first_pixels(order, [7, 20]), first_pixels(numbers, [7, 20]))


def test_erase_fills_erased_pixels_and_keeps_others():
    images = torch.randn(2, 3, 4, 5)
    mask = first_pixels(random_order(keys_of(2), 20), [9])[0]
    for how in ("zero", "mean", "noise", "blur"):
        filler = filling(images, how, keys=keys_of(2))
        erased = erase(images, mask, filler)
        for b in range(2):
            for y in range(4):
                for x in range(5):
                    source = filler if mask[b, y * 5 + x] else images
                    assert torch.equal(erased[b, :, y, x], source[b, :, y, x])


def test_filling_is_what_its_names_say():
    images = torch.randn(3, 3, 40, 50) * 2 + 5
    keys = keys_of(3)
    assert not filling(images, "zero", keys=keys).any()
    mean = filling(images, "mean", keys=keys)
    assert torch.allclose(mean[1, 2], images[1, 2].mean().expand(40, 50))
    noise = filling(images, "noise", keys=keys)
    assert (noise.mean(dim=(2, 3)) - images.mean(dim=(2, 3))).abs().max() < 5 * 2 / math.sqrt(2000)
    assert (noise.std(dim=(2, 3)) / images.std(dim=(2, 3)) - 1).abs().max() < 5 / math.sqrt(2 * 2000)
    assert torch.equal(filling(images[1:2], "noise", keys=keys[1:2]), noise[1:2])
    assert not torch.equal(filling(images, "noise", keys=keys, seed=1), noise)


def test_filling_blur_is_a_gaussian_written_out():
    images = torch.zeros(1, 3, 41, 41, dtype=torch.float64)
    images[:, :, 20, 20] = 1
    blurred = filling(images, "blur", keys=keys_of(1))[0, 0]
    sigma, radius = 41 / 20, math.ceil(3 * 41 / 20)
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    wanted = np.zeros((41, 41))
    wanted[20 - radius : 21 + radius, 20 - radius : 21 + radius] = np.outer(kernel, kernel)
    assert np.allclose(blurred.numpy(), wanted, atol=1e-12)
    flat = torch.full((1, 3, 9, 12), 0.7)
    assert torch.allclose(filling(flat, "blur", keys=keys_of(1)), flat)


def test_erasing_functions_refuse_impossible_requests():
    with pytest.raises(CalmError, match="did you mean 'blur'"):
        filling(torch.zeros(1, 3, 2, 2), "blurr", keys=keys_of(1))
    with pytest.raises(CalmError, match="NaN"):
        erasing_order(torch.full((1, 2, 2), math.nan), random_order(keys_of(1), 4))
    with pytest.raises(CalmError, match="resize"):
        erasing_order(torch.zeros(1, 2, 2), random_order(keys_of(1), 5))
    with pytest.raises(CalmError, match="5 of 4"):
        first_pixels(random_order(keys_of(1), 4), [5])
    for fractions in ((), (0.0, 0.5), (0.5, 0.1), (0.5, 1.1), (math.nan,)):
        with pytest.raises(CalmError, match="fractions"):
            RemoveAndClassify(fractions)


def slow_height(fractions: list[float], start: float, curve: list[float]) -> float:
    at, y = [0.0, *fractions], [start, *curve]
    area = sum((at[i + 1] - at[i]) * (y[i] + y[i + 1]) / 2 for i in range(len(fractions)))
    return area / at[-1]


def test_remove_and_classify_counts_images():
    generator = torch.Generator().manual_seed(0)
    fractions = [0.1, 0.4, 0.9]
    topk = torch.rand(23, 3, generator=generator) < 0.3
    chance = torch.rand(23, 3, generator=generator) < 0.6
    whole = torch.rand(23, generator=generator) < 0.8
    keys = keys_of(23)
    metric = RemoveAndClassify(fractions, replicates=40, seed=2)
    for part in torch.randperm(23, generator=generator).split(5):
        metric.update(topk[part], chance[part], whole[part], keys[part])
    found = metric.compute()
    times = weights(keys, 40, 2)
    ratios, heights = [], []
    for r in range(41):

        def right(of, r=r):
            return sum(float(times[r, i]) for i in range(23) if of[i])

        ratios.append([right(topk[:, k]) / right(chance[:, k]) for k in range(3)])
        images = sum(times[r].tolist())
        heights.append(slow_height(fractions, right(whole) / images, [right(topk[:, k]) / images for k in range(3)]))
    for k in range(3):
        low, high = np.percentile([row[k] for row in ratios[1:]], [2.5, 97.5])
        assert list(found.ratio[k]) == pytest.approx([ratios[0][k], low, high])
        assert found.topk[k].value == pytest.approx(topk[:, k].double().mean())
        assert found.random[k].value == pytest.approx(chance[:, k].double().mean())
    assert found.accuracy.value == pytest.approx(whole.double().mean())
    low, high = np.percentile(heights[1:], [2.5, 97.5])
    assert list(found.topk_area) == pytest.approx([heights[0], low, high])
    assert found.ratio_area.value == pytest.approx(slow_height(fractions, 1.0, ratios[0]))


def test_remove_and_classify_interval_covers_images_and_draws():
    """Images with their draws are drawn 400 times anew: R_k scatters as the bootstrap of one such sample says."""
    generator = torch.Generator().manual_seed(0)
    images, draws = 300, 2

    def sample() -> tuple[Tensor, Tensor]:
        difficulty = torch.rand(images, 1, generator=generator)  # each image is right with this probability
        topk = torch.rand(images, 1, generator=generator) < difficulty / 2
        random = torch.rand(images, draws, generator=generator) < difficulty
        return topk, random.double().mean(dim=1, keepdim=True)

    ratios = torch.tensor([float(topk.sum() / random.sum()) for topk, random in (sample() for _ in range(400))])
    widths = []
    for _ in range(5):
        metric = RemoveAndClassify((0.5,), replicates=400)
        topk, random = sample()
        metric.update(topk, random, topk[:, 0], torch.arange(images))
        low, high = metric.compute().ratio[0][1:]
        widths.append(high - low)
    assert sum(widths) / 5 == pytest.approx(2 * 1.96 * float(ratios.std()), rel=0.12)


def test_remove_and_classify_is_nan_without_a_right_image():
    metric = RemoveAndClassify((0.5, 0.9), replicates=20)
    none = torch.zeros(4, 2, dtype=torch.bool)
    metric.update(~none, none, torch.ones(4, dtype=torch.bool), keys_of(4))
    found = metric.compute()
    assert all(math.isnan(figure.value) for figure in (*found.ratio, found.ratio_area))
    assert found.topk[0].value == 1
    metric.reset()
    metric.update(none[:0], none[:0], none[:0, 0], keys_of(0))
    with pytest.raises(CalmError, match="no image"):
        metric.compute()


def test_remove_and_classify_of_two_processes_adds_up():
    topk, chance = torch.rand(8, 2) < 0.5, torch.rand(8, 2) < 0.7
    whole, keys = torch.rand(8) < 0.8, keys_of(8)
    together, first, second = (RemoveAndClassify((0.3, 0.5), replicates=9) for _ in range(3))
    together.update(topk, chance, whole, keys)
    first.update(topk[:3], chance[:3], whole[:3], keys[:3])
    second.update(topk[3:], chance[3:], whole[3:], keys[3:])
    for name in first._defaults:
        assert torch.equal(getattr(first, name) + getattr(second, name), getattr(together, name))
    assert first._reductions.keys() == first._defaults.keys()


def shade(images: Tensor) -> Tensor:
    """A classifier whose classes weigh the pixels differently."""
    flat = images.flatten(1).double()
    scores = torch.stack([flat.mean(1), (flat * torch.linspace(-1, 1, flat.shape[1])).mean(1)], dim=1)
    return (scores * 3).softmax(dim=1)


def test_insertion_deletion_equals_a_loop_over_images_and_steps():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 4, 4, generator=generator)
    maps = torch.rand(3, 4, 4, generator=generator).round(decimals=1)
    targets, keys, steps = torch.tensor([1, 0, 1]), keys_of(3), 5
    numbers = random_order(keys, 16)
    start, end = filling(images, "blur", keys=keys), filling(images, "zero", keys=keys)
    inserted, deleted = insertion_deletion_curves(
        shade,
        images,
        erasing_order(maps, numbers),
        targets,
        inserted_into=start,
        deleted_to=end,
        whole=shade(images),
        steps=steps,
    )
    for i in range(3):
        for step in range(steps + 1):
            first = slow_erased(maps[i].flatten().tolist(), numbers[i].tolist(), round(16 * step / steps))
            into, out = start[i].clone(), images[i].clone()
            for pixel in first:
                into[:, pixel // 4, pixel % 4] = images[i, :, pixel // 4, pixel % 4]
                out[:, pixel // 4, pixel % 4] = 0
            assert inserted[i, step] == pytest.approx(float(shade(into[None])[0, targets[i]]))
            assert deleted[i, step] == pytest.approx(float(shade(out[None])[0, targets[i]]))
    metric = InsertionDeletion(steps, replicates=10)
    metric.update(inserted[:2], deleted[:2], keys[:2])
    metric.update(inserted[2:], deleted[2:], keys[2:])
    found = metric.compute()
    assert found.fractions == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [point.value for point in found.deletion] == pytest.approx(deleted.mean(dim=0).tolist())
    y = inserted.mean(dim=0)
    assert found.insertion_area.value == pytest.approx(float((y[:-1] + y[1:]).sum() / 2 / steps))
    assert found.insertion_area.low <= found.insertion_area.value <= found.insertion_area.high
    with pytest.raises(CalmError, match="steps"):
        metric.update(inserted[:, :-1], deleted[:, :-1], keys)
    with pytest.raises(CalmError, match="probabilities"):
        metric.update(inserted + 1, deleted, keys)
    with pytest.raises(CalmError, match="steps is 0"):
        InsertionDeletion(0)
