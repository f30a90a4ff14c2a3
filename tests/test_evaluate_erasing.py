"""Remove-and-classify, classification and randomisation over a split, against loops over single images."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from data_files import write_pack
from scipy.stats import spearmanr
from torch import nn

from calm.data import load_split
from calm.errors import CalmError
from calm.evaluate.classification import classification
from calm.evaluate.erasing import draw_seed, insertion_deletion, remove_and_classify
from calm.evaluate.localization import localization
from calm.evaluate.randomisation import randomisation, reinitialise, stages
from calm.evaluate.result import Result, figure_spec
from calm.evaluate.subject import Subject, model_subject
from calm.heatmaps import normalize, resize_maps
from calm.images import Preprocessing
from calm.metrics.erasing import erase, erasing_order, filling, first_pixels, random_order
from calm.model import create_model


class Net(nn.Module):
    """Two convolutions; a grid of a quarter of the image."""

    out_channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.last = nn.Conv2d(5, 6, 3, stride=2, padding=1)

    def forward(self, images):
        return self.last(self.stem(images).relu()).relu()


@pytest.fixture
def split(tmp_path):
    labels = (0, 1, 1, 0, 1, 0, 0)
    return load_split(write_pack(tmp_path, dict.fromkeys(("train", "val", "test"), labels)), "test")


NAMES = ("cat", "dog")


def model_of(method: str = "calm-em"):
    model = create_model(Net(), 2, method, class_names=NAMES, preprocessing=Preprocessing(size=(16, 20)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # predictions that erasing can change
    return model.eval()


class Counting:
    """A subject's predict that counts its passes."""

    def __init__(self, predict) -> None:
        self.predict, self.passes = predict, 0

    def __call__(self, images):
        self.passes += 1
        return self.predict(images)


def with_predict(subject: Subject, predict) -> Subject:
    return Subject(**{**vars(subject), "predict": predict})


@pytest.mark.parametrize("fill", ["zero", "mean", "noise", "blur"])
@pytest.mark.parametrize(("method", "explain"), [("calm-em", "label"), ("cam", "prediction")])
def test_remove_and_classify_equals_images_taken_one_by_one(split, fill, method, explain):
    model = model_of(method)
    found = remove_and_classify(
        model_subject(model), split, batch_size=1, fill=fill, explain=explain, seed=5, replicates=20, draws=2
    )
    fractions = (0.1, 0.3, 0.5, 0.7, 0.9)
    right = {"topk": [0] * 5, "random": [0] * 5}
    whole = 0
    for i, record in enumerate(split.records):
        image, key = model.preprocess(record.path), torch.tensor([i])
        with torch.no_grad():
            predicted = int(model(image).probs.argmax())
            whole += predicted == record.label
            target = record.label if explain == "label" else predicted
            grid = model(image).attribute(torch.tensor([target]))
            maps = normalize(resize_maps(grid, (16, 20)), "minmax" if method == "cam" else "clipping")
            numbers = random_order(key, 320, 5)
            other = random_order(key, 320, draw_seed(5, 1))
            orders = [("topk", erasing_order(maps, numbers), 1), ("random", numbers, 0.5), ("random", other, 0.5)]
            chances = {"topk": [], "random": []}
            for name, order, share in orders:
                for k, fraction in enumerate(fractions):
                    mask = first_pixels(order, [round(320 * fraction)])[0]
                    probs = model(erase(image, mask, filling(image, fill, keys=key, seed=5))).probs[0]
                    right[name][k] += share * (int(probs.argmax()) == record.label)
                    chances[name].append(share * float(probs[record.label]))
        gained = sum(chances["random"]) / 5 - sum(chances["topk"]) / 5
        assert found.scores[record.id] == pytest.approx(gained, abs=1e-5)
    for k, fraction in enumerate(fractions):
        figure = found.figures[f"r{round(100 * fraction)}"].value
        if right["random"][k]:
            assert figure == pytest.approx(right["topk"][k] / right["random"][k])
        else:
            assert math.isnan(figure)
        assert found.curves["topk"].y[k + 1] == pytest.approx(right["topk"][k] / 7)
        assert found.curves["random"].y[k + 1] == pytest.approx(right["random"][k] / 7)
    assert found.figures["top1"].value == pytest.approx(whole / 7)


