"""Exported programs give PyTorch's results, in the runtime that they are for, and describe themselves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from stress_counts import FULL
from test_examples import load_example
from timm.layers import Conv2dSame
from torch import nn

import calm
from calm import exporting
from calm.cli import main
from calm.errors import CalmError
from calm.exporting import Pass, export

ort = pytest.importorskip("onnxruntime", reason="needs the extra `export`")


def small(method="calm-em", *, classes=5, size=(24, 32), backbone=None, **options):
    """A model of one convolution, whose prior and classes differ from cell to cell."""
    body = backbone or nn.Sequential(nn.Conv2d(3, 6, 5, stride=4, padding=2), nn.ReLU())
    preprocessing = calm.Preprocessing(size=size, **options)
    model = calm.create_model(body, classes, method, preprocessing=preprocessing)
    for layer in model.head.children():
        nn.init.normal_(layer.weight)
    model.class_names = tuple(f"bird {number} é" for number in range(classes))
    return model


def session_of(path):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def metadata_of(session):
    return {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its ONNX file, of joint maps."""
    torch.manual_seed(0)
    model = small()
    found = export(model, tmp_path_factory.mktemp("onnx") / "birds.onnx")
    return model, found, session_of(found.path)


def oracle(model, images, classes):
    """Probabilities, joint maps and prior in float64, by the paper's equations."""
    features = model.backbone(images).double()
    scores, weights = model.head.conv_last, model.head.attention
    logits = nn.functional.conv2d(features, scores.weight.double(), scores.bias.double())
    cells = nn.functional.conv2d(features, weights.weight.double(), weights.bias.double())[:, 0]
    activated = (1 + cells.exp()).log()
    prior = activated / activated.sum((1, 2), keepdim=True)
    joint = logits.exp() / logits.exp().sum(1, keepdim=True) * prior[:, None]
    return joint.sum((2, 3)), torch.stack([joint[row, chosen] for row, chosen in enumerate(classes)]), prior


@pytest.mark.parametrize(("batch", "size", "count"), [(1, (24, 32), 1), (4, (24, 32), 5), (2, (45, 31), 2)])
def test_onnx_gives_the_papers_quantities_for_any_batch_size_and_classes(exported, batch, size, count):
    model, _, session = exported
    images, classes = torch.randn(batch, 3, *size), torch.randint(5, (batch, count))
    found = session.run(None, {"image": images.numpy(), "classes": classes.numpy()})
    with torch.no_grad():
        for mine, expected in zip(found, oracle(model, images, classes), strict=True):
            assert mine.dtype == np.float32
            np.testing.assert_allclose(mine, expected.numpy(), atol=2e-6)
    np.testing.assert_allclose(found[1].sum((2, 3)), np.take_along_axis(found[0], classes.numpy(), 1), atol=1e-6)


def test_onnx_is_one_file_that_names_its_sides_and_says_what_it_is(exported):
    model, found, session = exported
    assert list(found.path.parent.iterdir()) == [found.path]
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "image": ["batch", 3, "height", "width"],
        "classes": ["batch", "k"],
    }
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "probs": ["batch", 5],
        "maps": ["batch", "k", "rows", "columns"],
        "prior": ["batch", "rows", "columns"],
    }
    metadata = metadata_of(session)
    assert metadata == json.loads(json.dumps(found.metadata))
    assert metadata["class_names"] == list(model.class_names)
    assert (metadata["kind"], metadata["preprocess"]) == ("joint", False)
    assert metadata["preprocessing"]["size"] == [24, 32]
    assert metadata["versions"]["calm"] == calm.__version__
    assert b"site-packages" not in found.path.read_bytes()
    assert found.error < 1e-5
    assert (3, 3, 24, 32) in found.cases
    assert {case[2:] for case in found.cases} != {(24, 32)}
    for words in ("joint maps", "float32 batch x 3 x height x width", "rows x columns", "at most"):
        assert words in str(found)


