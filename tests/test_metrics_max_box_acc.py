"""MaxBoxAcc by hand, against loops over images and thresholds, in any batches, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_metrics_boxes import oracle

from calm.errors import CalmError
from calm.metrics.bootstrap import weights
from calm.metrics.boxes import MaxBoxAcc

CUTS = torch.linspace(0, 1, 21, dtype=torch.float64)


def cases(count=12):
    rng = np.random.default_rng(5)
    maps = torch.from_numpy(rng.integers(0, 9, (count, 16, 16)) / 8.0)
    for place in range(count):
        maps[place, 3:12, 4:13] = (maps[place, 3:12, 4:13] + place / count).clamp(max=1)
    boxes = [torch.tensor([[3, 3, 12, 12], [0, 0, 5, 6]])[: 1 + place % 2] for place in range(count)]
    labels = torch.from_numpy(rng.integers(0, 7, count))
    predictions = torch.stack([torch.from_numpy(rng.permutation(7)[:5]) for _ in range(count)])
    return maps, boxes, torch.arange(count), predictions, labels


def fed(sizes, replicates=50):
    maps, boxes, keys, predictions, labels = cases()
    metric, start = MaxBoxAcc(CUTS, replicates=replicates), 0
    for size in sizes:
        part = slice(start, start + size)
        metric.update(maps[part], boxes[part], keys[part], predictions[part], labels[part])
        start += size
    return metric


def test_every_figure_equals_a_loop_over_images_and_thresholds():
    maps, boxes, _, predictions, labels = cases()
    found = [oracle(m.numpy(), b.numpy(), CUTS.tolist()) for m, b in zip(maps, boxes, strict=True)]
    largest, best = (np.stack(each) for each in zip(*found, strict=True))
    right1 = (predictions[:, 0] == labels).numpy()[:, None]
    right5 = (predictions == labels[:, None]).any(1).numpy()[:, None]
    result = fed([12]).compute()
    assert result.v1.value == (largest >= 0.5).mean(0).max()
    assert result.gt_known == result.v1
    each = [(best >= iou).mean(0).max() for iou in (0.3, 0.5, 0.7)]
    assert [figure.value for figure in result.per_iou.values()] == pytest.approx(each)
    assert result.v2.value == pytest.approx(np.mean(each))
    assert result.top1.value == pytest.approx(((largest >= 0.5) & right1).mean(0).max())
    assert result.top5.value == pytest.approx(((largest >= 0.5) & right5).mean(0).max())
    assert result.v1_curve.value == pytest.approx((largest >= 0.5).mean(0).tolist())
    assert result.best_threshold == CUTS[(largest >= 0.5).mean(0).argmax()]
    assert 0 < result.v1.value < 1


def test_the_interval_is_that_of_images_drawn_again_and_the_best_threshold_taken_anew():
    maps, boxes, keys, *_ = cases()
    hits = np.stack(
        [oracle(m.numpy(), b.numpy(), CUTS.tolist())[0] for m, b in zip(maps, boxes, strict=True)]
    )
    drawn = weights(keys, 50)[1:].numpy()
    values = [(row[:, None] * (hits >= 0.5)).sum(0).max() / row.sum() for row in drawn]
    result = fed([12]).compute()
    assert result.v1[1:] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_batches_of_any_size_and_a_merge_of_two_processes_give_the_same():
    whole = fed([12]).compute()
    assert fed([5, 4, 3]).compute() == whole
    maps, boxes, keys, predictions, labels = cases()
    halves = []
    for part in (slice(0, 7), slice(7, 12)):
        half = MaxBoxAcc(CUTS, replicates=50)
        half.update(maps[part], boxes[part], keys[part], predictions[part], labels[part])
        halves.append(half)
    for name in ("largest", "best", "top1", "top5", "images", "predicted"):
        setattr(halves[0], name, getattr(halves[0], name) + getattr(halves[1], name))
    assert halves[0].compute() == whole


def test_a_map_that_is_the_box_is_right_at_every_overlap():
    maps = torch.zeros(1, 20, 20)
    maps[0, 5:11, 4:13] = 1
    metric = MaxBoxAcc(replicates=0)
    metric.update(maps, [torch.tensor([[4, 5, 13, 11]])], torch.tensor([0]))
    result = metric.compute()
    assert (result.v1.value, result.v2.value, result.top1, result.top5) == (1, 1, None, None)
    assert metric.latest.tolist() == [1]


def test_memory_does_not_grow_with_images():
    sizes = [
        sum(getattr(metric, name).numel() for name in metric._defaults) for metric in (fed([12]), fed([3]))
    ]
    assert sizes[0] == sizes[1]


def test_wrong_input_is_refused_with_its_reason():
    maps, boxes, keys, predictions, labels = cases(2)
    metric = MaxBoxAcc(CUTS, replicates=2)
    metric.update(maps[:0], [], keys[:0])
    with pytest.raises(CalmError, match="no image"):
        metric.compute()
    for bad in (maps * 2, maps - 1, maps * torch.nan):
        with pytest.raises(CalmError, match="0, 1"):
            metric.update(bad, boxes, keys)
    with pytest.raises(CalmError, match="at least one"):
        metric.update(maps, [boxes[0], torch.empty(0, 4)], keys)
    with pytest.raises(CalmError, match="one each"):
        metric.update(maps, boxes[:1], keys)
    with pytest.raises(CalmError, match="labels"):
        metric.update(maps, boxes, keys, predictions)
    for wrong in (predictions[:, 0], predictions[:1], predictions[None]):
        with pytest.raises(CalmError, match="by falling probability"):
            metric.update(maps, boxes, keys, wrong, labels)
    with pytest.raises(CalmError, match="by falling probability"):
        metric.update(maps, boxes, keys, predictions, labels[:1])
    with pytest.raises(CalmError, match="images, height, width"):
        metric.update(maps[:, None], boxes, keys)
    assert not metric.images.any()
    with pytest.raises(CalmError, match="ious"):
        MaxBoxAcc(ious=(0.5, 30))
    metric.update(maps, boxes, keys, predictions, labels)
    metric.update(maps, boxes, keys + 2)
    with pytest.raises(CalmError, match="2 of 4"):
        metric.compute()