def test_remove_and_classify_does_not_depend_on_batches(split, tmp_path):
    model = model_of()
    runs = [remove_and_classify(model_subject(model), split, batch_size=size, replicates=10) for size in (2, 7)]
    for name, figure in runs[0].figures.items():
        assert list(runs[1].figures[name]) == pytest.approx(list(figure), nan_ok=True, abs=1e-6)
    for name, score in runs[0].scores.items():  # scores equal but for rounding may change places
        assert runs[1].scores[name] == pytest.approx(score, abs=1e-3)
    runs[0].save(tmp_path / "result.json")
    read = Result.load(tmp_path / "result.json")
    assert list(read.figures["r30"]) == pytest.approx(list(runs[0].figures["r30"]), nan_ok=True)


def test_remove_and_classify_takes_map_and_prediction_from_one_pass(split):
    subject = model_subject(model_of())
    counting = Counting(subject.predict)
    done = []
    remove_and_classify(with_predict(subject, counting), split, batch_size=7, replicates=0, progress=done.append)
    assert counting.passes == 1 + 5 + 3 * 5  # of three draws
    assert done == [7]


def test_remove_and_classify_erases_random_pixels_once_for_all_maps_of_a_model(split):
    model, cache = model_of(), {}
    for method in ("joint", "posterior", "gradient"):
        subject = model_subject(model, method=method)
        counting = Counting(subject.predict)
        shared = replace(with_predict(subject, counting), cache=cache)
        for seed in (0, 1):
            found = remove_and_classify(shared, split, replicates=5, seed=seed)
            alone = remove_and_classify(subject, split, replicates=5, seed=seed)
            assert found.curves == alone.curves
            assert found.scores == alone.scores
        assert counting.passes == 2 * (1 + 5 + (method == "joint") * 3 * 5)


def test_remove_and_classify_of_a_constant_map_is_chance(split):
    model = model_of()

    class Flat:
        def __init__(self, images) -> None:
            self.probs = model(images).probs

        def maps(self, classes):
            return torch.full((*classes.shape, 4, 5), 0.2)

    found = remove_and_classify(with_predict(model_subject(model), Flat), split, replicates=10)
    assert found.curves["topk"].y == found.curves["random"].y
    assert set(found.scores.values()) == {0.0}
    assert found.details["constant_maps"] == 7


@pytest.mark.parametrize("explain", ["label", "prediction"])
def test_insertion_deletion_equals_pixels_sorted_one_image_at_a_time(split, explain):
    model = model_of("cam")
    found = insertion_deletion(
        model_subject(model), split, batch_size=3, points=4, fill="mean", explain=explain, replicates=10
    )
    curves = {"insertion": [], "deletion": []}
    for record in split.records:
        image = model.preprocess(record.path)
        blurred = filling(image, "blur", keys=torch.tensor([0]))
        mean = image.mean(dim=(2, 3), keepdim=True).expand_as(image)
        with torch.no_grad():
            output = model(image)
            target = record.label if explain == "label" else int(output.probs.argmax())
            maps = resize_maps(output.attribute(torch.tensor([target])), (16, 20))[0].flatten()
            ordered = maps.argsort(descending=True)
            for name, (start, end) in {"insertion": (blurred, image), "deletion": (image, mean)}.items():
                heights = []
                for step in range(5):
                    mixed = start.flatten(2).clone()
                    taken = ordered[: 80 * step]
                    mixed[..., taken] = end.flatten(2)[..., taken]
                    heights.append(float(model(mixed.view_as(image)).probs[0, target]))
                curves[name].append(heights)
    mean_area = {}
    for name, rows in curves.items():
        heights = torch.tensor(rows, dtype=torch.float64)
        assert found.curves[name].y == pytest.approx(heights.mean(0).tolist(), abs=1e-4)
        areas = (heights[:, 1:] + heights[:, :-1]).mean(1) / 2
        mean_area[name] = areas
        assert found.figures[name].value == pytest.approx(float(areas.mean()), abs=1e-4)
        assert found.figures[name].low < found.figures[name].value < found.figures[name].high
    own = mean_area["insertion"] - mean_area["deletion"]
    assert list(found.scores.values()) == pytest.approx(own.tolist(), abs=1e-4)


