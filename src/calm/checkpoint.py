"""Saved models: a folder with ``model.safetensors`` (weights) and ``calm.json`` (everything else, the card).

Such a folder is self-describing: `calm.load` needs nothing but the folder, and nothing in it is executed. This file
reads and writes the two files and knows no model; `calm.model` builds one from them. A card looks like this::

    {
      "format": 1,
      "model": {"backbone": "resnet50", "num_classes": 2, "method": "calm-em", "large_feature_map": true,
                "use_bn": true, "output_stride": null, "prior_activation": "softplus",
                "prior_denominator": "differentiated", "in_channels": 3, "acol_threshold": null,
                "acol_channels": null, "pooling_exponent": 1.0},
      "class_names": ["crow", "raven"],
      "preprocessing": {"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                        "bits": null, "view": null, "interpolation": "bilinear"},
      "training": {"epochs": 40, "test_accuracy": 0.71},
      "versions": {"calm": "0.1.0", "torch": "2.11.0"},
      "weights_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    }
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from ssl import SSLError
from threading import Thread
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from calm.config import ModelConfig
from calm.errors import CalmError, shown, unknown
from calm.files import atomic_path, open_regular, read_json, similar_folder, working_folder, write_json
from calm.images import Preprocessing

CARD = "calm.json"
WEIGHTS = "model.safetensors"
README = "README.md"

FORMAT = 1
"""The newest version of the card's format, which is the one that is written."""


@dataclass(frozen=True)
class Card:
    """Everything about a saved model but its weights.

    Attributes:
        model: What to build.
        class_names: The C names of the classes, in the order of their indices.
        preprocessing: How an image becomes the model's input.
        training: What the training recorded about itself; any JSON object.
        versions: The versions of the packages that wrote the file, for people to read.
        weights_sha256: The hash of the weights' file, so that files of two different saves are not taken for one model.
    """

    model: ModelConfig
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    training: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: str

    def __post_init__(self) -> None:
        if len(self.class_names) != self.model.num_classes:
            raise CalmError(f"class_names has {len(self.class_names)} names for num_classes {self.model.num_classes}")

    def write(self, path: Path) -> None:
        """Write the card to ``path`` atomically; ``training`` must be something that JSON can express."""
        try:
            write_json(path, {"format": FORMAT, **asdict(self)})
        except (TypeError, ValueError, RecursionError) as error:
            raise CalmError(f"the training summary must be plain JSON data: {error}") from error

    @staticmethod
    def read(path: Path) -> Card:
        """Read a card, whose format must not be newer than `FORMAT`, and check every field."""
        content = read_json(path, "model card")
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            raise CalmError(f"{path} is not a model's description: it must be a JSON object with 'format': {FORMAT}")
        version = content.pop("format")
        if version > FORMAT:
            newer = f"has format {shown(version)}, of a newer release; this one reads up to {FORMAT}: upgrade calm"
            raise CalmError(f"{path} {newer}")
        if version < 1:
            raise CalmError(f"{path} has format {shown(version)}: allowed are 1 to {FORMAT}")
        card: Card = _parse(Card, content, str(path))
        return card


_EXPECTED = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a string", tuple: "a list"}


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type ``hint``, down to the fields of dataclasses; an error says what was expected."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Any, Literal):  # the words that are allowed are checked by the dataclass
        return value
    if kind is UnionType:  # of one type and None
        return None if value is None else _parse(arguments[0], value, where)
    if kind is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise CalmError(f"{where} must be a list of {len(kinds)} values, got {shown(value)}")
        return tuple(_parse(kinds[place], item, f"{where}[{place}]") for place, item in enumerate(value))
    if kind is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _parse_fields(kind, value, where)
    if kind is float and type(value) in (int, float) and abs(value) < 1e30:  # which float32 holds
        return float(value)
    if type(value) is kind and kind in (int, bool, str):
        return value
    raise CalmError(f"{where} must be {_EXPECTED.get(kind, 'a JSON object')}, got {shown(value)}")


def _parse_fields(kind: Any, content: dict[str, Any], where: str) -> Any:
    """Return a dataclass from its fields, which must be known and complete."""
    required = {field.name: field.default is MISSING for field in fields(kind)}
    for name in content:
        if name not in required:
            raise unknown("field", name, required, where=where)
    for name in required:
        if name not in content and required[name]:
            raise CalmError(f"{where} lacks the field {name!r}")
    hints = get_type_hints(kind)
    values = {name: _parse(hints[name], value, f"{where}: {name}") for name, value in content.items()}
    try:
        return kind(**values)
    except CalmError as error:
        raise CalmError(f"{where}: {error}") from error


