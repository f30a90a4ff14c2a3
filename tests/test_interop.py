"""CALM inside Captum, pytorch-grad-cam, scikit-learn and plain loops, each by what the other library itself does."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import timm
import torch
from captum.attr import Attribution, visualization
from captum.metrics import sensitivity_max
from matplotlib import pyplot
from PIL import Image
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from torch import nn
from torch.testing import assert_close

import calm
from calm.errors import CalmError
from calm.heatmaps import normalize, resize_maps
from calm.interop import CalmAttribution, CalmCam, CalmClassifier, ScoreModel, quantus_explain

METHODS = ["calm-em", "cam"]


def make(method: str = "calm-em") -> calm.CalmModel:
    torch.manual_seed(0)
    return calm.create_model(nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Dropout(0.5)), 4, method)


IMAGES = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([3, 0, 2])


@pytest.mark.parametrize("method", METHODS)
def test_score_model_has_the_predictions_as_its_softmax(method):
    model = make(method).eval()
    assert_close(ScoreModel(model)(IMAGES).softmax(1), model(IMAGES).probs)


@pytest.mark.parametrize("method", METHODS)
def test_calm_attribution_is_a_method_of_captum(method):
    model = make(method)
    captum = CalmAttribution(model)
    assert isinstance(captum, Attribution)
    assert CalmAttribution.get_name() == "Calm Attribution"
    got = captum.attribute(IMAGES, TARGETS)
    assert got.shape == IMAGES.shape
    assert model.training
    model.eval()
    assert_close(got.sum(1), model.attribute(IMAGES, TARGETS, size=(16, 24)))
    assert_close(captum.attribute(IMAGES), captum.attribute(IMAGES, model(IMAGES).probs.argmax(1)))
    assert_close(captum.attribute(IMAGES, 2), captum.attribute((IMAGES,), [2, 2, 2])[0])
    evidence = captum.attribute(IMAGES, TARGETS, kind="evidence").sum(1)
    assert_close(evidence, model.attribute(IMAGES, TARGETS, "evidence", size=(16, 24)))


def test_calm_attribution_runs_in_captums_metrics_and_pictures():
    captum = CalmAttribution(make().eval(), "posterior")
    torch.manual_seed(0)
    sensitivity = sensitivity_max(captum.attribute, IMAGES, target=TARGETS, n_perturb_samples=2)
    assert sensitivity.shape == (3,)
    assert 0 < float(sensitivity.min()) < 10
    picture, heat = (values[0].permute(1, 2, 0).numpy() for values in (IMAGES.sigmoid(), captum.attribute(IMAGES)))
    figure, _ = visualization.visualize_image_attr(heat, picture, "blended_heat_map", "positive", use_pyplot=False)
    pyplot.close(figure)


@pytest.mark.parametrize("method", METHODS)
def test_calm_cam_is_called_as_a_method_of_pytorch_grad_cam(method):
    model = make(method)
    targets = [ClassifierOutputTarget(3), ClassifierOutputSoftmaxTarget(0), ClassifierOutputTarget(2)]
    with CalmCam(model) as cam:
        maps = cam(input_tensor=IMAGES, targets=targets)
        assert (cam(IMAGES) == cam(IMAGES, [ClassifierOutputTarget(c) for c in cam.outputs.argmax(1)])).all()
    assert model.training
    want = normalize(resize_maps(model.eval().attribute(IMAGES, TARGETS), (16, 24)), "minmax")
    assert_close(torch.as_tensor(maps), want)
    assert maps.dtype == np.float32
    assert show_cam_on_image(np.float32(np.full((16, 24, 3), 0.5)), maps[0], use_rgb=True).shape == (16, 24, 3)
    scores = CamMultImageConfidenceChange()(IMAGES, maps, targets, ScoreModel(model))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("kind", [CalmAttribution, CalmCam])
def test_other_libraries_ways_take_models_of_this_package_alone(kind):
    with pytest.raises(CalmError, match=r"got a Conv2d: calm\.attribute explains classifiers of other packages"):
        kind(nn.Conv2d(3, 3, 1))


def test_calm_cam_refuses_smoothing_and_targets_without_a_class():
    cam = CalmCam(make())
    for smooth in ({"aug_smooth": True}, {"eigen_smooth": True}):
        with pytest.raises(CalmError, match="the model's own probability"):
            cam(IMAGES, **smooth)
    with pytest.raises(CalmError, match="ClassifierOutputTarget"):
        cam(IMAGES, [lambda output: output.sum()] * 3)


def test_quantus_explain_takes_and_returns_arrays():
    model = make().eval()
    got = quantus_explain(ScoreModel(model), IMAGES.numpy(), TARGETS.numpy(), device="cpu")
    assert_close(torch.as_tensor(got[:, 0]), model.attribute(IMAGES, TARGETS, size=(16, 24)))
    got = quantus_explain(model, IMAGES.numpy(), TARGETS.numpy(), method="integrated-gradients", steps=3)
    assert_close(torch.as_tensor(got[:, 0]), calm.attribute(model, IMAGES, TARGETS, steps=3))
    with pytest.raises(CalmError, match="got a Conv2d"):
        quantus_explain(nn.Conv2d(3, 3, 1), IMAGES.numpy(), TARGETS.numpy())


def test_quantus_explain_runs_in_the_metrics_of_quantus():
    quantus = pytest.importorskip("quantus", reason="quantus is installed by `make test` alone")
    metric = quantus.PixelFlipping(features_in_step=64, disable_warnings=True, display_progressbar=False)
    arguments = {"x_batch": IMAGES.numpy(), "y_batch": TARGETS.numpy(), "a_batch": None}
    scores = metric(model=ScoreModel(make()).eval(), explain_func=quantus_explain, **arguments)
    assert np.shape(scores)[0] == 3


def test_em_loss_and_head_train_on_the_features_of_any_network():
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0, global_pool="")
    head = calm.CalmHead(backbone.num_features, 4)
    output = head(backbone(torch.randn(2, 3, 64, 64)))
    loss = calm.em_loss(output, torch.tensor([1, 3]), temperature=0.5, prior_weight=0.1)
    assert_close(loss, output.loss(torch.tensor([1, 3]), temperature=0.5, prior_weight=0.1))
    with pytest.raises(CalmError, match=r"em_loss takes the output of a CalmHead .* got a Tensor"):
        calm.em_loss(backbone(torch.randn(2, 3, 64, 64)), torch.tensor([1, 3]))
    loss.backward()
    assert head.attention.weight.grad.abs().sum() > 0
    assert backbone.conv1.weight.grad.abs().sum() > 0


def squares(count: int, side: int = 24) -> tuple[np.ndarray, list[str]]:
    """Noise with a square, whose colour is the label; returns images (n, side, side, 3) and labels."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 90, (count, side, side, 3), np.uint8), rng.integers(0, 3, count)
    for image, label, (y, x) in zip(images, labels, rng.integers(0, side - 8, (count, 2)), strict=True):
        image[y : y + 8, x : x + 8, label] = 255
    return images, [("red", "green", "blue")[label] for label in labels]