def test_remove_and_classify_names_fractions_of_any_size(split):
    found = remove_and_classify(model_subject(model_of()), split, fractions=(0.001, 0.002, 0.29), replicates=5)
    assert list(found.figures) == ["r0.1", "r0.2", "r29", "r_area", "top1"]
    assert figure_spec("r0.1").better == figure_spec("r29").better == "lower"
    assert figure_spec("r0.1").title == "R_0.1"


def test_erasing_benchmarks_refuse_impossible_options_first(split):
    subject = model_subject(model_of())
    counting = Counting(subject.predict)
    for benchmark, options, message in (
        (remove_and_classify, {"fill": "zeros"}, "did you mean 'zero'"),
        (remove_and_classify, {"explain": "labels"}, "did you mean 'label'"),
        (remove_and_classify, {"fractions": (0.5, 2)}, "fractions"),
        (remove_and_classify, {"draws": 0}, "draws is 0"),
        (insertion_deletion, {"fill": "zeros"}, "did you mean 'zero'"),
        (insertion_deletion, {"points": 0}, "steps is 0"),
    ):
        with pytest.raises(CalmError, match=message):
            benchmark(with_predict(subject, counting), split, **options)
    assert not counting.passes


def test_benchmarks_refuse_a_prediction_that_is_not_finite(split):
    """Such as of a half-precision model whose numbers overflow: every figure would look like one."""
    subject = model_subject(model_of())

    class Overflowing:
        def __init__(self, images):
            self.probs = subject.predict(images).probs.clone()
            self.probs[-1] = math.nan
            self.maps = subject.predict(images).maps

    broken = with_predict(subject, Overflowing)
    for benchmark in (remove_and_classify, classification, insertion_deletion, localization):
        with pytest.raises(CalmError, match=f"CALM-EM joint predicts NaN for {split.records[2].path}"):
            benchmark(broken, split, batch_size=3)


def test_predictions_refuse_more_classes_than_the_model_has(tmp_path):
    labels = dict.fromkeys(("train", "val", "test"), (0, 1, 2))
    classes = [f"{i} n{i} class{i}" for i in range(3)]
    split = load_split(write_pack(tmp_path, labels, classes=classes), "test")
    for benchmark in (remove_and_classify, classification):
        with pytest.raises(CalmError, match="knows 2 classes"):
            benchmark(model_subject(model_of()), split)
        with pytest.raises(CalmError, match="classes 0 to 1"):
            benchmark(replace(model_subject(model_of()), model=None), split)


def test_classification_agrees_with_the_joint(split):
    model = model_of()
    found = classification(model_subject(model), split, batch_size=3, replicates=10)
    with torch.no_grad():
        rows = [model(model.preprocess(record.path)).probs[0] for record in split.records]
    labels = [record.label for record in split.records]
    right = [int(row.argmax()) == label for row, label in zip(rows, labels, strict=True)]
    assert found.figures["top1"].value == pytest.approx(sum(right) / 7)
    assert "top5" not in found.figures, "of two classes it says nothing"
    nll = -sum(float(row[label].log()) for row, label in zip(rows, labels, strict=True)) / 7
    assert found.figures["nll"].value == pytest.approx(nll, rel=1e-4)
    assert found.scores[split.records[3].id] == pytest.approx(float(rows[3][labels[3]]), abs=1e-6)
    assert 0 <= found.details["agreement"] < 1e-6


def test_agreement_finds_a_map_that_is_not_the_prediction(split):
    subject = model_subject(model_of())

    class Off:
        def __init__(self, images) -> None:
            self.seen = subject.predict(images)
            self.probs = self.seen.probs

        def maps(self, classes):
            maps = self.seen.maps(classes)
            maps[0, 0, 0, 0] += 0.125
            return maps

    found = classification(with_predict(subject, Off), split, replicates=0)
    assert found.details["agreement"] == pytest.approx(0.125, abs=1e-5)
    assert classification(model_subject(model_of("cam")), split, replicates=0).details["agreement"] is None


