"""``calm.json``: what a saved model says about itself, read strictly.

A file as `Card.write` leaves it::

    {
      "format": 1,
      "model": {"backbone": "resnet50", "num_classes": 2, "method": "calm-em", "large_feature_map": true,
                "use_bn": true, "output_stride": null, "prior_activation": "softplus",
                "prior_denominator": "differentiated"},
      "class_names": ["crow", "raven"],
      "preprocessing": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
      "training": {"epochs": 40, "test_accuracy": 0.71},
      "versions": {"calm": "0.1.0", "torch": "2.11.0"},
      "weights_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    }
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from calm.atomic import write_json
from calm.documents import read_json
from calm.errors import CalmError, shown, unknown
from calm.model import ModelConfig
from calm.preprocess import Preprocessing

__all__ = ["FORMAT", "Card"]

FORMAT = 1
"""The newest version of the format, and the one that is written."""

LARGEST = 1e30
"""Size of a number where one is asked for: float32 holds it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """Everything about a saved model but its weights.

    Attributes:
        model: what to build.
        class_names: C names, in the order of their indices.
        preprocessing: from an image to the model's input.
        training: whatever the training recorded about itself; any JSON object.
        versions: of the packages that wrote the file; for the reader's eyes.
        weights_sha256: of the weights' file, so that files of two different saves are not taken for one model.
    """

    model: ModelConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    training: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: str

    def __post_init__(self) -> None:
        if len(self.class_names) != self.model.num_classes:
            raise CalmError(
                f"class_names has {len(self.class_names)} names for num_classes {self.model.num_classes}"
            )

    def write(self, path: Path) -> None:
        """Write the card to ``path`` atomically.

        Raises:
            CalmError: ``training`` holds something that JSON has no word for.
        """
        try:
            json.dumps(self.training)
        except (TypeError, ValueError, RecursionError) as error:
            raise CalmError(f"the training summary must be plain JSON data: {error}") from error
        write_json(path, {"format": FORMAT, **asdict(self)})

    @staticmethod
    def read(path: Path) -> Card:
        """Read and check a card.

        Raises:
            CalmError: no such file, no JSON, a newer format, an unknown, missing or wrong field: named.
        """
        content = read_json(path, "model card")
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            raise CalmError(
                f"{path} is not a model's description: it must be a JSON object with 'format': {FORMAT}"
            )
        version = content.pop("format")
        if version > FORMAT:
            raise CalmError(
                f"{path} has format {shown(version)}, of a newer release; this one reads up to {FORMAT}: upgrade calm"
            )
        if version < 1:
            raise CalmError(f"{path} has format {shown(version)}: allowed are 1 to {FORMAT}")
        return _record(Card, content, str(path))


def _record(kind: type[T], content: object, where: str) -> T:
    """A dataclass from a JSON object whose fields must be known, complete and of the right type."""
    if not isinstance(content, dict):
        raise CalmError(f"{where} must be a JSON object, got {shown(content)}")
    hints = get_type_hints(kind)
    known = fields(kind)  # type: ignore[arg-type]
    names = [field.name for field in known]
    for name in content:
        if name not in names:
            raise unknown("field", name, names, where=where)
    for field in known:
        if field.name not in content and field.default is MISSING:
            raise CalmError(f"{where} lacks the field {field.name!r}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in content.items()}
    try:
        return kind(**values)
    except CalmError as error:
        raise CalmError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` of a JSON file as the annotated type ``hint``, or an error that says what was expected."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise unknown("value", value, map(str, arguments), where=where)
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (hint,) = (one for one in arguments if one is not NoneType)
        return _value(hint, value, where)
    if hint == tuple[str, ...] and isinstance(value, list) and all(type(item) is str for item in value):
        return tuple(value)  # class names, which may be a million: no place to be named for each
    if origin is tuple and isinstance(value, list):
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise CalmError(f"{where} must be a list of {len(kinds)} values, got {shown(value)}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_value(kind, item, f"{where}[{place}]") for place, (kind, item) in pairs)
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return _record(hint, value, where)
    if hint is float and type(value) in (int, float) and abs(value) < LARGEST:
        return float(value)
    if hint is Any or (type(value) is hint and hint is not float):
        return value
    expected = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a string"}
    expected |= {tuple: "a list", dict: "a JSON object"}
    raise CalmError(f"{where} must be {expected[origin or hint]}, got {shown(value)}")