QUICK = {"backbone": "tiny_resnet", "image_size": 24, "epochs": 12, "random_state": 0, "device": "cpu"}


@pytest.mark.parametrize("freeze", [False, True])
def test_calm_classifier_learns_predicts_and_explains(freeze, tmp_path):
    images, labels = squares(72)
    state = torch.get_rng_state()
    classifier = CalmClassifier(**QUICK, freeze=freeze, lr=0.05 if freeze else 0.005).fit(images[:60], labels[:60])
    assert torch.equal(torch.get_rng_state(), state)
    assert classifier.classes_.tolist() == ["blue", "green", "red"]
    probs = classifier.predict_proba(images[60:])
    assert probs.sum(1) == pytest.approx(np.ones(12), rel=1e-5)
    assert (classifier.predict(images[60:]) == classifier.classes_[probs.argmax(1)]).all()
    assert classifier.score(images[60:], labels[60:]) > (0.4 if freeze else 0.9)
    maps = classifier.explain(images[60:])
    assert maps.sum((1, 2)) == pytest.approx(probs.max(1), rel=1e-4)
    red = classifier.explain(list(images[60:]), "red", kind="posterior", size=(24, 24))
    assert red.shape == (12, 24, 24)
    own = classifier.explain(images[60:], labels[60:], kind="joint")
    assert own.sum((1, 2)) == pytest.approx(
        probs[np.arange(12), np.searchsorted(classifier.classes_, labels[60:])], rel=1e-4
    )
    again = pickle.loads(pickle.dumps(classifier))
    assert (again.predict_proba(images[60:]) == probs).all()
    classifier.model_.save_pretrained(tmp_path / "model")
    assert calm.load(tmp_path / "model").predict(images[60], top=1).prob == pytest.approx(probs[0].max(), rel=1e-5)


def test_calm_classifier_is_the_same_for_the_same_seed_and_for_files(tmp_path):
    images, labels = squares(9)
    files = [tmp_path / f"{number}.png" for number in range(9)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    options = {**QUICK, "epochs": 1, "batch_size": 4}
    probs = [CalmClassifier(**options).fit(given, labels).predict_proba(images) for given in (images, files, images)]
    assert (probs[0] == probs[1]).all()
    assert (probs[0] == probs[2]).all()
    other = CalmClassifier(**{**options, "random_state": 1}).fit(images, labels).predict_proba(images)
    assert (probs[0] != other).any()


CHECKS = [
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
]


@pytest.mark.parametrize("check", CHECKS)
def test_calm_classifier_passes_scikit_learns_checks_of_estimators(check):
    """Those that do not call ``fit`` with a table of numbers."""
    getattr(estimator_checks, check)("CalmClassifier", CalmClassifier())


def test_calm_classifier_works_with_scikit_learns_tools():
    images, labels = squares(16)
    quick = CalmClassifier(**{**QUICK, "epochs": 1})
    assert len(cross_val_score(quick, images, labels, cv=2)) == 2
    search = GridSearchCV(make_pipeline(quick), {"calmclassifier__lr": [0.001, 0.01]}, cv=2).fit(images, labels)
    assert search.predict(images[:3]).shape == (3,)
    assert clone(quick).get_params() == quick.get_params()
    for ask in (quick.predict, quick.explain):
        with pytest.raises(NotFittedError):
            ask(images)


def test_calm_classifier_refuses_what_it_cannot_learn():
    images, labels = squares(12)
    quick = CalmClassifier(**{**QUICK, "epochs": 1})
    for wrong in (labels[:3], ["red"] * 12, [[label] for label in labels]):
        with pytest.raises(CalmError, match="give one label to each image, of at least two classes"):
            quick.fit(images, wrong)
    with pytest.raises(CalmError, match=r"no label 'pink': the labels are \['blue'"):
        quick.fit(images, labels).explain(images, "pink")
    with pytest.raises(CalmError, match="unknown backbone"):
        CalmClassifier("resnet81").fit(images, labels)