def test_onnx_with_preprocessing_takes_pictures_of_any_size_as_the_model_does_and_the_example_draws_them(tmp_path):
    model = small(size=(32, 32), interpolation="bicubic").eval()
    found = export(model, tmp_path / "birds.onnx", preprocess=True)
    assert found.metadata["inputs"]["image"] == ["uint8", "batch", "height", "width", 3]
    picture = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(picture).resize((90, 60)))  # neighbours alike, as in a photograph
    classes = np.array([[1, 2]])
    probs, maps, _ = session_of(found.path).run(None, {"image": picture[None], "classes": classes})
    with torch.no_grad():
        output = model(model.preprocess(picture))
    np.testing.assert_allclose(probs, output.probs, atol=0.01)  # Pillow rounds to grey levels, twice
    expected = output.attribute(classes.tolist()).numpy()
    np.testing.assert_allclose(maps, expected, atol=0.02 * expected.max())

    orientation = Image.Exif()
    orientation[0x0112] = 6  # lies on its side, as a phone stores it
    Image.fromarray(np.rot90(picture)).save(tmp_path / "bird.png", exif=orientation)
    names = ("birds.onnx", "bird.png", "map.png")
    first = load_example("onnx_map").explain(*(str(tmp_path / name) for name in names))
    assert [name for name, _ in first] == [model.class_names[index] for index in probs[0].argsort()[::-1][:3]]
    assert first[0][1] == pytest.approx(probs.max())
    drawn = np.asarray(Image.open(tmp_path / "map.png"), dtype=int) - picture
    assert drawn.shape == (60, 90, 3)
    assert drawn[..., 0].max() > 20  # more red, and less of the others
    assert drawn[..., 1:].max() == 0


def test_torch_export_gives_the_maps_of_a_kind_and_its_metadata(tmp_path):
    model = small()
    found = export(model, tmp_path / "birds.pt2", "torch-export", kind="evidence")
    extra = {exporting.METADATA: ""}
    program = torch.export.load(found.path, extra_files=extra).module()
    assert json.loads(extra[exporting.METADATA]) == json.loads(json.dumps(found.metadata))
    images, classes = torch.randn(4, 3, 40, 28), torch.tensor([[0, 1]] * 4)
    with torch.no_grad():
        torch.testing.assert_close(program(images, classes)[1], model.eval()(images).attribute(classes, "evidence"))


class OneSize(nn.Module):
    """A network with a value for each place of a 6 x 8 grid, as of position embeddings."""

    out_channels = 4

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4)
        self.rel_pos = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, images):
        return self.norm(self.convolution(images)) + self.rel_pos


def test_a_network_of_one_size_is_exported_for_that_size_in_float32_and_left_as_it_was(tmp_path):
    model = small(backbone=OneSize()).bfloat16().train()
    found = export(model, tmp_path / "birds.pt2", "torch-export")
    assert {case[2:] for case in found.cases} == {(24, 32)}
    assert found.metadata["inputs"]["image"] == ["float32", "batch", 3, 24, 32]
    assert found.metadata["outputs"]["maps"] == ["float32", "batch", "k", 6, 8]
    assert "images must be 24 x 32 pixels" in str(found)
    with pytest.raises(CalmError, match="24 x 32 pixels, the network takes no other: leave dynamic_size out"):
        export(model, tmp_path / "other.pt2", "torch-export", dynamic_size=True)
    assert model.training
    assert model.backbone.norm.num_batches_tracked == 0
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert all(value.requires_grad for value in model.parameters())


def test_a_network_with_same_padding_is_exported_for_one_size_as_tracing_it_for_any_does_not_end(tmp_path):
    model = small(backbone=nn.Sequential(Conv2dSame(3, 4, 3, stride=2), Conv2dSame(4, 6, 5, stride=2)))
    found = export(model, tmp_path / "birds.pt2", "torch-export")
    assert {case[2:] for case in found.cases} == {(24, 32)}
    assert found.note == "images must be 24 x 32 pixels: its padding depends on the size (SAME)"
    with pytest.raises(CalmError, match=r"24 x 32 pixels, its padding depends on the size \(SAME\): leave"):
        export(model, tmp_path / "birds.pt2", "torch-export", dynamic_size=True)


class Branching(nn.Sequential):
    """A network whose path depends on how wide images are, which the tracer must fix."""

    def forward(self, images):
        return super().forward(images) * (2 if images.shape[-1] <= 32 else 1)


def test_a_network_that_cannot_be_traced_for_all_sizes_falls_back_to_its_own(tmp_path):
    model = small(backbone=Branching(nn.Conv2d(3, 4, 4, stride=4)))
    found = export(model, tmp_path / "birds.pt2", "torch-export")
    assert {case[2:] for case in found.cases} == {(24, 32)}
    assert "images of other sizes than 24 x 32 pixels are not taken" in found.note


