"""The ``calm`` command. Only the chosen command's module is imported, so that help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from calm.errors import CalmError, needs_extra, unknown
from calm.files import use_temporary_caches

if TYPE_CHECKING:
    from calm.cli.parsing import Parser

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """A row of the table of commands.

    Attributes:
        function: where the work is done, "module:function". Its parameters are the flags, unless
            ``own_parser``.
        line: what it does, in one line.
        examples: for the end of its help.
        finish: shows the function's result; its own result is the exit code.
        own_parser: the function takes the words of the command line itself.
        fixed: parameters that are no flags, and their values.
        words: help for parameters whose docstring says too little on its own.
        extras: of the package, which it needs.
        flags: flags of parameters that are not to be positional, or whose flag has another name.
    """

    function: str
    line: str
    examples: str = ""
    finish: Callable[[Any], int] = field(default=lambda result: 0)
    own_parser: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()

    def parser(self, name: str) -> Parser:
        """The parser of the command's words, under its name in the table; not for one with its own parser."""
        from calm.cli.parsing import build_parser

        options = {"fixed": self.fixed, "words": self.words, "flags": self.flags}
        return build_parser(self.load(), prog=f"calm {name}", examples=self.examples, **options)

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function


def _print(result: Any) -> int:
    print(result)
    return 0


def _print_report(report: Any) -> int:
    print(report)
    return 0 if report.ok else 1


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "calm.cli.demo:demo",
        "make birds, train CAM and CALM on them, and write a report to look at",
        "  calm demo\n  calm demo --out quick --species 6 --images_per_species 60 --epochs 6\n",
        extras=("train", "evaluate"),
    ),
    "train": Command(
        "calm.cli.train:main",
        "train CALM or CAM on a folder of images",
        own_parser=True,
        extras=("train",),
    ),
    "attribute": Command(
        "calm.cli.attribute:attribute_files",
        "show where a trained model sees its evidence in images",
        "  calm attribute --model runs/birds bird.jpg\n"
        "  calm attribute --model runs/birds photos/ --out maps --grid\n"
        "  calm attribute --model runs/birds bird.jpg --target 'Painted Bunting' --versus 'Indigo Bunting'\n"
        "  calm attribute --model runs/birds 'photos/*.jpg' --method integrated-gradients\n",
    ),
    "report": Command(
        "calm.cli.report:report",
        "show what calm evaluate measured on one page: tables, curves, images",
        "  calm report runs/birds\n  calm report evaluation --out benchmarks.html\n"
        "  calm report runs/calm-em runs/calm-ml runs/cam --gallery=false\n",
        finish=_print,
        extras=("evaluate",),
    ),
    "evaluate": Command(
        "calm.cli.evaluate:main",
        "benchmark models and their explanations: tables with intervals",
        own_parser=True,
        extras=("evaluate",),
    ),
    "convert": Command(
        "calm.cli.convert:convert",
        "turn a checkpoint of the released CALM code into a model of this package",
        "  calm convert last_checkpoint.pth.tar --method calm-em --large_feature_map --out cub-resnet50\n"
        "  calm convert vgg/ --method cam --large_feature_map=false --use_bn=false --out cub-vgg16\n",
        finish=_print,
    ),
    "data birds": Command(
        "calm_birds:write_birds",
        "draw a data set of birds whose species differ by known parts",
        "  calm data birds birds\n  calm data birds birds-large --species 24 --images_per_species 100 --size 128\n",
        finish=_print,
        extras=("evaluate",),
    ),
    "data prepare": Command(
        "calm.data.prepare:prepare",
        "unpack published archives (CUB, ILSVRC, OpenImages30k, Tiny ImageNet)",
        "  calm data prepare cub --from downloads --out .\n"
        "  calm data prepare tiny-imagenet --from tiny-imagenet-200.zip --out tiny --classes n01443537,n01629819\n"
        "  calm data prepare ilsvrc --from downloads metadata.zip --out .\n"
        "  calm data prepare openimages30k --from downloads --out . --metadata_url published\n",
        finish=_print,
        flags={"archives": "--from", "out": "--out"},
    ),
    "data check": Command(
        "calm.data.check:check",
        "look at every image and annotation of a data set, and say all that is wrong",
        "  calm data check birds\n  calm data check dataset/CUB --metadata_root metadata/CUB\n",
        finish=_print_report,
        fixed={"progress": True},
        words={
            "layout": "how the folder is laid out: cub (official CUB_200_2011), metadata (lists of the released code), "
            "folder (a folder per class), or auto to look",
            "metadata_root": "folder of the metadata lists, where they are not beside the images",
            "present_classes_only": "number only the classes that have images",
            "decode": "decode every image; false reads headers only, and is faster",
            "workers": "threads; by default two per processor",
        },
    ),
}

_USAGE = "usage: calm [--version] [--debug] COMMAND ...   (calm COMMAND --help says more)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: its words; None takes them from the process.

    Returns:
        The exit code: 0 done; 1 done, with a finding (`calm data check`); 2 a mistake of the user, told in
        one message on standard error; 130 interrupted. With ``--debug`` or CALM_DEBUG=1 errors show their
        traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("CALM_DEBUG", "") not in ("", "0")
    if words[:1] == ["--debug"]:
        debug, words = True, words[1:]
    try:
        try:
            code = _run(words)
        except SystemExit as stop:  # a parser after --help or --print_config
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        return code
    except (CalmError, OSError) as error:  # OSError: a full disk, a folder without permission
        if debug:
            raise
        print(f"calm: {_output_fails() or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("calm: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    """Find the command, read its flags, call its function."""
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"calm {version('calm')}")
        return 0
    name, rest = _split(words)
    if name == "data":
        print(_help("data"))
        return 0
    rest = [_underscored(word) for word in rest]
    command = COMMANDS[name]
    use_temporary_caches()
    with needs_extra(f"calm {name}", *command.extras):
        if command.own_parser:
            return command.finish(command.load()(rest))
        from calm.cli.parsing import parse

        values = parse(command.parser(name), rest)
        return command.finish(command.load()(**values, **command.fixed))


def _output_fails() -> str:
    """What is wrong with standard output, such as a full disk that it goes to; empty if nothing is."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # let Python not try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"cannot write to standard output: {error.strerror}"
    return ""


def _underscored(word: str) -> str:
    """``--batch-size=8`` as ``--batch_size=8``: both spellings are accepted."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else word


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and the other words; "data" alone asks for its help.

    Raises:
        CalmError: no such command.
    """
    if words[0] == "data":
        if words[1:] in ([], ["-h"], ["--help"]):
            return "data", []
        name, rest = " ".join(words[:2]), words[2:]
    else:
        name, rest = words[0], words[1:]
    if name not in COMMANDS:
        both = " ".join(words[:2])  # perhaps one of two words, whose first is mistyped
        raise unknown("command", both if get_close_matches(both, COMMANDS, cutoff=0.8) else name, COMMANDS)
    return name, rest


def _help(under: str = "") -> str:
    rows = [
        f"  calm {name:<12} {command.line}" for name, command in COMMANDS.items() if name.startswith(under)
    ]
    return "\n".join(
        [
            _USAGE,
            "",
            "Image classifiers that say where they saw the evidence.",
            "",
            "commands:",
            *rows,
        ]
    )
