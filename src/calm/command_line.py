"""From a function's signature and docstring to flags: what `calm.cli` runs its commands with.

A required parameter is positional, a required ``list`` takes one or more values, the others are flags; a
``bool`` flag may stand alone (``--grid``). Help texts come from the docstring.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from calm.complaints import complaint, refuse_unknown_flags

__all__ = ["Formatter", "build_parser", "parse"]


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and examples; leaves out types and empty defaults, and reST's
    marks."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.help == argparse.SUPPRESS or not action.option_strings:
            return _plain(action.help or "")
        text = _plain(str(super()._get_help_string(action)))
        text = re.sub(r"(\(|, )type: %\(type\)s", r"\1", text)
        text = text.replace("(, ", "(").replace("()", "").replace("(required, )", "(required)").strip()
        if action.default is None or action.default is False:
            text = re.sub(r"\s*\((required)?(, )?default: %\(default\)s\)$", "", text)
        return text


def build_parser(
    function: Callable[..., Any],
    *,
    prog: str,
    examples: str,
    fixed: Mapping[str, Any] | None = None,
    words: Mapping[str, str] | None = None,
) -> ArgumentParser:
    """A parser for a function's parameters.

    Args:
        function: with type hints and a docstring.
        prog: how the command is called.
        examples: the end of the help, as it is to be shown.
        fixed: parameters that the command sets itself: no flags.
        words: help texts of parameters, where those of the docstring say too little on their own.
    """
    # jsonargparse would import all that the function's module imports for type checking alone, to find its hints.
    function.__annotations__.update(_hints(function))
    parser = ArgumentParser(
        prog=prog,
        description=_description(function),
        epilog="examples:\n" + examples,
        formatter_class=Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    skip: set[str | int] = set(fixed or {})
    for name, kind in _required_lists(function).items():
        parser.add_argument(
            name, nargs="+", type=kind, help=_help_of(function, name), metavar=name[:-1].upper()
        )
        skip.add(name)
    parameters = inspect.signature(function).parameters
    keywords: set[str | int] = {
        name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY
    }
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip | keywords)
    parser.add_function_arguments(function, as_group=False, skip=skip | (parameters.keys() - keywords))
    for action in parser._actions:
        if action.dest in (words or {}):
            action.help = (words or {})[action.dest]
        if action.dest in parameters and parameters[action.dest].annotation in (bool, bool | None):
            action.nargs, action.const, action.metavar = "?", True, "true|false"
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The values that arguments give the function's parameters.

    Raises:
        CalmError: an unknown flag, a missing or a wrong value.
        SystemExit: after ``--help``.
    """
    refuse_unknown_flags(parser, arguments)
    try:
        values: dict[str, Any] = parser.instantiate(parser.parse_args(list(arguments))).as_dict()
    except argparse.ArgumentError as error:
        raise complaint(parser, str(error)) from error
    return values


def _required_lists(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameters of type list[X] without default, and X."""
    hints = _hints(function)
    return {
        name: hints[name].__args__[0]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty and get_origin(hints.get(name)) is list
    }


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of the parameters; that of the result may have a name that is there for type checking alone."""
    annotations = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return get_type_hints(SimpleNamespace(__annotations__=annotations), function.__globals__)


def _description(function: Callable[..., Any]) -> str:
    """The docstring's text, before its sections, wrapped to the terminal."""
    text = inspect.getdoc(function) or ""
    text = _plain(re.split(r"\n(?:Args|Returns|Raises|Source):", text)[0].strip())
    width = min(100, shutil.get_terminal_size().columns - 2)
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


def _help_of(function: Callable[..., Any], name: str) -> str:
    from docstring_parser import parse as read

    described = {entry.arg_name: entry.description for entry in read(inspect.getdoc(function) or "").params}
    return _plain(re.sub(r"\s+", " ", described.get(name) or ""))


def _plain(text: str) -> str:
    """Without reST's marks: ``x``, :func:`x` and `x` become x."""
    return re.sub(r"(?::\w+:)?`{1,2}([^`]*)`{1,2}", r"\1", text)
