"""Command-line parsers made from type hints: jsonargparse, with help pages and error messages for people.

What is wrong with a command line is found by comparing its words with the parser's flags and their type hints, not by
reading the messages of jsonargparse, which are passed on where this finds nothing.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType, NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter  # type: ignore[attr-defined]

from calm.errors import CalmError, unknown
from calm.files import read_yaml


class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Format help pages: keep line breaks of description and epilog, show defaults, hide types and reST markup."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._HelpAction):
            return "show this help message and exit"
        text = plain_text(action.help or "")
        if action.help == argparse.SUPPRESS or not action.option_strings:
            return text
        if action.required:
            return f"{text} (required)"
        # An absent value needs no words, nor does the default of a switch: the text says what happens then.
        silent = action.nargs == 0 or any(action.default is value for value in (None, False, "", argparse.SUPPRESS))
        return text if silent else f"{text} (default: %(default)s)"


class Parser(ArgumentParser):
    """A jsonargparse parser whose errors are a `CalmError` that names the flag, the value and what is allowed.

    ``prog`` and ``description`` are needed; ``epilog`` is the end of the help page, with examples.
    """

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": Formatter, "exit_on_error": False, "allow_abbrev": False}
        super().__init__(**defaults | options)
        self._given: list[tuple[argparse.Action, list[str]]] = []  # the words that each argument was given
        self._required: list[argparse.Action] = []

    def parse_args(self, args: Sequence[str], *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Return the values of ``args`` as a namespace; raises as `parse` does."""
        # First, since a mistyped flag is also missed under its right name.
        _refuse_unknown_flags(self, args)
        self._given = []
        self._required = [action for action in self._actions if action.required]  # jsonargparse clears it meanwhile
        try:
            return super().parse_args(args, *rest, **options)
        except argparse.ArgumentError as error:
            raise _explained(self, self._given, error) from error

    def _parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Do as argparse, and refuse the words that belong to no flag: perhaps one's value, without the flag."""
        namespace, rest = super()._parse_known_args(*arguments, **options)
        if rest:
            flags = [name for name in self.missing() if name.startswith("--")]
            several = [words[-1] for action, words in self._given if action.nargs == "+" and not action.option_strings]
            hint = f"give it next to {several[0]}" if several else f"see {self.prog} --help"
            hint = f"did you mean {flags[0]} {rest[0]}?" if flags else hint
            raise CalmError(f"{rest[0]!r} belongs to no flag; {hint}")
        return namespace, rest

    def missing(self) -> list[str]:
        """Return the names of what must be given, and is neither on the command line nor in a file of settings."""
        given = [action for action, words in self._given if words]
        files = [words[0] for action, words in self._given if isinstance(action, ActionConfigFile)]
        settings = {name for file in files for name in read_yaml(file) or ()}
        return [_name(action) for action in self._required if action not in given and action.dest not in settings]

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        hint = getattr(action, "_typehint", None)
        if get_origin(hint) is list and action.nargs is None and not arg_strings[0].startswith("["):
            arg_strings = [f"[{arg_strings[0]}]"]  # --log.loggers csv,wandb
        self._given.append((action, arg_strings))
        return super()._get_values(action, arg_strings)