def write(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: ModelConfig,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    training: dict[str, Any],
) -> Path:
    """Write a model's weights and card (see `Card`) to ``folder``, all or nothing, and return the folder, resolved.

    A new folder appears complete. In a folder that exists the two files are replaced, and other files stay; a
    kill between the two replacements leaves a mismatch that `read` detects.

    Args:
        folder: Created with its parents if missing.
        state: The model's state dict, on any device; dtypes are kept.

    Raises:
        CalmError: If ``folder`` is a file, or the training summary is not JSON.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise CalmError(f"cannot save a model to {folder}: a file of that name exists; give a folder")
    with working_folder(folder) as temporary:
        staging = temporary / folder.name
        staging.mkdir()
        with atomic_path(staging / WEIGHTS) as file:  # with the umask's permissions: safetensors gives 0600
            # Copies, since safetensors writes neither tensors that share memory nor strided ones.
            plain = {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()
            }
            save_file(plain, file, metadata={"format": "pt"})
        packages = {package: version(package) for package in ("calm", "torch", "torchvision", "timm")}
        sha256 = _sha256(staging / WEIGHTS)
        Card(config, class_names, preprocessing, training, packages, sha256).write(staging / CARD)
        if folder.is_dir() and any(folder.iterdir()):
            for name in (WEIGHTS, CARD):
                (staging / name).replace(folder / name)
        else:
            staging.replace(folder)
    return folder


def read(source: str | os.PathLike[str], revision: str | None = None) -> tuple[Path, Card, dict[str, Tensor]]:
    """Read a saved model, and return the folder that holds it, its card, and its weights on the CPU.

    Args:
        source: A folder that `write` wrote; or the folder of a training run, whose best model is taken, or its last
            if there is no best; or a model on the Hugging Face Hub, ``owner/name``.
        revision: A branch, tag or commit of the hub's repository; None is its main branch.

    Raises:
        CalmError: If there is no saved model, a file is damaged or of a newer release, the weights have another number
            of classes than the card, or the hub cannot be reached.
    """
    folder = _locate(source, revision)
    card = Card.read(folder / CARD)
    state = _read_weights(folder, card)
    rows = state.get("head.conv_last.weight")
    if rows is None or rows.ndim != 4 or not rows.numel() or len(rows) != card.model.num_classes:
        found = f"{'none' if rows is None else _kind(rows)} for {card.model.num_classes} classes"
        raise CalmError(f"{folder / WEIGHTS} does not fit the model in {CARD}: head.conv_last.weight is {found}")
    hidden, channels = state.get("head.hidden.0.weight"), card.model.acol_channels
    if channels is not None and (hidden is None or len(hidden) != channels):
        raise CalmError(f"{folder / WEIGHTS} does not fit the model in {CARD}, whose acol_channels are {channels}")
    return folder, card, state


HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b")
"""The names of models on the Hugging Face Hub, ``owner/name``, as its client checks them."""


def check_hub(repo_id: str) -> None:
    """Raise a CalmError if nothing can be uploaded under a name: its form is wrong, or the hub does not answer."""
    from huggingface_hub import constants

    if not HUB_ID.fullmatch(repo_id):
        form = "user/name, of letters, digits, '-', '_' and '.', such as me/birds"
        raise CalmError(f"{shown(repo_id)} cannot be a model on the Hugging Face Hub: give {form}")
    if silent := no_answer(constants.ENDPOINT):  # its client would wait without end
        fix = "connect to the network, or copy the model's folder instead"
        raise CalmError(f"cannot upload to {repo_id!r} on the Hugging Face Hub: {silent}; {fix}")


def upload(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None, overwrite_card: bool = False
) -> str:
    """Upload the files of a folder to the Hugging Face Hub, and return the address of the commit.

    A ``README.md`` that the repository has already stays, since people edit it there, unless ``overwrite_card``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        kept = [] if overwrite_card or not api.file_exists(repo_id, README) else [README]
        message = "Upload CALM model"
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=kept)
    except Exception as error:  # without a network, that of the client's transport: no OSError (findings/)
        raise CalmError(f"cannot upload to {repo_id!r} on the Hugging Face Hub: {error}") from error
    return str(commit.commit_url)


