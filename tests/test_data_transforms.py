"""calm.data.transforms and calm.data.augmentation: each option does what it says."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor

from calm.config import Interpolation
from calm.data.augmentation import AUGMENTATIONS, Augmentation
from calm.data.transforms import BatchMix, eval_transform, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing

PLAIN = Augmentation(crop="none", flip=0.0)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Every pixel differs from its mirror image and its neighbours."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), (x * 7 + y * 13) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def varied(augmentation: Augmentation, size: tuple[int, int] = (30, 40), draws: int = 24) -> Tensor:
    """Several random results for one picture, (draws, 3, H, W)."""
    transform = train_transform(augmentation, Preprocessing(size))
    return torch.stack([transform(picture()) for _ in range(draws)])


def test_eval_transform_is_exactly_the_models_preprocessing() -> None:
    preprocessing = Preprocessing((17, 23), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.equal(eval_transform(preprocessing)(picture()), preprocessing(picture())[0])


@pytest.mark.parametrize("how", get_args(Interpolation))
def test_train_transform_without_augmentation_equals_testing(how: Interpolation) -> None:
    preprocessing = Preprocessing((17, 23), interpolation=how)
    whole = Augmentation(crop="random-resized-crop", area=(1, 1), aspect=(1, 1), flip=0.0)  # of a square
    for augmentation, image in ((AUGMENTATIONS["none"], picture()), (whole, picture(40, 40))):
        found = train_transform(augmentation, preprocessing)(image)
        assert torch.equal(found, preprocessing(image)[0])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(224, 224), (32, 48), (8, 8)])
def test_train_transform_gives_normalised_images_of_the_models_size(name: str, size: tuple[int, int]) -> None:
    transform = train_transform(AUGMENTATIONS[name], Preprocessing(size))
    found = pickle.loads(pickle.dumps(transform))(picture())
    assert found.shape == (3, *size)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    low, high = (Preprocessing().normalize(torch.full((3, 1, 1), v)) for v in (0.0, 1.0))
    assert (found >= low - 1e-5).all()
    assert (found <= high + 1e-5).all()


def test_train_transform_published_cuts_224_from_256() -> None:
    augmentation = dataclasses.replace(AUGMENTATIONS["published"], flip=0.0)
    whole = Preprocessing((256, 256))(picture())[0]
    found = varied(augmentation, (224, 224), 12)
    windows = whole.unfold(1, 224, 1).unfold(2, 224, 1)  # (3, 33, 33, 224, 224)
    places = set()
    for one in found:
        hits = (windows[0, :, :, 0, 0] == one[0, 0, 0]) & (windows[2, :, :, 0, 0] == one[2, 0, 0])
        match = [(int(y), int(x)) for y, x in hits.nonzero() if torch.equal(windows[:, y, x], one)]
        assert match
        places.add(match[0])
    assert len(places) > 8


def test_train_transform_pad_shift_moves_by_at_most_the_share_and_mirrors_the_edge() -> None:
    preprocessing = Preprocessing((32, 48))
    whole = preprocessing(picture(48, 32))
    padded = torch.nn.functional.pad(whole, (3, 3, 2, 2), mode="reflect")[0]  # 48/16 = 3 and 32/16 = 2
    windows = padded.unfold(1, 32, 1).unfold(2, 48, 1)
    transform = train_transform(dataclasses.replace(AUGMENTATIONS["small"], flip=0.0), preprocessing)
    places = set()
    for _ in range(60):
        found = transform(picture(48, 32))
        (match,) = [(y, x) for y in range(5) for x in range(7) if torch.equal(windows[:, y, x], found)]
        places.add(match)
    assert len(places) > 20


def test_train_transform_flips_that_often() -> None:
    plain = varied(PLAIN, draws=1)[0]
    found = varied(dataclasses.replace(PLAIN, flip=0.25), draws=400)
    flipped = sum(torch.equal(one, plain.flip(-1)) for one in found)
    assert flipped + sum(torch.equal(one, plain) for one in found) == 400
    assert 60 < flipped < 140
    assert all(torch.equal(one, plain.flip(-1)) for one in varied(dataclasses.replace(PLAIN, flip=1.0), draws=3))


def test_train_transform_random_resized_crop_shows_a_share_of_the_image() -> None:
    """Red grows with x: its range over the crop tells the share of the width, green that of the height."""
    preprocessing = Preprocessing((30, 40))
    augmentation = dataclasses.replace(PLAIN, crop="random-resized-crop", area=(0.2, 0.4), aspect=(1.0, 1.0))
    transform = train_transform(augmentation, preprocessing)
    for _ in range(20):
        image = preprocessing.denormalize(transform(picture()))
        share = float((image[0].max() - image[0].min()) * (image[1].max() - image[1].min()))
        assert 0.1 < share < 0.45


@pytest.mark.parametrize(
    "options",
    [
        {"automatic": "trivial"},
        {"automatic": "rand"},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 0.3},
        {"erase": 1.0},
        {"crop": "random-resized-crop"},
        {"crop": "pad-shift"},
        {"crop": "resize-crop"},
        {"flip": 0.5},
    ],
)
def test_train_transform_varies_with_each_option(options: dict[str, Any]) -> None:
    found = varied(dataclasses.replace(PLAIN, **options))
    plain = varied(PLAIN, draws=1)[0]
    different = {one.numpy().tobytes() for one in found if not torch.equal(one, plain)}
    assert len(different) >= (1 if "flip" in options else 8)


@pytest.mark.parametrize(
    ("base", "option", "value"),
    [
        ({"crop": "resize-crop"}, "resize_ratio", 2.0),
        ({"crop": "pad-shift"}, "shift", 0.95),
        ({"crop": "random-resized-crop"}, "area", (0.9, 1.0)),
        ({"crop": "random-resized-crop"}, "aspect", (2.0, 3.0)),
        ({"automatic": "rand"}, "rand_ops", 5),
        ({"automatic": "rand"}, "rand_magnitude", 25),
    ],
)
def test_train_transform_varies_with_each_strength(base: dict[str, Any], option: str, value: object) -> None:
    torch.manual_seed(1)
    before = varied(dataclasses.replace(PLAIN, **base))
    torch.manual_seed(1)
    after = varied(dataclasses.replace(PLAIN, **base, **{option: value}))
    assert not torch.equal(before, after)


def test_train_transform_erases_a_rectangle_to_the_mean_colour() -> None:
    plain = varied(PLAIN, draws=1)[0]
    for one in varied(dataclasses.replace(PLAIN, erase=1.0)):
        changed = (one != plain).any(0)
        assert (one[:, changed] == 0).all()
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert changed.sum() >= 0.98 * box


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center"}, "unknown augmentation.crop 'center'"),
        ({"automatic": "auto"}, "unknown augmentation.automatic 'auto'"),
        ({"flip": 1.5}, "augmentation.flip is 1.5: allowed are 0 to 1"),
        ({"resize_ratio": 0.9}, "augmentation.resize_ratio is 0.9"),
        ({"hue": 0.6}, "allowed are 0 to 0.5"),
        ({"area": (0.0, 1.0)}, r"augmentation.area is \(0.0, 1.0\)"),
        ({"area": (0.5, 1.5)}, "largest <= 1"),
        ({"aspect": (2.0, 1.0)}, "augmentation.aspect"),
        ({"mixup": float("nan")}, "augmentation.mixup is nan"),
    ],
)
def test_augmentation_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        Augmentation(**options)


def test_augmentation_turns_lists_into_tuples() -> None:
    assert Augmentation(area=[0.5, 1.0]) == Augmentation(area=(0.5, 1.0))  # type: ignore[arg-type]


def _batch(size: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Image i is constant i."""
    return torch.arange(size).float().view(-1, 1, 1, 1).expand(size, 3, 8, 8).clone(), torch.arange(size) % classes


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 3), st.integers(0, 5), st.integers(0, 50))
def test_batch_mix_mixup_mixes_images_and_targets_by_the_same_share(
    size: int, seed: int, epoch: int, step: int
) -> None:
    images, labels = _batch(size)
    mixed, targets, _ = BatchMix(Augmentation(mixup=0.4), 3)(images, labels, seed=seed, epoch=epoch, step=step)
    assert torch.equal(images, _batch(size)[0])
    rows = torch.nn.functional.one_hot(labels, 3).float()
    share = float((mixed[1, 0, 0, 0] - images[0, 0, 0, 0]) / (images[1, 0, 0, 0] - images[0, 0, 0, 0]))
    assert 0 <= share <= 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(targets, share * rows + (1 - share) * rows.roll(1, 0), atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 50))
