"""What is wrong with the words of a command line, as people say it: the flag, the value, what is allowed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from calm.errors import CalmError, unknown

__all__ = ["Parser", "complaint", "refuse_unknown_flags"]

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
