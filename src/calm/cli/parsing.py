"""What is wrong with the words of a command line, as people say it: the flag, the value, what is allowed.

From a function's signature and docstring to flags: what `calm.cli` runs its commands with.

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
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any, NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from calm.errors import CalmError, unknown

__all__ = ["Formatter", "Parser", "build_parser", "complaint", "parse", "refuse_unknown_flags"]


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


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


class Parser(argparse.ArgumentParser):
    """A parser of argparse whose mistakes are a `CalmError`."""

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse's, but unknown flags are complained about first.

        Raises:
            CalmError: an unknown flag, a missing or a wrong value.
            SystemExit: after ``--help``.
        """
        refuse_unknown_flags(self, args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise complaint(self, message)


def refuse_unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Before anything else is looked at, as a mistyped flag is missed under its right name too.

    Raises:
        CalmError: a flag that the parser does not have, with the closest one.
    """
    known = parser._option_string_actions
    for word in words:
        flag = word.partition("=")[0].removesuffix("+")
        if flag.startswith("--") and flag not in known:
            if flag == "--":
                return
            close = get_close_matches(flag[:100], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; see {parser.prog} --help"
            raise CalmError(f"unknown flag {flag[:200]}{hint}")


def complaint(parser: argparse.ArgumentParser, message: str) -> CalmError:
    """The error for a message of argparse or jsonargparse.

    Args:
        parser: whose message it is.
        message: that of a wrong value, a missing argument or anything else, in which case it stays as it is.
    """
    text = re.sub(r"\s*\n\s*", " ", message)
    text = re.sub(r"^unrecognized arguments: ", "nothing is known to do with ", text)
    wrong = re.fullmatch(
        r'Parser key "(?P<key>[^"]+)": Expected a (?P<kind>.+?)\. Got value: (?P<value>.*)', text
    )
    if wrong:
        flag, kind = f"--{wrong['key']}", wrong["kind"]
        literal = re.fullmatch(r"typing\.Literal\[(.+)\]", kind)
        if literal:
            return unknown("value", wrong["value"], re.findall(r"'([^']*)'", literal[1]), where=flag)
        kind = _KINDS.get(kind.removeprefix("<class '").removesuffix("'>"), kind)
        text = f"{flag} is {wrong['value'][:200]!r}: give {kind}"
    choice = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.+)\)", text)
    if choice:
        return unknown("value", choice[2], choice[3].replace("'", "").split(", "), where=choice[1])
    missing = re.fullmatch(r"the following arguments are required: (.+)", text)
    if missing:
        flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
        names = [flags.get(name, name) for name in missing[1].split(", ")]
        text = f"missing: {', '.join(names)}"
    return CalmError(f"{text}; see {parser.prog} --help")