_READING = {
    "calm": """A model of class activation latent mapping ([CALM](https://arxiv.org/abs/2106.07861), ICCV 2021): where
the evidence is, is a variable of the model. Its *joint* map is p(y, z | x), the probability that the image shows class
y *and* that the cue for it is in grid cell z. Cells can be added: over a region they give the probability that the
image shows y and the cue lies in the region, over the whole grid the predicted probability of y. The *posterior* map,
p(z | x, y), sums to 1 for each class: where the cue is, if the class is y. The *prior*, p(z | x), is where the model
looks, whatever the class. A map that is resized to the image is for looking at; sums belong to the grid.""",
    "cam": """The map of a class (CAM) is its logit at each grid cell; their mean is the class's logit. It is not a
probability: maps of two images cannot be compared by their values, and pictures show each from its lowest to its
highest value.""",
}


def readme(card: Card, repo_id: str, figures: str = "", caution: str = "", *, example: bool = False) -> str:
    """Return the text that describes a model on the hub, in Markdown with the hub's header.

    Args:
        card: What is known of the model.
        repo_id: ``owner/name``.
        figures: Tables of its evaluation, in Markdown; empty if there are none.
        caution: What a reader of its maps must know first; empty if nothing is known.
        example: Whether there is a picture of an example, ``example.png``.
    """
    model, size = card.model, " x ".join(map(str, card.preprocessing.size))
    head = {"library_name": "calm", "pipeline_tag": "image-classification"}
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "tags: [calm, attribution, interpretability]"]
    what = f"`{model.backbone}`, trained by {model.title}, for images of {size} pixels"
    lines += ["---", "", f"# {repo_id.partition('/')[2]}", ""]
    lines += [f"An image classifier of {model.num_classes} classes that says where it saw the evidence: {what}.", ""]
    lines += ["![A picture, and where the model saw the evidence](example.png)", ""] if example else []
    custom = ", backbone=YOUR_MODULE" if model.backbone == "custom" else ""
    code = [
        f'model = calm.load("{repo_id}"{custom})',
        'images = model.preprocess("photo.jpg")',
        "output = model(images)",
    ]
    code += ["best = output.probs[0].argmax()", "print(model.class_names[best], output.probs[0, best])"]
    code += ["maps = output.attribute([best])  # on the grid; model.attribute gives the size of the image"]
    lines += ["## Use", "", "```python", "import calm", "", *code, "```", ""]
    lines += ["## How to read the maps", "", _READING["cam" if model.method == "cam" else "calm"], ""]
    none = "None was given. `calm evaluate` makes such tables, and `calm push --evaluation FOLDER` shows them here."
    lines += ["## Figures", "", figures.strip() or none, ""]
    known = [f"- {name}: {value}" for name, value in _flat(card.training) if name != "fingerprint"]
    lines += ["## Training", "", *(known or ["Nothing is recorded."]), ""]
    lines += ["## Limits", "", *([f"- **Of this model: {caution}.**"] if caution else [])]
    lines += ["- It knows the classes below and no others: a picture of anything else gets one of them, too."]
    lines += ["- A map shows what the model used, which need not be the object, nor what people would look at."]
    lines += [
        "- Its grid is coarse: a cell stands for a patch of the image, and what the network saw of its surroundings."
    ]
    lines += ["- Probabilities are as calibrated as the figures above say, on data like those of the training."]
    names = ", ".join(name.replace("`", "'") for name in card.class_names[:200])
    more = f", and {len(card.class_names) - 200} more (calm.json)" if len(card.class_names) > 200 else ""
    lines += ["", "## Classes", "", f"{names}{more}", ""]
    versions = ", ".join(f"{package} {number}" for package, number in card.versions.items())
    return "\n".join([*lines, f"*Written by {versions}.*", ""])


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and values of nested mappings, as texts of one line."""
    for key, value in content.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, f"{name}, ")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield name, " ".join(text.split())[:200]


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``, which takes over its dtypes.

    Raises:
        CalmError: If keys are missing or unexpected, or tensors have another shape; the first of them are named.
    """
    own = model.state_dict(keep_vars=True)
    kinds = {key: (_kind(state[key]), _kind(own[key])) for key in own if key in state}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key[:200] for key in state if key not in own],
        "of another kind": [
            f"{key} ({given}, should be {mine})" for key, (given, mine) in kinds.items() if given != mine
        ],
    }
    if any(problems.values()):
        texts = (f"{len(keys)} {what}: {_first(keys)}" for what, keys in problems.items() if keys)
        raise CalmError("; ".join(texts))
    for key, tensor in state.items():
        own[key].data = own[key].data.to(tensor.dtype)
    model.load_state_dict(state)


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _kind(tensor: Tensor) -> str:
    """Return the shape and the kind of numbers, whose dtypes load into one another."""
    dtype = tensor.dtype
    is_float = dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 is only stored
    is_whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return f"{'float' if is_float else 'whole numbers' if is_whole else dtype} {tuple(tensor.shape)}"


