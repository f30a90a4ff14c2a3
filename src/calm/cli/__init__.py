"""The ``calm`` command: the table of commands, and what is the same for all of them: errors, exit codes, help.

Only the chosen command's module is imported, and PyTorch not before the command runs, so that help pages are quick.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from calm.errors import CalmError, needs_extra, unknown
from calm.files import use_temporary_caches

if TYPE_CHECKING:
    from calm.cli.parsing import Parser


@dataclass(frozen=True)
class Command:
    """A command."""

    function: str  # what it runs, "module:function": its parameters are the flags, unless ``own_parser``
    line: str  # what it does, in one line
    examples: str = ""  # the end of its help page
    prints: bool = False  # it shows the function's result, whose ``ok``, if it has one, decides the exit code
    own_parser: bool = False  # the function takes the words of the command line itself
    fixed: Mapping[str, Any] = field(default_factory=dict)  # values of parameters that get no flag
    flags: Mapping[str, str] = field(default_factory=dict)  # required parameters that are flags and not positional
    extras: tuple[str, ...] = ()  # extras of the package that it needs

    def parser(self, name: str) -> Parser:
        """Make the parser of a command without its own; ``name`` is its name in the table."""
        from calm.cli.parsing import build_parser

        return build_parser(self.load(), f"calm {name}", self.examples, self.fixed, self.flags)

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "calm.cli.demo:demo",
        "make birds, train CAM and CALM on them, and write a report to look at",
        "  calm demo\n  calm demo --out quick --species 6 --images_per_species 60 --epochs 6\n",
        extras=("train", "evaluate", "baselines"),
    ),
    "train": Command(
        "calm.cli.train:main", "train CALM or CAM on a folder of images", own_parser=True, extras=("train",)
    ),
    "sweep": Command(
        "calm.cli.sweep:main",
        "search hyper-parameters on the validation split, and test once",
        own_parser=True,
        extras=("train", "evaluate", "sweep"),
    ),
    "attribute": Command(
        "calm.cli.attribute:attribute_files",
        "show where a trained model sees its evidence in images",
        "  calm attribute --model runs/birds bird.jpg\n"
        "  calm attribute --model runs/birds photos/ --out maps --grid\n"
        "  calm attribute --model runs/birds photos/ --out maps --html          # and a page to look through\n"
        "  calm attribute --model runs/birds bird.jpg --target 'Painted Bunting' --versus 'Indigo Bunting'\n"
        "  calm attribute --model runs/birds bird.jpg --kind evidence --versus 'Indigo Bunting'\n"
        "  calm attribute --model runs/birds 'photos/*.jpg' --method integrated-gradients\n",
    ),
    "app": Command(
        "calm.app:serve",
        "explore in a browser what a model sees in pictures",
        "  calm app --model runs/birds --data birds\n"
        "  calm app --model runs/calm --beside runs/cam --data photos --open_browser\n",
        flags={"model": "--model"},
        extras=("app",),
    ),
    "report": Command(
        "calm.report:write_report",
        "show what calm evaluate measured on one page: tables, curves, images",
        "  calm report runs/birds\n  calm report evaluation --out benchmarks.html\n"
        "  calm report runs/calm-em runs/calm-ml runs/cam --gallery=false\n",
        prints=True,
        extras=("evaluate",),
    ),
    "evaluate": Command(
        "calm.cli.evaluate:main",
        "benchmark models and their explanations: tables with intervals",
        own_parser=True,
        extras=("evaluate",),
    ),
    "convert": Command(
        "calm.cli.export:convert",
        "turn a checkpoint of the released CALM code into a model of this package",
        "  calm convert last_checkpoint.pth.tar --method calm-em --large_feature_map --out cub-resnet50\n"
        "  calm convert vgg/ --method cam --large_feature_map=false --use_bn=false --out cub-vgg16\n",
        prints=True,
    ),
    "export": Command(
        "calm.cli.export:export_model",
        "write a model as one file for onnxruntime, torch.export or ExecuTorch",
        "  calm export --model runs/birds --out birds.onnx\n"
        "  calm export --model runs/birds --out birds.onnx --preprocess --kind evidence\n"
        "  calm export --model runs/birds --out birds.pt2 --to torch-export\n",
        prints=True,
        flags={"model": "--model", "out": "--out"},
    ),
    "push": Command(
        "calm.cli.export:push",
        "upload a model to the Hugging Face Hub, with a page about it",
        "  calm push me/birds --model runs/birds --example bird.jpg --private true\n",
        prints=True,
    ),
    "data birds": Command(
        "calm_birds:write_birds",
        "draw a data set of birds whose species differ by known parts",
        "  calm data birds birds\n  calm data birds birds-large --species 24 --images_per_species 100 --size 128\n",
        prints=True,
        extras=("evaluate",),
    ),
    "data prepare": Command(
        "calm.data.prepare:prepare",
        "unpack published archives (CUB, ILSVRC, OpenImages30k, Tiny ImageNet)",
        "  calm data prepare cub --from downloads --out .\n"
        "  calm data prepare tiny-imagenet --from tiny-imagenet-200.zip --out tiny --classes n01443537,n01629819\n"
        "  calm data prepare ilsvrc --from downloads metadata.zip --out .\n"
        "  calm data prepare openimages30k --from downloads --out . --metadata_url published\n",
        prints=True,
        flags={"archives": "--from", "out": "--out"},
    ),
    "data check": Command(
        "calm.data.check:check",
        "look at every image and annotation of a data set, and say all that is wrong",
        "  calm data check birds\n  calm data check dataset/CUB --metadata_root metadata/CUB\n",
        prints=True,
        fixed={"progress": True},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: its words; None takes those of the process.

    Returns:
        The exit code: 0 for success; 1 for success with a finding (`calm data check`); 2 for a mistake of the user,
        which one message on standard error explains; 130 after an interrupt. With ``--debug`` or CALM_DEBUG=1 errors
        show their traceback. ``--trust CODE``, before or after the command, lets a model's backbone be imported: see
        `calm.config.check_trusted`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("CALM_DEBUG", "") not in ("", "0") or "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug:  # one line without the place in the code
        warnings.formatwarning = lambda message, *place: f"calm: warning: {message}\n"
    try:
        try:
            code = run(_trusting(words))
        except SystemExit as stop:  # a parser after --help or --print_config
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        return code
    except (CalmError, OSError) as error:  # OSError: a full disk, a folder without permission
        if debug:
            raise
        print(f"calm: {_output_problem() or _sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("calm: interrupted", file=sys.stderr)
        return 130


def _trusting(words: list[str]) -> list[str]:
    """Trust the code that ``--trust CODE`` names, and return the other words."""
    from calm.config import parse_code, trust

    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, code = word.partition("=")
        if flag != "--trust":
            rest.append(word)
            continue
        code = code if equals else next(remaining, "")
        if parse_code(code) is None:
            given = f"got {code!r}" if code else "got nothing"
            raise CalmError(
                "--trust takes code in quotes, as the model names it, before or after the command: "
                f"calm --trust 'nets:small(width=32)' COMMAND ...; {given}"
            )
        trust(code)
    return rest


def run(words: list[str]) -> int:
    """Run a command line as `main` does, but without catching errors.

    Raises:
        CalmError: a mistake of the user.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    if not words or words[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version  # here, since its import is slow

        print(f"calm {version('calm')}")
        return 0
    if words[0] == "data" and words[1:] in ([], ["-h"], ["--help"]):
        print(_help("data"))
        return 0
    name, rest = _split(words)
    command = COMMANDS[name]
    use_temporary_caches()
    with needs_extra(f"calm {name}", *command.extras):
        if command.own_parser:
            result = command.load()(rest)
        else:
            from calm.cli.parsing import parse

            result = command.load()(**parse(command.parser(name), rest), **command.fixed)
        if command.prints:
            print(result)
    return 0 if getattr(result, "ok", True) else 1


def _split(words: list[str]) -> tuple[str, list[str]]:
    """Split the words into the name of a command, which has one word or two, and its own words."""
    count = 2 if words[0] == "data" else 1
    name, pair = " ".join(words[:count]), " ".join(words[:2])
    if name not in COMMANDS:  # perhaps one of two words whose first is mistyped
        raise unknown("command", pair if get_close_matches(pair, COMMANDS, cutoff=0.8) else name, COMMANDS)
    return name, [_underscored(word) for word in words[count:]]


def _underscored(word: str) -> str:
    """Return ``--batch-size=8`` as ``--batch_size=8``: both spellings are accepted."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if flag.startswith("--") else word


_REMEDIES = {
    errno.ENOENT: "check the name",
    errno.ENOSPC: "free some space, or name another disk",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be: name another place"),
}


def _sentence(error: CalmError | OSError) -> str:
    """Return the message of an error; one of the operating system is told with the file first, and a remedy."""
    if isinstance(error, CalmError) or error.filename is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0, "change its permissions, or name another place")
    return f"cannot use {os.fsdecode(error.filename)}: {error.strerror}; {remedy}"


def _output_problem() -> str:
    """Return what is wrong with standard output, such as a full disk that it is redirected to; empty if nothing is."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # keep Python from trying again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"cannot write to standard output: {error.strerror}"
    return ""


def _help(prefix: str = "") -> str:
    rows = "\n".join(f"  calm {name:<12} {row.line}" for name, row in COMMANDS.items() if name.startswith(prefix))
    return (
        "usage: calm [--version] [--debug] [--trust CODE] COMMAND ...   (calm COMMAND --help says more)\n\n"
        f"Image classifiers that say where they saw the evidence.\n\ncommands:\n{rows}"
    )
