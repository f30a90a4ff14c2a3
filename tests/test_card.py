"""calm.json: written and read back whole, and read strictly."""

from __future__ import annotations

import json
import re

import pytest

from calm.checkpoint import FORMAT, Card
from calm.config import ModelConfig
from calm.errors import CalmError
from calm.images import Preprocessing

CARD = Card(
    ModelConfig(
        "resnet50", 2, "calm-ml", large_feature_map=False, output_stride=None, prior_activation="exp"
    ),
    ("crow", "Rabe ü"),
    Preprocessing((96, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    {"epochs": 3, "nested": {"list": [1, None, "x"]}},
    {"calm": "0.1.0"},
    "ab" * 32,
)


@pytest.fixture
def path(tmp_path):
    CARD.write(tmp_path / "calm.json")
    return tmp_path / "calm.json"


def change(path, *keys, to):
    """Set the value under ``keys`` of the file to ``to``."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(content))


def test_what_is_written_is_read_back(path):
    assert Card.read(path) == CARD


def test_the_sample_in_the_documentation_is_a_card(tmp_path):
    import calm.checkpoint

    sample = re.search(r"::\n\n(.*)\Z", calm.checkpoint.__doc__, re.DOTALL)[1]
    (tmp_path / "calm.json").write_text(sample)
    card = Card.read(tmp_path / "calm.json")
    assert card.class_names == ("crow", "raven")
    card.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(sample)


def test_a_field_with_a_default_may_be_absent_so_that_old_files_load(path):
    content = json.loads(path.read_text())
    del content["model"]["use_bn"]
    path.write_text(json.dumps(content))
    assert Card.read(path).model.use_bn is True


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), FORMAT + 1, f"has format {FORMAT + 1}, of a newer release.*upgrade calm"),
        (("format",), 0, "has format 0"),
        (("format",), "1", "must be a JSON object with 'format'"),
        (("format",), True, "must be a JSON object with 'format'"),
        (("extra",), 1, "unknown field 'extra'"),
        (("model", "metod"), "cam", "unknown field 'metod'.*: model.*did you mean 'method'"),
        (("model", "method"), "calm", "calm.json: model: method.*calm-em, calm-ml, cam"),
        (("model", "method"), ["cam"], "calm.json: model: method"),
        (("model", "backbone"), 5, "calm.json: model: backbone must be a string, got 5"),
        (("model", "num_classes"), True, "num_classes must be a whole number, got True"),
        (("model", "num_classes"), 2.0, "num_classes must be a whole number, got 2.0"),
        (("model", "num_classes"), 3, "class_names has 2 names for num_classes 3"),
        (("model", "use_bn"), 1, "use_bn must be true or false, got 1"),
        (("model", "output_stride"), "8", "output_stride must be a whole number, got '8'"),
        (("model",), [], r"model must be a JSON object, got \[\]"),
        (("class_names",), "ab", "class_names must be a list, got 'ab'"),
        (("class_names",), ["a", 1], r"class_names\[1\] must be a string, got 1"),
        (("preprocessing", "size"), [224], r"size must be a list of 2 values, got \[224\]"),
        (("preprocessing", "size"), [0, 4], "calm.json: preprocessing: preprocessing size"),
        (("preprocessing", "mean"), [0, 0, float("nan")], r"mean\[2\] must be a finite number, got nan"),
        (("preprocessing", "std"), [1, 1, 0], "calm.json: preprocessing"),
        (("training",), [], "training must be a JSON object"),
        (("versions",), {"calm": 1}, "versions.calm must be a string"),
        (("weights_sha256",), None, "weights_sha256 must be a string, got None"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(path, keys, value, message):
    change(path, *keys, to=value)
    with pytest.raises(CalmError, match=message) as caught:
        Card.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("field", ["model", "class_names", "weights_sha256"])
def test_a_missing_field_is_named(path, field):
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(CalmError, match=f"calm.json lacks the field {field!r}"):
        Card.read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[[1", b"null", b"[1]"])
def test_what_is_no_json_object_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CalmError, match=re.escape(str(path))):
        Card.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CalmError, match=r"cannot read .*none\.json"):
        Card.read(tmp_path / "none.json")


def test_a_training_summary_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    card = Card(CARD.model, CARD.class_names, CARD.preprocessing, {"x": {1, 2}}, {}, "")
    with pytest.raises(CalmError, match=r"training summary must be plain JSON.*set"):
        card.write(tmp_path / "calm.json")
    assert not list(tmp_path.iterdir())