def _read_weights(folder: Path, card: Card) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    open_regular(path, "the weights").close()
    try:
        found = _sha256(path)
        state: dict[str, Tensor] = load_file(path)
    except Exception as error:  # besides OSError and SafetensorError, KeyError for a dtype that torch does not have
        what = f"{type(error).__name__} {str(error)[:500]}; get or save them anew"
        raise CalmError(f"cannot read the weights {path}: {what}") from error
    if found != card.weights_sha256:
        hashes = f"sha256 {found[:12]}..., should be {card.weights_sha256[:12]}..."
        fix = "a damaged download or an interrupted save; get or save it anew"
        raise CalmError(f"{path} is not the file that {CARD} describes ({hashes}): {fix}")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the folder that holds the two files, downloaded if need be."""
    path = Path(source)
    if revision is not None and path.exists():
        raise CalmError(f"{path} is a folder of this machine, which has no revision {revision!r}: leave revision out")
    if path.is_dir():
        return _model_folder(path)
    if path.exists():
        released = "calm.load_released reads checkpoints of the released code"
        hint = f"load {path.parent}" if path.name in (CARD, WEIGHTS) else released
        raise CalmError(f"{path} is a file, but a saved model is a folder with {CARD} and {WEIGHTS}: {hint}")
    name = os.fspath(source)
    if not HUB_ID.fullmatch(name) or Path(name.partition("/")[0]).exists():
        near = similar_folder(path)
        raise CalmError(f"no saved model at {name}: no such folder{near}, and no hub id either (owner/name)")
    return _download(name, revision)


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "best", path / "last"):
        if (folder / CARD).is_file():
            return folder
    if (path / "last_checkpoint.pth.tar").is_file():
        raise CalmError(f"{path} holds a checkpoint of the released code: use calm.load_released or calm convert")
    raise CalmError(f"{path} holds no saved model: there is no {CARD}, best/{CARD} or last/{CARD} in it")


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_or_cache() as silent:
        try:
            files = [Path(hf_hub_download(repo_id, name, revision=revision)) for name in (WEIGHTS, CARD)]
        except (OSError, ValueError) as error:  # every error class of the hub's client is one of these
            reason = f"{silent}. Without a network, copy the model's folder here" if silent else error
            tried = "there is no such folder, and the Hugging Face Hub gave none"
            where = repo_id if revision is None else f"{repo_id}, revision {revision}"
            raise CalmError(f"no saved model at {where}: {tried}: {reason}") from error
    return files[-1].parent


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Run the block with the Hugging Face Hub's cache alone if the hub does not answer: its client would wait a minute.

    The block gets the reason why the hub is left out, for a message about what the cache lacks; empty if it is used.
    """
    from huggingface_hub import constants

    silent = "" if constants.HF_HUB_OFFLINE else no_answer(constants.ENDPOINT)
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE or bool(silent)
    try:
        yield silent
    finally:
        constants.HF_HUB_OFFLINE = offline


def no_answer(url: str, seconds: float = 3) -> str:
    """Return a sentence about the server of ``url`` if it does not answer in time, through a proxy if one is set."""
    answers: list[str] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=seconds).close()
        except OSError as error:  # a refusal is an answer, and other clients may know the certificate
            if not isinstance(error, HTTPError) and not isinstance(getattr(error, "reason", error), SSLError):
                return
        answers.append(url)

    thread = Thread(target=ask, daemon=True)  # since looking up the host's name has no time limit
    thread.start()
    thread.join(seconds)
    return "" if answers else f"{urlsplit(url).netloc} does not answer"