def build_parser(
    function: Callable[..., Any],
    prog: str,
    examples: str,
    fixed: Iterable[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Parser:
    """Make a parser for a function's parameters: required ones are positional, the others flags.

    Args:
        function: with type hints and a docstring in Google style.
        prog: how the command is called.
        examples: the end of the help page.
        fixed: parameters that the command sets itself: they get no flag.
        flags: required parameters that are to be flags, such as ``{"archives": "--from"}``.
    """
    hints, texts = _type_hints(function), help_texts(function)
    # Else jsonargparse imports all that the function's module imports for type checking alone, PyTorch included.
    function.__annotations__.update(hints)
    parser = Parser(prog=prog, description=_description(function), epilog="examples:\n" + examples)
    parameters = inspect.signature(function).parameters
    done: set[str | int] = set(fixed)
    for name in [name for name in parameters if parameters[name].default is inspect.Parameter.empty]:
        several = get_origin(hints[name]) in (list, Sequence)
        if name not in done and (several or name in flags):
            kind = get_args(hints[name])[0] if several else hints[name]
            options: dict[str, Any] = {"nargs": "+", "metavar": name[:-1].upper()} if several else {}
            options |= {"dest": name, "required": True} if name in flags else {}
            parser.add_argument(flags.get(name, name), type=kind, help=texts.get(name, ""), **options)
            done.add(name)
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=done | keywords)
    parser.add_function_arguments(function, as_group=False, skip=done | (parameters.keys() - keywords))
    for action in parser._actions:
        if hints.get(action.dest) in (bool, bool | None):  # --grid, --grid=true and --grid false
            action.nargs, action.const, action.metavar = "?", True, "true|false"
    return parser


def parse(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Return the typed values that the words of a command line give the parser's parameters, dataclasses included.

    Raises:
        CalmError: an unknown flag, a missing or a wrong value.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    values: dict[str, Any] = parser.instantiate(parser.parse_args(list(words))).as_dict()
    return values


def _refuse_unknown_flags(parser: ArgumentParser, words: Sequence[str]) -> None:
    known = parser._option_string_actions
    for word in words:
        flag = word.partition("=")[0].removesuffix("+")  # jsonargparse appends to a list with --flag+
        if flag == "--":
            return
        if flag.startswith("--") and (flag not in known or (flag == "--model" and "--backbone" in known)):
            raise CalmError(f"unknown flag {flag[:200]}{_hint(flag.removeprefix('--')[:100], parser)}")


MEANT = {
    "model": "backbone",
    "out": "run_dir",
    "output": "out",
    "run_dir": "out",
    "class": "target",
    "heatmap": "kind",
    "device": "hardware.accelerator",
    "gpus": "hardware.devices",
    "workers": "reading.workers",
    "size": "reading.image_size",
    "learning_rate": "lr",
}
"""Flags that people give, and what they mean by them where the command has no flag of that name."""

DEVICES = ("cpu", "gpu", "cuda", "mps")
"""Devices that people give as flags."""

ELSEWHERE = {
    **dict.fromkeys(("heatmap", "kind"), "calm attribute --model RUN IMAGE --kind KIND chooses what is drawn"),
    **dict.fromkeys(("class", "target", "versus"), "calm attribute --model RUN IMAGE --target CLASS explains a class"),
}
"""What to do about flags of another command."""


def _hint(name: str, parser: ArgumentParser) -> str:
    """Return the end of a message about an unknown flag: the one that was meant, the closest, or the help page."""
    known = [flag.removeprefix("--") for flag in parser._option_string_actions]
    inner = [flag for flag in known if flag.endswith(f".{name}")]  # --freeze for --model.freeze
    meant = [MEANT[name]] if MEANT.get(name) in known else inner
    if name in DEVICES:  # --cpu for --device cpu
        meant = [f"{flag} {name}" for flag in ("device", "hardware.accelerator") if flag in known]
    if not meant and name in ELSEWHERE:
        return f"; {ELSEWHERE[name]}"
    meant = meant or get_close_matches(name, known, n=1)
    return f"; did you mean --{meant[0]}?" if meant else f"; see {parser.prog} --help"


def _explained(
    parser: Parser, given: list[tuple[argparse.Action, list[str]]], error: argparse.ArgumentError
) -> CalmError:
    """Return the error to show for a command line that the parser refused."""
    help_page = f"see {parser.prog} --help"
    for action, words in given:
        for word in words:
            if (problem := _problem(action, word, help_page)) is not None:
                return problem
    if missing := parser.missing():
        return CalmError(f"missing: {', '.join(missing)}; {help_page}")
    return CalmError(f"{' '.join(str(error).split())[:500]}; {help_page}")


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def _problem(action: argparse.Action, value: str, help_page: str) -> CalmError | None:
    """Return why a flag or a positional argument does not take a value; None if it does."""
    choices = list(map(str, action.choices or ()))
    hint = getattr(action, "_typehint", action.type)
    if not choices and _fits(value, hint):
        return None
    members = [hint] if get_origin(hint) not in (Union, UnionType) else list(get_args(hint))
    choices += [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices:
        return None if value in choices else unknown("value", value, choices, where=_name(action))
    kinds = " or ".join(_described(member) for member in members if member is not NoneType)
    return CalmError(f"{_name(action)} is {value[:200]!r}: give {kinds}; {help_page}")


def _fits(value: str, hint: Any) -> bool:
    """Return whether jsonargparse takes a value for a type hint."""
    if hint is None:
        return True
    single = ArgumentParser(exit_on_error=False)
    single.add_argument("--value", type=hint)
    try:
        single.parse_args([f"--value={value}"])
    except argparse.ArgumentError:
        return False
    return True


_KINDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _described(hint: Any) -> str:
    """Describe a type hint in words: ``tuple[float, float]`` is "[a number, a number]"."""
    if get_origin(hint) in (list, tuple):
        return f"[{', '.join('...' if member is Ellipsis else _described(member) for member in get_args(hint))}]"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters' type hints. The result's is left out: it may be imported for type checking alone."""
    annotations = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return get_type_hints(SimpleNamespace(__annotations__=annotations), function.__globals__)


def _description(function: Callable[..., Any]) -> str:
    """Return the docstring's text before its sections, wrapped to the terminal."""
    text = inspect.getdoc(function) or ""
    text = plain_text(re.split(r"\n(?:Args|Returns|Raises|Source):", text)[0].strip())
    width = min(100, shutil.get_terminal_size().columns - 2)
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


def help_texts(documented: Any) -> dict[str, str]:
    """Return the descriptions of a function's parameters or of a dataclass's attributes, from its docstring."""
    from docstring_parser import parse as parse_docstring

    entries = parse_docstring(inspect.getdoc(documented) or "").params
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in entries}


def plain_text(text: str) -> str:
    """Remove reST markup: ``x``, :func:`x` and `x` become x."""
    return re.sub(r"(?::\w+:)?`{1,2}([^`]*)`{1,2}", r"\1", text)