class Untraceable(nn.Sequential):
    """A network that decides by values, which a tracer does not see."""

    def forward(self, images):
        return super().forward(images if float(images.sum()) > 0 else -images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onxx"}, "unknown export format 'onxx'.*did you mean 'onnx'"),
        ({"out": "birds.pth"}, r"cannot export to .*birds\.pth as onnx: give a file whose name ends in \.onnx$"),
        ({"out": "birds.pt2"}, r"name ends in \.onnx, or to=torch-export$"),
        ({"out": "birds.pte", "to": "executorch", "preprocess": True}, "one size of images: leave preprocess out"),
        ({"kind": "joint-superclass"}, "sums over classes, .*: choose joint, posterior, prior, evidence"),
        ({"kind": "cam"}, "cannot be read from a CALM model"),
        ({"model": small(backbone=Untraceable(nn.Conv2d(3, 4, 4)))}, "it cannot be exported to onnx for images of 24"),
    ],
)
def test_export_refuses(tmp_path, options, message):
    options = {"model": small(), "out": "birds.onnx", "to": "onnx"} | options
    with pytest.raises(CalmError, match=message):
        export(out=tmp_path / options.pop("out"), **options)
    assert not list(tmp_path.iterdir())


def test_export_refuses_more_weights_than_one_onnx_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST_ONNX", 100)
    with pytest.raises(CalmError, match=r"GB of weights do not fit into one ONNX file \(2 GB\): use torch-export"):
        export(small(), tmp_path / "birds.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values + 1e-3, "on images of 1 x 3 x 24 x 32 are 1.0e-03 from PyTorch's, allowed are 0.0001"),
        (lambda values: values * math.nan, "are nan from PyTorch's"),
        (lambda values: values[:1, ..., :1], "values instead of"),
        (lambda values: values.reshape(7, 11), "does not run on images of 1 x 3 x 24 x 32: shape"),
    ],
)
@torch.no_grad()
def test_results_that_differ_are_an_error(change, message):
    plain = Pass(small(), "joint", preprocess=False)
    inputs = torch.randn(1, 3, 24, 32), torch.tensor([[0, 1]])
    assert exporting._difference(lambda *same: list(plain(*same)), plain, inputs) == 0
    with pytest.raises(CalmError, match=message):
        exporting._difference(lambda *same: list(map(change, plain(*same))), plain, inputs)


def test_a_file_whose_results_differ_is_not_left_and_the_earlier_one_stays(tmp_path, monkeypatch):
    def write(program, file, metadata):
        file.write_bytes(b"program")
        return lambda *inputs: [1 - values for values in program.module()(*inputs)]

    monkeypatch.setitem(exporting._WRITERS, "torch-export", write)
    (tmp_path / "birds.pt2").write_bytes(b"earlier")
    with pytest.raises(CalmError, match="from PyTorch's, allowed are"):
        export(small(), tmp_path / "birds.pt2", "torch-export", dynamic_size=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


def test_calm_export_writes_a_file_and_says_what_it_takes(tmp_path, capsys):
    saved = calm.create_model("tiny_resnet", 3, preprocessing=calm.Preprocessing(size=(32, 32)))
    saved.save_pretrained(tmp_path / "model")
    words = ["export", "--model", str(tmp_path / "model"), "--to", "torch-export", "--dynamic-size", "false"]
    assert main([*words, "--out", str(tmp_path / "birds.pt2")]) == 0
    assert "takes    image float32 batch x 3 x 32 x 32, classes int64 batch x k" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "birds.onnx")]) == 2
    assert "give a file whose name ends in .pt2" in capsys.readouterr().err


RELEASED = [("resnet50", 64), ("vgg16", 64), ("inception_v3", 96)]
TIMM = ["resnet18", "convnext_atto", "efficientnet_lite0", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]


@pytest.mark.stress
@pytest.mark.skipif(not FULL, reason="minutes: with CALM_STRESS=full")
@pytest.mark.filterwarnings("ignore:timm model")
@pytest.mark.parametrize(
    ("name", "size"), [*RELEASED, *((name, 64) for name in TIMM), ("swin_tiny_patch4_window7_224", 224)]
)
def test_onnx_of_released_and_timm_networks_is_pytorchs(tmp_path, name, size):
    preprocessing = calm.Preprocessing(size=(size, size))
    model = calm.create_model(name, 4, preprocessing=preprocessing).eval()
    found = export(model, tmp_path / "model.onnx")
    assert ("height" in found.metadata["inputs"]["image"]) == ("swin" not in name)
    images, classes = torch.randn(2, 3, *found.cases[-1][2:]), torch.tensor([[0, 3]] * 2)
    mine = session_of(found.path).run(None, {"image": images.numpy(), "classes": classes.numpy()})
    with torch.no_grad():
        for one, other in zip(mine, Pass(model, "joint", preprocess=False)(images, classes), strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


def test_executorch_gives_pytorchs_results(tmp_path):
    pytest.importorskip("executorch", reason="needs the extra `executorch`")
    found = export(small(), tmp_path / "birds.pte", "executorch")
    assert found.metadata["inputs"]["image"] == ["float32", 1, 3, 24, 32]
    assert found.error < 1e-5
