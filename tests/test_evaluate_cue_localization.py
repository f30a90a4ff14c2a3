"""Cue localization over a data set, against the protocol written out pair by pair and pixel by pixel."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics_cue_localization import exact_area

import calm
from calm.data import load_splits
from calm.data.cues import read_part_groups
from calm.errors import CalmError
from calm.evaluate.cue_localization import cue_localization, read_cue_data
from calm.evaluate.result import Result
from calm.evaluate.subject import model_subject
from calm_birds import write_birds

GROUPS = ["head", "back", "belly", "breast", "tail", "leg", "wing"]
WORDS = [["bill", "crown", "eye", "forehead", "head", "nape", "throat"], *[[g] for g in GROUPS[1:]]]
POINTED = ["peak_in_part", "mass_in_part", "part_of_image", "part_of_object"]
POINTS = [[[2, 5, 6, 7, 10, 11, 15]], [[1]], [[3]], [[4]], [[14]], [[8], [12]], [[9], [13]]]


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    root = tmp_path_factory.mktemp("cues") / "birds"
    write_birds(root, species=5, images_per_species=6, size=40, seed=2, workers=1)
    return root, load_splits(root, ["test"])["test"]


@pytest.fixture(scope="module")
def models(birds):
    torch.manual_seed(0)
    size = calm.Preprocessing(size=(48, 48))
    known = {"class_names": birds[1].class_names, "preprocessing": size}
    return {m: calm.create_model("tiny_resnet", 5, m, **known).eval() for m in ("calm-em", "cam")}


def slow_pairs(root):
    names = [line.split(" ", 1)[1] for line in (root / "attributes/attributes.txt").read_text().splitlines()]
    table = np.loadtxt(root / "attributes/class_attribute_labels_continuous.txt") >= 50
    for a, b in combinations(range(len(table)), 2):
        groups = sorted(
            {g for n in np.flatnonzero(table[a] != table[b]) for g in range(7) if any(w in names[n] for w in WORDS[g])}
        )
        if len(groups) in (1, 2, 3):
            yield a, b, groups


def slow_truth(root, record, groups):
    """Pixels of the groups and how many the bird has; None if no part of them is visible."""
    ids = dict(line.split(" ", 1)[::-1] for line in (root / "images.txt").read_text().splitlines())
    rows = [line.split() for line in (root / "parts/part_locs.txt").read_text().splitlines()]
    parts = {int(r[1]): (float(r[2]), float(r[3])) for r in rows if r[0] == ids[record.id] and r[4] == "1"}
    with Image.open(record.path) as image:
        width, height = image.size
    centres = []
    for group, points in enumerate(POINTS):
        for members in points:
            here = [parts[m] for m in members if m in parts]
            if here:
                x, y = (sum(v[axis] for v in here) / len(here) for axis in (0, 1))
                centres.append((int(x * 224 / width), int(y * 224 / height), group))
    if not any(group in groups for *_, group in centres):
        return None
    rows, columns = np.mgrid[:224, :224]
    distance = np.stack([(columns - x) ** 2 + (rows - y) ** 2 for x, y, _ in centres])
    owner = np.array([group for *_, group in centres])[distance.argmin(axis=0)]
    with Image.open(record.masks[0]) as image:
        grey = image.convert("L").resize((224, 224), Image.Resampling.BICUBIC)
    mask = np.array(grey) > 0
    return np.isin(owner, groups) & mask, mask.sum()


def slow_pxap(scores, truth, edges, released):
    """Threshold by threshold, from sorted scores."""
    order = np.argsort(scores)
    ordered, truth = scores[order].astype(float), truth[order]
    above = np.append(truth[::-1].cumsum()[::-1], 0)  # true pixels from each place on
    positives = above[np.searchsorted(ordered, edges[0])] if released else above[0]
    area = last = 0.0
    for edge in sorted(edges, reverse=True):
        place = np.searchsorted(ordered, edge)
        if place < len(ordered):
            recall = above[place] / positives
            area += above[place] / (len(ordered) - place) * (recall - last)
            last = recall
    return area


@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_cue_localization_equals_the_protocol_pair_by_pair(birds, models, method):
    root, split = birds
    model = models[method]
    edges = np.linspace(0, 0.999, 1000) if method == "cam" else 10.0 ** -(np.arange(1000)[::-1] * 0.007)
    got = cue_localization(model_subject(model), split, root, batch_size=4, replicates=20)
    wanted, released, pooled, pointed = {1: [], 2: [], 3: []}, {1: [], 2: [], 3: []}, [], []
    exact = {"raw": [], "stretched": []}
    for row, (a, b, groups) in zip(got.details["pairs"], slow_pairs(root), strict=True):
        scores, truths, points, raw = [], [], [], []
        for record in split.records:
            found = slow_truth(root, record, groups) if record.label in (a, b) else None
            if found is None:
                continue
            truth, area = found
            image = model.preprocess(record.path)
            one, other = (model(image).attribute(torch.tensor([c])).detach() for c in (a, b))
            grid = (one - other).abs()[:, None]
            big = torch.nn.functional.interpolate(grid, size=(224, 224), mode="bilinear")[0, 0].numpy()
            raw.append(big)
            big = (big - big.min()) / (big.max() - big.min()) if method == "cam" else big.clip(0, 1)
            scores.append(big)
            truths.append(truth)
            if truth.any():
                peak, mass = truth.ravel()[big.argmax()], big[truth].sum(dtype=float) / big.sum(dtype=float)
                points.append((peak, mass, truth.mean(), truth.sum() / area))
        assert row["shown"] == len(points)
        if points:
            assert [row[name] for name in POINTED] == pytest.approx(np.mean(points, axis=0), abs=1e-5)
        pointed += points if len(groups) == 1 else []
        if scores:
            scores, truths = np.stack(scores).ravel(), np.stack(truths).ravel()
            wanted[len(groups)].append(slow_pxap(scores, truths, edges, False))
            released[len(groups)].append(slow_pxap(scores, truths, edges, True))
            pooled.append(truths.mean())
            stretched = [(one - one.min()) / (one.max() - one.min()) for one in raw]
            for name, maps in (("raw", raw), ("stretched", stretched)):
                exact[name].append(exact_area(torch.tensor(np.stack(maps).ravel()), torch.tensor(truths)))
    every = [value for values in wanted.values() for value in values]
    assert len(every) >= 3
    assert got.figures["mpxap"].value == pytest.approx(np.mean(every), abs=2e-5)
    for name, values in exact.items():
        assert got.figures[f"mpxap_{name}"].value == pytest.approx(np.mean(values), abs=1e-4), name
        shown = [row[f"pxap_{name}"] for row in got.details["pairs"] if row["images"]]
        assert shown == pytest.approx(values, abs=2e-4)
    assert got.figures["chance"].value == pytest.approx(np.mean(pooled))
    assert len(pointed) > 3
    figures = [got.figures[name].value for name in POINTED]
    assert figures == pytest.approx(np.mean(pointed, axis=0), abs=1e-5)
    for number, values in wanted.items():
        if values:
            assert got.figures[f"mpxap_{number}"].value == pytest.approx(np.mean(values), abs=2e-5)
            assert got.figures[f"mpxap_released_{number}"].value == pytest.approx(np.mean(released[number]), abs=2e-5)
    assert got.details["samples"] > got.details["images"]  # images serve several pairs


def test_cue_localization_does_not_depend_on_batches(birds, models):
    root, split = birds
    one, many = (
        cue_localization(model_subject(models["cam"]), split, root, batch_size=size, replicates=5) for size in (1, 7)
    )
    for name, estimate in one.figures.items():
        assert many.figures[name].value == pytest.approx(estimate.value, abs=1e-5), name


def test_cue_localization_predicts_each_image_once(birds, models):
    root, split = birds
    subject, seen = model_subject(models["calm-em"]), []

    def predict(images):
        seen.append(len(images))
        return subject.predict(images)

    counting = type(subject)(**{**vars(subject), "predict": predict})
    result = cue_localization(counting, split, root, batch_size=4, replicates=5)
    assert sum(seen) == result.details["images"]


def test_cue_localization_of_the_truth_itself_is_perfect(birds):
    """A subject whose map of the pair's first class is 1 on the wing, for the pair that differs in the wing."""
    root, split = birds
    data = read_cue_data(split, root)
    number, pair = next((n, p) for n, p in enumerate(data.pairs) if len(p.groups) == 1)
    samples = {image: (number,) for image, pairs in data.samples.items() if number in pairs}
    data = type(data)(**{**vars(data), "samples": samples})
    order = iter(samples)

    class Perfect:
        def __init__(self, images):
            self.probs = torch.full((len(images), split.num_classes), 1 / split.num_classes)
            regions = data.regions(split.records, torch.tensor([next(order) for _ in images]))
            self.truth = (regions == pair.groups[0]).float()

        def maps(self, classes):
            return self.truth[:, None] * (classes == pair.first)[..., None, None]

    base = calm.evaluate.subject.Subject("oracle", Perfect, calm.Preprocessing(), torch.device("cpu"))
    result = cue_localization(base, split, data, batch_size=3, replicates=5)
    assert result.figures["mpxap"].value == 1.0
    assert result.figures["peak_in_part"] == (1.0, 1.0, 1.0)
    assert result.figures["mass_in_part"].value == pytest.approx(1.0)
    assert set(result.scores.values()) == {1.0}


