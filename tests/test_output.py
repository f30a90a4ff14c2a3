"""Attribution maps of every kind against the oracle, under both names."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from cases import activations_of
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.testing import assert_close

from calm.errors import CalmError
from calm.heatmaps import cell_coverage
from calm.model import create_model
from calm.output import ALIASES, MAP_KINDS, CalmOutput, CamOutput, canonical_kind

LOGITS, SCORES = activations_of((3, 5, 3, 4), 11, 1.5)
TARGETS = torch.tensor([4, 0, 2])
SUPERCLASS = {4: [4, 1], 0: [0], 2: [2, 3, 0, 1]}
CALM = CalmOutput(LOGITS, SCORES)


def cam_output() -> CamOutput:
    """A CAM output whose activation maps are LOGITS: identity weights on them as features."""
    return CamOutput.of(LOGITS, torch.eye(5, dtype=torch.float64)[..., None, None], torch.zeros(5, dtype=torch.float64))


def expected(kind: str, b: int, target: int) -> Tensor:
    joint = oracle.joint(LOGITS, SCORES, "softplus")
    posterior = oracle.posterior(joint)
    group = SUPERCLASS[target]
    scaled = [oracle.minmax(LOGITS[b, c]) for c in range(5)]
    return {
        "joint": lambda: joint[b, target],
        "joint-superclass": lambda: sum(joint[b, c] for c in group),
        "joint-superclass-mean": lambda: sum(joint[b, c] for c in group) / len(group),
        "posterior": lambda: posterior[b, target],
        "posterior-superclass": lambda: sum(posterior[b, c] for c in group),
        "posterior-superclass-mean": lambda: sum(posterior[b, c] for c in group) / len(group),
        "prior": lambda: oracle.prior(SCORES, "softplus")[b],
        "cam": lambda: LOGITS[b, target],
        "cam-saliency": lambda: sum(scaled),
        "cam-superclass": lambda: sum(scaled[c] for c in group),
        "evidence": lambda: oracle.prior(SCORES, "softplus")[b] * LOGITS[b].log_softmax(0)[target],
    }[kind]()


@pytest.mark.parametrize("kind", [*MAP_KINDS, *ALIASES])
def test_attribute_equals_the_oracle_under_both_names(kind):
    spec = MAP_KINDS[ALIASES.get(kind, kind)]
    output = CALM if "calm" in spec.families else cam_output()
    options = {"superclass": SUPERCLASS} if spec.over == "superclass" else {}
    got = output.attribute(TARGETS, kind, **options)
    for b, target in enumerate(TARGETS.tolist()):
        assert_close(got[b], expected(ALIASES.get(kind, kind), b, target))


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_attribute_takes_several_targets(kind):
    spec = MAP_KINDS[kind]
    output = CALM if "calm" in spec.families else cam_output()
    superclass = {c: [c, (c + 1) % 5] for c in range(5)}
    options = {"superclass": superclass} if spec.over == "superclass" else {}
    several = torch.tensor([[0, 4], [2, 2], [1, 3]])
    got = output.attribute(several, kind, **options)
    assert got.shape == (3, 2, 3, 4)
    for k in range(2):
        assert_close(got[:, k], output.attribute(several[:, k], kind, **options))


def test_attribute_joint_sums_to_the_prediction():
    every = torch.arange(5).expand(3, -1)
    assert_close(CALM.attribute(every, "joint").sum((2, 3)), CALM.probs)
    assert_close(CALM.attribute(every, "posterior").sum((2, 3)), torch.ones(3, 5, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), big_h=st.integers(1, 12), big_w=st.integers(1, 12))
def test_attribute_resizes_bilinearly_with_half_pixel_centres(h, w, big_h, big_w):
    logits, scores = activations_of((1, 2, h, w), 1, 1.0)
    output = CalmOutput(logits, scores)
    got = output.attribute(torch.tensor([1]), size=(big_h, big_w))
    assert_close(got[0], oracle.bilinear(output.joint[0, 1], (big_h, big_w)))


@pytest.mark.parametrize(
    ("targets", "kind", "options", "message"),
    [
        (TARGETS, "jont", {}, "did you mean 'joint'"),
        (TARGETS, "", {}, "unknown map kind ''"),
        (TARGETS, "vanilla", {}, "CALM model: choose one of joint"),
        (torch.tensor([0, 1]), "joint", {}, "2 targets for 3 images"),
        (torch.tensor([0, 1, 5]), "joint", {}, "out of range: 5, allowed are 0 to 4"),
        (torch.tensor([0, -1, 2]), "joint", {}, "out of range: -1"),
        (torch.rand(3), "joint", {}, "class indices"),
        (TARGETS, "joint-superclass", {}, "needs superclass="),
        (TARGETS, "joint", {"superclass": SUPERCLASS}, "takes no superclass="),
        (TARGETS, "joint-superclass", {"superclass": {4: [4]}}, "no classes for target 0"),
        (TARGETS, "joint-superclass", {"superclass": {4: [7], 0: [0], 2: [2]}}, "names class 7"),
    ],
)
def test_attribute_refuses_wrong_arguments(targets, kind, options, message):
    with pytest.raises(CalmError, match=message):
        CALM.attribute(targets, kind, **options)


SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.1, 60), st.sampled_from(["softplus", "relu", "exp"]), st.integers(0, 9))
def test_attribute_evidence_differences_sum_to_the_expected_log_odds(shape, scale, activation, seed):
    logits, scores = activations_of(shape, seed, scale)
    first, second = torch.randint(shape[1], (2, shape[0]), generator=torch.Generator().manual_seed(seed))
    one, other = CalmOutput(logits, scores, activation).attribute(torch.stack([first, second], 1), "evidence").unbind(1)
    for b in range(shape[0]):
        prior = oracle.prior(scores, activation)[b]
        log_p = (logits[b] - logits[b].logsumexp(0)).clamp(min=-30)
        odds = sum(
            prior[y, x] * (log_p[first[b], y, x] - log_p[second[b], y, x])
            for y in range(shape[2])
            for x in range(shape[3])
        )
        assert_close((one - other)[b].sum(), odds)
    assert one.max() <= 0
    assert one.sum((1, 2)).min() >= -30.0001


def test_attribute_evidence_of_cam_sums_to_the_logits_and_its_difference_to_the_log_odds():
    output = cam_output()
    pair = output.attribute(torch.stack([TARGETS, (TARGETS + 1) % 5], 1), "evidence").sum((2, 3))
    rows = torch.arange(3)
    assert_close(pair[:, 0], output.class_scores[rows, TARGETS])
    assert_close(pair[:, 0] - pair[:, 1], output.log_probs[rows, TARGETS] - output.log_probs[rows, (TARGETS + 1) % 5])


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.floats(0.1, 3), st.sampled_from(["softplus", "relu", "exp"]), st.floats(0, 4), st.integers(0, 9))
def test_attribute_reads_the_prior_with_its_exponent(shape, scale, activation, exponent, seed):
    logits, scores = activations_of(shape, seed, scale)
    output, targets = CalmOutput(logits, scores, activation), torch.zeros(shape[0], dtype=torch.int64)
    prior = oracle.prior(scores, activation)
    raised = torch.where(prior > 0, prior**exponent, 0)
    raised = raised / raised.sum((1, 2), keepdim=True)
    joint = raised * logits.softmax(1)[:, 0]
    for kind, want in (
        ("prior", raised),
        ("joint", joint),
        ("posterior", joint / joint.sum((1, 2), keepdim=True)),
        ("evidence", raised * logits.log_softmax(1)[:, 0].clamp(min=-30)),
    ):
        assert_close(output.attribute(targets, kind, prior_exponent=exponent), want)
    assert_close(output.attribute(targets, prior_exponent=1.0), output.attribute(targets))


@pytest.mark.parametrize("exponent", [-0.1, float("nan"), float("inf")])
def test_attribute_refuses_an_exponent_that_is_none(exponent):
    with pytest.raises(CalmError, match=r"prior_exponent is .*: give 0"):
        CALM.attribute(TARGETS, prior_exponent=exponent)
    with pytest.raises(CalmError, match="a CAM model has no prior"):
        cam_output().attribute(TARGETS, prior_exponent=0.5)


def test_canonical_kind_refuses_a_joint_of_cam():
    with pytest.raises(CalmError, match="CAM model: choose one of cam"):
        canonical_kind("joint", "cam")


def test_attribute_of_no_image_is_empty():
    none = CalmOutput(torch.zeros(0, 5, 3, 2), torch.zeros(0, 1, 3, 2))
    for kind, options in (("joint", {}), ("joint-superclass", {"superclass": SUPERCLASS})):
        assert none.attribute(torch.zeros(0, dtype=torch.int64), kind, **options).shape == (0, 3, 2)


@pytest.mark.parametrize("kind", [kind for kind, spec in MAP_KINDS.items() if spec.adds])
def test_mass_adds_the_cells_by_the_share_that_lies_in_the_region(kind):
    spec = MAP_KINDS[kind]
    output = CALM if "calm" in spec.families else cam_output()
    options = {"superclass": SUPERCLASS} if spec.over == "superclass" else {}
    got = output.mass(TARGETS, (0.125, 0.5, 1, 1), kind=kind, **options)
    weights = [[0, 0, 0, 0], [0.25, 0.5, 0.5, 0.5], [0.5, 1, 1, 1]]  # of the cells of a 3 x 4 grid
    for b, target in enumerate(TARGETS.tolist()):
        grid = expected(kind, b, target)
        want = sum(weights[i][j] * float(grid[i, j]) for i in range(3) for j in range(4))
        assert float(got[b]) == pytest.approx(want, rel=1e-12)
    assert_close(got, output.mass(TARGETS, (50, 30, 400, 60), kind=kind, size=(60, 400), **options))


def test_mass_of_everything_is_the_prediction_for_one_or_several_targets():
    every = torch.arange(5).expand(3, -1)
    assert_close(CALM.mass(every, (0, 0, 1, 1)), CALM.probs)
    assert_close(CALM.mass(None, torch.ones(7, 9, dtype=torch.bool)), CALM.probs.amax(1))
    halves = torch.zeros(3, 6, 8, dtype=torch.bool)
    halves[0], halves[1, :, :4] = True, True
    got = CALM.mass(every, halves)
    assert_close(got[0], CALM.probs[0])
    assert_close(got[1], CALM.joint[1, :, :, :2].sum((1, 2)))
    assert not got[2].any()
    boxes = [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.3, 0.3, 0.3, 0.9)]
    assert_close(CALM.mass(every, boxes), got)


def test_attribute_and_mass_take_names_of_classes_where_the_model_gave_them():
    names = ["crow", "jay", "tree owl"]
    for method in ("calm-em", "cam"):
        output = create_model("small_resnet", 3, method, class_names=names)(torch.randn(2, 3, 64, 64))
        half: Any = {"region": (0, 0, 0.5, 1), "kind": "evidence"}
        assert_close(output.mass("tree_owl", **half), output.mass(2, **half))
        assert_close(output.attribute(["jay", "crow"]), output.attribute([1, 0]))
        with pytest.raises(CalmError, match="no class 'eagle'"):
            output.attribute("eagle")
    assert_close(CALM.attribute([1, 1, 1], prior_exponent=0.5), CALM.attribute(1, prior_exponent=0.5))
    with pytest.raises(CalmError, match="'jay': this output knows no names"):
        CALM.mass("jay", (0, 0, 1, 1))


def test_mass_refuses_scores_and_too_many_regions():
    for kind in (None, "cam-saliency"):
        with pytest.raises(CalmError, match="do not add up: take kind='evidence'"):
            cam_output().mass(0, (0, 0, 1, 1), kind=kind)
    with pytest.raises(CalmError, match="2 regions for 3 images"):
        CALM.mass(0, [(0, 0, 1, 1), (0, 0, 1, 1)])


def test_mass_has_a_gradient():
    logits, scores = (values.clone().requires_grad_() for values in activations_of((2, 3, 2, 2), 3, 1.0))
    assert torch.autograd.gradcheck(lambda *args: CalmOutput(*args).mass([0, 2], (0.2, 0, 0.9, 0.7)), (logits, scores))


@given(SHAPES, st.sampled_from(["softplus", "relu", "exp"]), st.integers(0, 9))
def test_within_is_the_prediction_given_that_the_cue_lies_in_the_region(shape, activation, seed):
    """p(y | x, cue in R) = p(y, cue in R | x) / p(cue in R | x), cells counted by their share in R."""
    output = CalmOutput(*activations_of(shape, seed, 2.0), activation)
    region = (0.0, 0.15, 0.6, 1.0)
    every = torch.arange(shape[1]).expand(shape[0], -1)
    got, coverage = output.within(region), cell_coverage(region, output.grid)
    mass = (output.prior * coverage).sum((1, 2))
    assert_close(got.probs.sum(1), torch.ones(shape[0], dtype=torch.float64))
    seen = mass > 0
    assert_close((got.probs * mass[:, None])[seen], output.mass(every, region)[seen])
    alike = output.conditional * (coverage / coverage.sum())  # where a ReLU prior has nothing
    assert_close(got.probs[~seen], alike.sum((2, 3))[~seen])
    assert_close(output.within((0, 0, 1, 1)).joint, output.joint)


def test_within_refuses_an_empty_region():
    with pytest.raises(CalmError, match="the region is empty"):
        CALM.within((0.3, 0.3, 0.3, 0.9))
    assert CALM.within((50, 30, 400, 60), size=(60, 400)).batch_size == 3


PARTS = torch.zeros(2, 6, 8, dtype=torch.bool)
PARTS[1, 2:, 1:5] = True
PARTS[0] = ~PARTS[1]
OF_PARTS = torch.tensor([[0, 4], [2, 2], [1, 3]])


@pytest.mark.parametrize("method", ["calm-em", "calm-ml"])
def test_loss_of_regions_is_each_classs_given_its_region_by_area(method):
    want = torch.zeros((), dtype=torch.float64)
    for area, region, classes in zip((2 / 3, 1 / 3), PARTS, OF_PARTS.T, strict=True):
        weights = cell_coverage(region, CALM.grid)
        prior = CALM.prior * weights / (CALM.prior * weights).sum((1, 2), keepdim=True)
        joint = prior * CALM.conditional[torch.arange(3), classes]
        loss = -joint.sum((1, 2)).log()
        if method == "calm-em":
            q = joint / joint.sum((1, 2), keepdim=True)
            loss = -torch.special.xlogy(q, joint).sum((1, 2))
        want += area * loss.mean()
    assert_close(CALM.loss(OF_PARTS, method=method, regions=PARTS), want)
    one = torch.ones(1, 6, 8, dtype=torch.bool)
    assert_close(CALM.loss(OF_PARTS[:, :1], method=method, regions=one), CALM.loss(OF_PARTS[:, 0], method=method))


def test_loss_of_regions_leaves_the_priors_share_between_them_alone():
    """With a window of whole cells, the scores within it can rise by any number."""
    logits, scores = activations_of((3, 5, 3, 4), 4, 1.0)
    whole = PARTS.clone()
    whole[1] = False
    whole[1, 2:, 2:6] = True  # cells of 2 x 2 pixels
    whole[0] = ~whole[1]
    raised = scores.clone()
    raised[:, :, 1:, 1:3] += 3
    for options in ({}, {"temperature": 0.5}, {"method": "calm-ml"}, {"teacher": CalmOutput(logits, scores, "exp")}):
        losses = [CalmOutput(logits, s, "exp").loss(OF_PARTS, regions=whole, **options) for s in (scores, raised)]
        assert_close(*losses)
    shares = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    soft = (torch.nn.functional.one_hot(OF_PARTS, 5) * shares[:, None]).sum(1)
    output = CalmOutput(logits, scores, "exp")
    extra = {"prior_weight": 0.3, "cam_weight": 0.7}
    added = [
        output.loss(t, regions=r, **extra) - output.loss(t, regions=r) for t, r in ((OF_PARTS, whole), (soft, None))
    ]
    assert_close(*added)


def test_loss_of_regions_refuses_targets_of_another_number():
    for targets in (OF_PARTS[:, 0], torch.zeros(3, 2), torch.zeros(3, 3, dtype=torch.long)):
        with pytest.raises(CalmError, match=r"2 regions: give class indices \(B, 2\)"):
            CALM.loss(targets, regions=PARTS)
    with pytest.raises(CalmError, match="target 5 of image 1"):
        CALM.loss(torch.tensor([[0, 1], [2, 5], [0, 0]]), regions=PARTS)


def test_print_of_an_output_says_what_is_in_it():
    text = str(CALM)
    assert text.startswith("CalmOutput: 3 images, 5 classes, a grid of 3 x 4\n")
    for output in (CALM, cam_output()):
        lines = str(output).splitlines()[1:-1]
        assert "class scores of each location" in " ".join(lines)
        for line in lines:
            name, shape = line.split()[0], re.search(r"\(.*?\)", line).group()
            assert str(tuple(getattr(output, name).shape)) == shape
