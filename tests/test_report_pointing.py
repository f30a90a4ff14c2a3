"""Pointing at the part that tells two classes apart, against a slow reading and on known maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calm.data import load_splits
from calm.data.birds import write_birds
from calm.data.cue_files import read_part_points
from calm.errors import CalmError
from calm.report.pointing import chance, interval, point, read_task


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    root = tmp_path_factory.mktemp("pointing") / "birds"
    write_birds(root, species=3, images_per_species=8, size=40, seed=1, workers=1)
    split = load_splits(root, ["test"])["test"]
    return root, split, read_task(split, root)


def test_the_samples_are_the_images_of_one_part_pairs_that_show_the_part(birds):
    root, split, task = birds
    assert [(pair.first, pair.second, pair.groups) for pair in task.pairs] == [(0, 1, (6,))]  # the wing
    points = read_part_points(root)
    wings = points.visible[:, [8, 12]].any(dim=1)
    expected = [
        i for i, record in enumerate(split.records)
        if record.label < 2 and wings[points.ids.index(record.id)] and (task.regions[i] == 6).any()
    ]  # fmt: skip
    assert task.image.tolist() == expected
    assert len(expected) > 2


def test_a_perfect_map_hits_with_all_its_mass_and_its_negative_with_none(birds):
    _, _, task = birds
    truth = task.truth(torch.arange(len(task.image)))
    taken = iter(torch.split(truth.float(), 64))
    perfect = point(task, lambda *_: next(taken), "minmax")
    assert perfect.hit.all()
    assert torch.allclose(perfect.mass, torch.ones(len(truth)))
    taken = iter(torch.split(1 - truth.float(), 64))
    worst = point(task, lambda *_: next(taken), "minmax")
    assert not worst.hit.any()
    assert worst.mass.max() == 0


def test_hits_and_mass_are_those_of_a_slow_reading_and_classes_come_in_order(birds):
    _, _, task = birds
    rng = np.random.default_rng(0)
    maps = torch.tensor(rng.uniform(-1, 1, (len(task.image), 224, 224)), dtype=torch.float32)
    asked = []

    def explain(image, first, second):
        asked.extend(zip(image.tolist(), first.tolist(), second.tolist(), strict=True))
        return maps[: len(image)]

    got = point(task, explain, "minmax")
    assert asked == [(i, 0, 1) for i in task.image.tolist()]
    for sample, values in enumerate(maps.numpy().astype(np.float64)):
        region = task.regions[task.image[sample]].numpy() == 6
        y, x = np.unravel_index(values.argmax(), values.shape)
        scaled = (values - values.min()) / (values.max() - values.min())
        assert bool(got.hit[sample]) == region[y, x]
        assert float(got.mass[sample]) == pytest.approx(scaled[region].sum() / scaled.sum(), rel=1e-4)


def test_chance_is_the_share_of_the_picture_and_of_the_bird(birds):
    _, _, task = birds
    picture, bird = chance(task)
    for sample, image in enumerate(task.image.tolist()):
        region = task.regions[image].numpy()
        assert float(picture.hit[sample]) == pytest.approx((region == 6).mean())
        assert float(bird.mass[sample]) == pytest.approx((region == 6).sum() / (region >= 0).sum())


def test_the_interval_counts_images_not_samples():
    values = torch.tensor([0.0, 1.0] * 50)
    narrow = interval(values, torch.arange(100))
    assert narrow[0] < 0.5 < narrow[1]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.05, rel=0.2)  # the normal approximation
    wide = interval(values.sort().values, torch.arange(100) // 25)  # 4 images with 25 equal samples each
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert interval(torch.ones(5), torch.arange(5)) == (1.0, 1.0)


def test_species_without_a_near_relative_are_refused(birds, tmp_path):
    root = tmp_path / "birds"
    write_birds(root, species=3, images_per_species=4, size=40, seed=1, workers=1)
    table = root / "attributes" / "class_attribute_labels_continuous.txt"
    table.write_text(table.read_text().splitlines()[0].join(["", "\n"]) * 3)  # three equal classes
    with pytest.raises(CalmError, match="exactly one part group"):
        read_task(load_splits(root, ["test"])["test"], root)