def test_randomisation_leaves_the_model_and_repeats_itself(split):
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    found = randomisation(
        model_subject(model, method="posterior"), split, images=4, batch_size=3, replicates=10, progress=done.append
    )
    assert (sum(done), len(done)) == (len(split.records), 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.details["images"] == 4
    assert found.details["stages"] == ["head", "backbone.last", "backbone.stem"]
    assert found.curves["randomisation"].x == [0, 1, 2, 3]
    assert found.curves["randomisation"].y[0] == 1
    again = randomisation(model_subject(model, method="posterior"), split, images=4, replicates=10)
    assert again.figures == found.figures


def test_randomisation_tells_maps_that_ignore_the_weights(split):
    class Brightness:
        """Every pixel's brightness, whatever the model."""

        def __init__(self, model, images) -> None:
            self.images, self.probs = images, model(images).probs

        def maps(self, classes):
            return self.images.mean(1)[:, None].expand(-1, classes.shape[1], -1, -1)

    edges = replace(model_subject(model_of()), predict_with=Brightness)
    assert randomisation(edges, split, order="all", replicates=5).figures["randomisation"].value == 1
    own = randomisation(model_subject(model_of(), method="posterior"), split, order="all", replicates=5)
    assert own.figures["randomisation"].value < 0.9


def test_stages_run_from_the_head_to_the_stem():
    model = create_model("small_resnet", 2, preprocessing=Preprocessing(size=(32, 32)))
    names = [name for name, _ in stages(model)]
    assert names[0] == "head"
    covered = {id(p) for _, modules in stages(model) for m in modules for p in m.parameters()}
    assert covered == {id(p) for p in model.parameters()}
    assert len(names) == len(set(names)) > 3


def test_reinitialise_draws_every_weight_and_restores_the_generator():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.arange(50.0))

    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Scale())
    module[1].running_mean.fill_(3)
    before = [weight.clone() for weight in module.parameters()]
    state = torch.get_rng_state()
    reinitialise(module, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(module[0].weight, before[0])
    assert not module[1].running_mean.any()
    assert not torch.equal(module[2].gain, before[-1])
    assert torch.equal(module[2].gain.sort().values, before[-1])


def test_randomisation_refuses_what_cannot_be_compared(split):
    with pytest.raises(CalmError, match="did you mean 'cascading'"):
        randomisation(model_subject(model_of()), split, order="cascade")
    with pytest.raises(CalmError, match="images is 0"):
        randomisation(model_subject(model_of()), split, images=0)
    with pytest.raises(CalmError, match="needs a model"):
        randomisation(replace(model_subject(model_of()), model=None), split)

    class Flat:
        def __init__(self, model, images) -> None:
            self.probs = model(images).probs

        def maps(self, classes):
            return torch.zeros(*classes.shape, 2, 2)

    with pytest.raises(CalmError, match="constant"):
        randomisation(replace(model_subject(model_of()), predict_with=Flat), split)


def test_randomisation_spreads_its_images_over_the_split(split):
    subject, read = model_subject(model_of(), method="posterior"), []

    class Noting:
        def __init__(self, model, images) -> None:
            read.append(len(images))
            self.seen = subject.predict_with(model, images)
            self.probs, self.maps = self.seen.probs, self.seen.maps

    found = randomisation(replace(subject, predict_with=Noting), split, order="all", images=3, replicates=5)
    assert read == [3, 3]
    rows = []
    anew = copy.deepcopy(subject.model)
    reinitialise(anew, 1)
    for place in (0, 2, 4):
        record = split.records[place]
        image, label = subject.model.preprocess(record.path), torch.tensor([record.label])
        with torch.no_grad():
            maps = [model(image).attribute(label, "posterior").flatten() for model in (subject.model, anew)]
        rows.append(spearmanr(*(values.double().numpy() for values in maps)).statistic)
    assert found.figures["randomisation"].value == pytest.approx(sum(rows) / 3, abs=1e-6)