def test_batch_mix_cutmix_targets_are_the_shares_of_the_pixels(seed: int, step: int) -> None:
    images, labels = _batch(4, 4)
    mixed, targets, window = BatchMix(Augmentation(cutmix=1.0), 4)(images, labels, seed=seed, epoch=0, step=step)
    assert window is not None
    x0, y0, x1, y1 = window
    pasted = images.clone()
    pasted[..., y0:y1, x0:x1] = images.roll(1, 0)[..., y0:y1, x0:x1]
    assert torch.equal(mixed, pasted)
    for index in range(4):
        for label in range(4):
            share = (mixed[index] == images[label]).float().mean()
            assert float(targets[index, label]) == pytest.approx(float(share), abs=1e-5)


def test_batch_mix_depends_on_the_batchs_number_and_leaves_the_generator_alone() -> None:
    mix = BatchMix(Augmentation(mixup=1.0, cutmix=1.0), 3)
    images, labels = _batch()
    state = torch.get_rng_state()

    def run(**where: int) -> bytes:
        return mix(images, labels, **where)[0].numpy().tobytes()  # type: ignore[arg-type]

    first = run(seed=0, epoch=1, step=2)
    torch.rand(3)
    assert run(seed=0, epoch=1, step=2) == first
    others = [run(seed=1, epoch=1, step=2), run(seed=0, epoch=2, step=2), run(seed=0, epoch=1, step=3)]
    others.append(run(seed=0, epoch=1, step=2, rank=1))
    assert len({first, *others}) == 5
    torch.set_rng_state(state)
    run(seed=0, epoch=0, step=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_mix_alternates_and_leaves_some_batches() -> None:
    images, labels = _batch()
    mix = BatchMix(Augmentation(mixup=0.5, cutmix=0.5, mix_probability=0.6), 3)
    plain = cut = blended = 0
    for step in range(300):
        mixed, targets, window = mix(images, labels, seed=0, epoch=0, step=step)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        if torch.equal(mixed, images):
            plain += 1
            assert window is None or window[0] == window[2] or window[1] == window[3]
        elif torch.equal(mixed, mixed.round()):
            cut += 1
        else:
            blended += 1
    assert plain > 80
    assert cut > 40
    assert blended > 40


def test_batch_mix_targets_are_one_hot_without_mixing() -> None:
    images, labels = _batch()
    assert not Augmentation().mixes
    assert not Augmentation(mixup=1.0, mix_probability=0.0).mixes
    assert Augmentation(cutmix=1.0).mixes
    mixed, targets, _ = BatchMix(Augmentation(), 3)(images, labels, seed=0, epoch=0, step=0)
    assert torch.equal(mixed, images)
    assert torch.equal(targets.argmax(1), labels)
    with pytest.raises(CalmError, match="num_classes is 1"):
        BatchMix(Augmentation(mixup=1.0), 1)