def test_cue_localization_needs_no_segmentations(birds, models):
    root, split = birds
    bare = replace(split, records=tuple(replace(record, masks=()) for record in split.records))
    result = cue_localization(model_subject(models["cam"]), bare, root, replicates=5)
    assert not result.details["segmented"]
    whole = read_cue_data(bare, root).regions(bare.records, torch.tensor([0]))
    assert (whole >= 0).all()


def test_cue_localization_takes_boxes_in_place_of_masks(birds, models):
    root, split = birds
    data = read_cue_data(split, root)
    images = torch.tensor(sorted(data.samples)[:3])
    regions = data.regions(split.records, images, "box")
    for image, got in zip(images.tolist(), regions, strict=True):
        inside = np.zeros((224, 224), bool)
        (x0, y0, x1, y1), (width, height) = split.records[image].boxes[0], data.sizes[image].tolist()
        for y, x in np.ndindex(224, 224):  # pixels of the protocol that overlap the box
            inside[y, x] = (x + 1) * width > x0 * 224 and x * width < (x1 + 1) * 224
            inside[y, x] &= (y + 1) * height > y0 * 224 and y * height < (y1 + 1) * 224
        np.testing.assert_array_equal((got >= 0).numpy(), inside)
    mask, box = (
        cue_localization(model_subject(models["cam"]), split, root, region=region, replicates=5)
        for region in ("mask", "box")
    )
    assert box.figures["chance"].value > mask.figures["chance"].value
    bare = replace(split, records=tuple(replace(record, boxes=()) for record in split.records))
    with pytest.raises(CalmError, match="has no box"):
        cue_localization(model_subject(models["cam"]), bare, root, region="box", replicates=5)


