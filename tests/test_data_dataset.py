"""calm.data.dataset: the same images whoever reads them."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tifffile
import torch
from data_files import write_image, write_pack
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from calm.config import Interpolation
from calm.data import dataset as dataset_module
from calm.data.augmentation import Augmentation, Crop
from calm.data.dataset import EpochSampler, ImageDataset, Remainder
from calm.data.loading import load_split
from calm.data.records import Record, Split
from calm.data.transforms import eval_transform, fixed_size, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing
from calm.inference import seeded

SMALL = Preprocessing((6, 8))
VARIED = Augmentation(crop="random-resized-crop", automatic="trivial", brightness=0.3, erase=0.5)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return load_split(write_pack(tmp_path, {"train": [0, 1] * 6}), "train", val_fraction=0)


def _augmented(split: Split, **options: int) -> ImageDataset:
    return ImageDataset(split, train_transform(VARIED, SMALL), **options)  # type: ignore[arg-type]


def _all(dataset: ImageDataset) -> Tensor:
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_dataset_item_is_image_label_index(split: Split) -> None:
    image, label, index = ImageDataset(split, eval_transform(SMALL))[3]
    assert torch.equal(image, SMALL(split.records[3].path)[0])
    assert (label, index) == (1, 3)
    with pytest.raises(IndexError):
        ImageDataset(split, eval_transform(SMALL))[12]


def test_dataset_augments_by_seed_epoch_and_index_alone(split: Split) -> None:
    dataset = _augmented(split)
    first = _all(dataset)
    random.seed(1), np.random.seed(1), torch.manual_seed(99)  # noqa: NPY002
    backwards = torch.stack([dataset[index][0] for index in reversed(range(12))]).flip(0)
    assert torch.equal(first, backwards)
    assert torch.equal(first, _all(_augmented(split)))
    dataset.set_epoch(1)
    assert dataset.epoch == 1
    assert not torch.equal(first, _all(dataset))
    assert not torch.equal(first, _all(_augmented(split, seed=1)))
    dataset.set_epoch(0)
    assert torch.equal(first, _all(dataset))


def test_dataset_augments_two_images_of_the_same_pixels_apart(split: Split) -> None:
    twins = replace(split, records=(split.records[0], split.records[0]))
    first, second = _all(_augmented(twins))
    assert not torch.equal(first, second)


def test_dataset_leaves_the_generators_as_they_were(split: Split) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    _all(_augmented(split))
    with pytest.raises(RuntimeError), seeded(1):
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def _epochs(dataset: ImageDataset, workers: int, epochs: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    sampler = EpochSampler(dataset, 4, seed=3)
    loader = DataLoader(
        dataset,
        batch_size=sampler.local_batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        images, _, indices = zip(*loader, strict=True)
        yield torch.cat(images), torch.cat(indices)
    del loader
    gc.collect()


def test_sampler_draws_classes_equally_often_and_alike_in_every_run(tmp_path: Path) -> None:
    records = tuple(Record(str(number), tmp_path / "x", int(number >= 90)) for number in range(100))
    dataset = ImageDataset(Split("train", records, ("many", "few"), tmp_path), eval_transform(SMALL))
    plain, balanced = (EpochSampler(dataset, 10, seed=3, balance=balance) for balance in (False, True))
    drawn: list[int] = []
    for epoch in range(40):
        balanced.set_epoch(epoch)
        order = list(balanced)
        assert order == list(balanced)
        drawn += order
    assert len(drawn) == 4000
    assert abs(sum(index >= 90 for index in drawn) / 4000 - 0.5) < 0.04  # five standard errors
    assert set(drawn) == set(range(100))
    assert sorted(plain) == list(range(100))
    parts = [EpochSampler(dataset, 10, seed=3, balance=True, rank=rank, world_size=2) for rank in (0, 1)]
    halves = [[list(part)[start : start + 5] for start in range(0, 50, 5)] for part in parts]
    assert [index for pair in zip(*halves, strict=True) for half in pair for index in half] == order


@pytest.mark.parametrize("cache", [False, True])
def test_dataset_is_the_same_for_workers_that_live_across_epochs(split: Split, cache: bool) -> None:
    alone = list(_epochs(_augmented(split), 0))
    helped = list(_epochs(ImageDataset(split, train_transform(VARIED, SMALL), cache=cache), 2))
    for (images, indices), (images_2, indices_2) in zip(alone, helped, strict=True):
        assert torch.equal(indices, indices_2)
        assert torch.equal(images, images_2)
    assert not torch.equal(alone[0][1], alone[1][1])
    assert not torch.equal(alone[0][0], alone[1][0])


def test_dataset_is_the_same_for_a_run_that_starts_at_a_later_epoch(split: Split) -> None:
    whole = list(_epochs(_augmented(split), 0))
    dataset = _augmented(split)
    sampler = EpochSampler(dataset, 4, seed=3)
    sampler.set_epoch(2)
    resumed = torch.stack([dataset[index][0] for index in sampler])
    assert torch.equal(resumed, whole[2][0])


def test_cache_holds_the_very_pixels_and_needs_no_file(split: Split, tmp_path: Path) -> None:
    plain = ImageDataset(split, eval_transform(SMALL))
    cached = ImageDataset(split, eval_transform(SMALL), cache=True)
    before = _all(plain)
    for record in split.records:
        record.path.unlink()
    assert torch.equal(_all(cached), before)
    picture = cached.picture(0)
    assert (picture.mode, picture.size) == ("RGB", (8, 6))
    with pytest.raises(CalmError, match=r"0.png: no such file"):
        plain[0]


def test_cache_holds_images_of_different_sizes(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{side}.png", (side, side + 1), side) for side in (3, 7, 5)]
    split = Split("train", tuple(Record(path.name, path, 0) for path in paths), ("a",), tmp_path)
    cached = ImageDataset(split, eval_transform(SMALL), cache=True)
    for index, path in enumerate(paths):
        assert np.array_equal(np.asarray(cached.picture(index)), np.asarray(Image.open(path)))


@pytest.mark.parametrize("crop", ["resize-crop", "pad-shift", "none"])
def test_cache_of_resized_pictures_changes_no_pixel_and_shows_the_original(tmp_path: Path, crop: Crop) -> None:
    sizes = [(40, 30), (9, 17), (16, 20), (64, 64)]
    paths = [write_image(tmp_path / f"{number}.png", size, number) for number, size in enumerate(sizes)]
    split = Split("train", tuple(Record(path.name, path, 0) for path in paths), ("a",), tmp_path)
    augmentation, wide = Augmentation(crop=crop, brightness=0.3), Preprocessing((20, 16))
    size = fixed_size(augmentation, wide.size)
    transform = train_transform(augmentation, wide)
    cached = ImageDataset(split, transform, cache=True, cache_size=size)
    assert torch.equal(_all(cached), _all(ImageDataset(split, transform)))
    assert cached.picture(0).size == (40, 30)


@pytest.mark.parametrize(("channels", "how"), [(1, "bicubic"), (5, "bilinear")])
@pytest.mark.parametrize("crop", get_args(Crop))
def test_dataset_reads_and_augments_images_of_other_channels(
    tmp_path: Path, crop: Crop, channels: int, how: Interpolation
) -> None:
    paths = [tmp_path / f"{number}.tif" for number in range(2)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(number).integers(0, 4096, (40, 30, channels), dtype=np.uint16)
        planes = {"planarconfig": "contig"} if channels > 1 else {}
        tifffile.imwrite(path, values.squeeze(), photometric="minisblack", **planes)
    split = Split("train", tuple(Record(path.name, path, 0) for path in paths), ("a",), tmp_path)
    prepare = Preprocessing((20, 16), mean=(0.5,) * channels, std=(0.5,) * channels, bits=12, interpolation=how)
    augmentation = Augmentation(crop=crop, erase=0.5)
    transform, size = train_transform(augmentation, prepare), fixed_size(augmentation, prepare.size)
    augmented = _all(ImageDataset(split, transform, preprocessing=prepare))
    assert augmented.shape == (2, channels, 20, 16)
    assert augmented.std() > 0.1
    cached = ImageDataset(split, transform, preprocessing=prepare, cache=True, cache_size=size)
    assert torch.equal(_all(cached), augmented)
    assert cached.picture(0).size == (30, 40)
    assert cached.picture(0).mode == "RGB"
    tested = _all(ImageDataset(split, eval_transform(prepare), preprocessing=prepare))
    assert torch.equal(tested, prepare(paths))


def test_train_transform_refuses_to_change_the_colours_of_five_channels() -> None:
    prepare = Preprocessing(mean=(0.5,) * 5, std=(0.5,) * 5)
    for options in ({"brightness": 0.1}, {"automatic": "trivial"}):
        with pytest.raises(CalmError, match="1 or 3 channels, and these have 5: set automatic to none"):
            train_transform(Augmentation(**options), prepare)
    grey = train_transform(Augmentation(automatic="trivial", brightness=0.1), Preprocessing(mean=(0.5,), std=(0.5,)))
    assert grey(Image.new("L", (9, 9), 7)).shape == (1, 224, 224)


def test_cache_for_testing_holds_the_input_size(split: Split) -> None:
    cached = ImageDataset(split, eval_transform(SMALL), cache=True, cache_size=SMALL.size)
    plain = _all(ImageDataset(split, eval_transform(SMALL)))
    for record in split.records:
        record.path.unlink()
    assert torch.equal(_all(cached), plain)


def test_cache_beyond_the_memory_is_refused(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "_memory", lambda: 2 * 5 * 8 * 6 * 3)
    with pytest.raises(CalmError, match=r"5 of 12 images fit"):
        ImageDataset(split, eval_transform(SMALL), cache=True)


def test_dataset_rotates_pictures_as_the_split_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    split = Split("train", (Record("a.jpg", tmp_path / "a.jpg", 0),), ("a",), tmp_path)
    for cache in (False, True):
        stored = ImageDataset(split, eval_transform(SMALL), cache=cache)
        shown = ImageDataset(replace(split, exif=True), eval_transform(SMALL), cache=cache)
        assert stored.picture(0).size == (4, 2)
        assert shown.picture(0).size == (2, 4)


def test_dataset_refuses_an_empty_split(tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="has no images"):
        ImageDataset(Split("val", (), ("a",), tmp_path), eval_transform(SMALL))


def _unread(size: int) -> ImageDataset:
    """A data set of which only the length is used."""
    record = Record("a.png", Path("a.png"), 0)
    return ImageDataset(Split("train", (record,) * size, ("a",), Path()), eval_transform(SMALL))


def _batches(size: int, batch: int, ranks: int, remainder: Remainder, *, shuffle: bool = True) -> list[list[list[int]]]:
    """By process, the batches a data loader forms."""
    result = []
    for rank in range(ranks):
        sampler = EpochSampler(
            _unread(size), batch, seed=5, shuffle=shuffle, remainder=remainder, rank=rank, world_size=ranks
        )
        sampler.set_epoch(7)
        indices = list(sampler)
        assert len(indices) == len(sampler)
        step = sampler.local_batch_size
        result.append([indices[start : start + step] for start in range(0, len(indices), step)])
    return result


sizes = st.tuples(st.integers(1, 70), st.integers(1, 6), st.integers(1, 4))


@settings(deadline=None)
@given(sizes, st.booleans())
def test_sampler_union_of_all_processes_is_the_batch_of_one(case: tuple[int, int, int], shuffle: bool) -> None:
    size, local, ranks = case
    for remainder in ("drop", "keep"):
        if remainder == "drop" and local * ranks > size:
            continue
        (alone,) = _batches(size, local * ranks, 1, remainder, shuffle=shuffle)
        several = _batches(size, local * ranks, ranks, remainder, shuffle=shuffle)
        joined = [
            [index for batches in several if step < len(batches) for index in batches[step]]
            for step in range(len(alone))
        ]
        assert joined == alone
        seen = sorted(index for batch in alone for index in batch)
        assert seen == (list(range(size)) if remainder == "keep" else seen)
        assert len(set(seen)) == len(seen) == (size if remainder == "keep" else size - size % (local * ranks))


def test_sampler_order_changes_with_epoch_and_seed_and_not_with_ranks() -> None:
    def order(epoch: int, seed: int = 0, ranks: int = 1) -> list[int]:
        sampler = EpochSampler(_unread(40), 4, seed=seed, rank=0, world_size=ranks)
        sampler.set_epoch(epoch)
        return sampler.order()

    assert order(0) == order(0, ranks=2)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1)), tuple(range(40))}) == 4
    assert list(EpochSampler(_unread(5), 2, shuffle=False, remainder="keep")) == [0, 1, 2, 3, 4]


def test_sampler_sets_the_epoch_of_its_dataset_and_begins_with_it(split: Split) -> None:
    dataset = _augmented(split)
    dataset.set_epoch(4)
    sampler = EpochSampler(dataset, 4)
    assert sampler.epoch == 4
    assert (sampler.rank, sampler.world_size, sampler.steps) == (0, 1, 3)
    sampler.set_epoch(5)
    assert dataset.epoch == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7, "world_size": 2, "rank": 0}, "batch_size is 7: give a multiple of the 2 processes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 41}, "batch_size is 41, but there are only 40 images"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank is 2: allowed are 0 to world_size - 1 = 1"),
        ({"batch_size": 4, "remainder": "dropp"}, "unknown remainder 'dropp'.*did you mean 'drop'"),
    ],
)
def test_sampler_refuses_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        EpochSampler(_unread(40), **options)  # type: ignore[arg-type]


def test_sampler_takes_rank_and_world_size_from_the_process_group(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        sampler = EpochSampler(_unread(8), 4)
        assert (sampler.rank, sampler.world_size) == (0, 1)
        other = EpochSampler(_unread(8), 4, rank=1, world_size=2)
        assert (other.rank, other.local_batch_size, len(other)) == (1, 2, 4)
    finally:
        distributed.destroy_process_group()