def test_cue_localization_runs_on_some_of_the_classes(birds, models):
    """By the names of the classes, whatever their numbers; and only on pairs of which both classes have images."""
    root, split = birds
    kept = [1, 3, 4]
    names = tuple(split.class_names[label] for label in kept)
    records = tuple(replace(r, label=kept.index(r.label)) for r in split.records if r.label in kept)
    data = read_cue_data(replace(split, records=records, class_names=names), root, range(1, 8))
    every = {(p.first, p.second): p.groups for p in read_cue_data(split, root, range(1, 8)).pairs}
    assert {(kept[p.first], kept[p.second]): p.groups for p in data.pairs} == {
        pair: groups for pair, groups in every.items() if set(pair) <= set(kept)
    }
    some = replace(split, records=tuple(record for record in split.records if record.label in kept))
    result = cue_localization(model_subject(models["cam"]), some, root, counts=range(1, 8), replicates=5)
    assert len(result.details["pairs"]) == len(data.pairs)
    assert result.details["pairs_of_absent_classes"] == len(every) - len(data.pairs)


def test_cue_localization_names_empty_segmentations(birds, models, tmp_path):
    root, split = birds
    black = tmp_path / "black.png"
    Image.new("L", (40, 40)).save(black)
    bare = replace(split, records=tuple(replace(record, masks=(black,)) for record in split.records))
    with pytest.raises(CalmError, match=r"no test image has a pixel of a part .*black\.png"):
        cue_localization(model_subject(models["cam"]), bare, root, replicates=5)


def test_cue_localization_takes_baselines(birds, models):
    root, split = birds
    some = type(split)(**{**vars(split), "records": split.records[::2]})
    result = cue_localization(model_subject(models["calm-em"], method="gradcam"), some, root, replicates=5)
    assert 0 < result.figures["mpxap"].value < 1
    assert result.label == "CALM-EM gradcam"


def test_read_cue_data_takes_groups_of_the_data_set(birds, models, tmp_path):
    import shutil

    root, _ = birds
    other = tmp_path / "birds"
    shutil.copytree(root, other)
    (other / "parts/groups.yaml").write_text(
        "- {name: upper, words: [wing, back, bill, crown, eye, tail, leg], points: [[1, 9, 13], [2]]}\n"
        "- {name: lower, words: [belly, breast], points: [[3, 4]]}\n"
    )
    split = load_splits(other, ["test"])["test"]
    data = read_cue_data(split, other, (1, 2))
    assert [group.name for group in data.groups] == ["upper", "lower"]
    assert {group for pair in data.pairs for group in pair.groups} <= {0, 1}
    assert cue_localization(model_subject(models["cam"]), split, data, replicates=5).figures["mpxap"].value > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "needs a list"),
        ("- {name: a, words: [b]}", "group 1 needs name, words and points"),
        ("- {name: a, words: b, points: [[1]]}", "words of group 1"),
        ("- {name: a, words: [b], points: [[0]]}", "points of group 1"),
        ("[", "cannot read"),
    ],
)
def test_read_cue_data_refuses_malformed_groups(tmp_path, text, message):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/groups.yaml").write_text(text)
    with pytest.raises(CalmError, match=message):
        read_part_groups(tmp_path)


def test_result_survives_its_file(birds, models, tmp_path):
    root, split = birds
    result = cue_localization(model_subject(models["cam"]), split, root, replicates=5)
    result.save(tmp_path / "r.json")
    read = Result.load(tmp_path / "r.json")
    assert read.figures["mpxap"] == result.figures["mpxap"]
    assert read.scores == result.scores
    assert np.isnan(read.figures["chance"].low)


def test_read_cue_data_refuses_a_table_of_other_classes(birds):
    root, split = birds
    fewer = type(split)(**{**vars(split), "class_names": ("another", *split.class_names[:3])})
    with pytest.raises(CalmError, match="describes 5 classes, the data set has 4"):
        read_cue_data(fewer, root)
