"""``calm sweep``: search hyper-parameters on the validation split, through Optuna, and test the best trial once.

A trial is a run of `calm train`. All trials are in a journal in the sweep's folder, so that the same command continues
an interrupted sweep, and given again at the same time, here or on a machine that shares the folder, helps it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.cli import train as train_command
from calm.errors import CalmError
from calm.files import atomic_path, write_json

if TYPE_CHECKING:
    import optuna

    from calm.train.config import TrainConfig

EPILOG = """\
Flags after these are those of `calm train`. The search space is by default that of Choe et al. (CVPR 2020): the
learning rate, and what belongs to the methods of --wsol.

examples:
  calm sweep --trials 30 --out sweeps/has --preset small --data tiny-imagenet --method cam --wsol has
  calm sweep --trials 10 --out sweeps/lr --search lr=1e-4:0.1:log --search optim.name=sgd,adamw --data DIR
"""

SPACES = {
    "": {"lr": "1e-5:1:log"},
    "has": {"wsol.has_rate": "0:1"},
    "adl": {"wsol.adl_rate": "0:1", "wsol.adl_threshold": "0:1"},
    "acol": {"wsol.acol_threshold": "0.01:1"},
    "spg": {
        f"wsol.spg_{what}_{branch}": space
        for branch in ("b2", "b1", "c")
        for what, space in (("foreground", "0.5:1"), ("background", "0:0.5"))
    },
    "cutmix": {"augment.cutmix": "0.1:10:log", "augment.mix_probability": "0:1"},
}
"""The ranges that are searched by default, for every run ("") and for a method of `calm.config.WsolOptions`. Choe et
al. draw CutMix's alpha as 1 / u - 1/2 with u uniform in (0, 2]; ours is log-uniform around 1. They draw SPG's
thresholds as ordered pairs in [0, 1]; ours are on either side of 0.5."""

SIGNED_WITHIN = timedelta(minutes=1)
"""From drawing a trial until the journal says which process did: longer ago, that process was killed."""

MEASURES = ("maxboxacc_v2", "maxboxacc", "pxap", "accuracy")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the sweep's own flags."""
    parser = argparse.ArgumentParser(
        "calm sweep",
        usage="calm sweep --trials N --out DIR [--FLAG VALUE ...] [flags of calm train ...]",
        description="Search hyper-parameters on the validation split, and test the best trial once.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all, also those of earlier calls (30)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep: journal, runs, table and plot")
    space = "what is searched instead: NAME=LOW:HIGH, NAME=LOW:HIGH:log, or NAME=A,B,C; repeated for several"
    parser.add_argument("--search", action="append", default=[], metavar="SPACE", help=space)
    measure = f"what is maximised on the validation split: {', '.join(MEASURES)}; by default the first that it has"
    parser.add_argument("--measure", choices=MEASURES, metavar="NAME", help=measure)
    sampler = "how values are drawn: random, as published, or tpe, which learns from earlier trials"
    parser.add_argument("--sampler", choices=("random", "tpe"), default="random", help=sampler)
    prune = "stop a trial early whose validation accuracy is in the lowest quarter at its epoch, after five trials"
    parser.add_argument("--prune", choices=("true", "false"), default="true", help=prune)
    return parser


def main(words: Sequence[str]) -> Path:
    """Run `calm sweep`; returns the sweep's folder.

    Raises:
        CalmError: a wrong flag; a validation split without what is measured; another search in the folder.
    """
    parser = build_parser()
    try:
        flags, train_words = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise CalmError(str(error)) from error
    for flag in (word.partition("=")[0] for word in train_words if word.startswith("--")):
        close = get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.8)
        if close and flag not in train_command.build_parser()._option_string_actions:
            raise CalmError(f"unknown flag {flag}; did you mean {close[0]}?")
    if flags.out is None:
        raise CalmError("say with --out which folder the sweep keeps its journal and runs in")
    flags.trials = 30 if flags.trials is None else flags.trials
    if flags.trials < 1:
        raise CalmError(f"--trials is {flags.trials}: give 1 or more")
    for word in ("--run_dir", "--resume"):
        if any(given == word or given.startswith(f"{word}=") for given in train_words):
            raise CalmError(f"{word} is for calm train: a sweep trains in folders of its own, in --out")
    config = train_command.parse(train_words)
    train_command.check_code(config, train_words)
    space = dict(_read_space(text) for text in flags.search) if flags.search else default_space(config)
    return _Sweep(flags.out, config, train_words, space, flags.measure, flags.sampler, flags.prune == "true").run(
        flags.trials
    )


def default_space(config: TrainConfig) -> dict[str, str]:
    """Return the ranges that are searched for a configuration, by flag."""
    spaces = [SPACES[name] for name in ("", *config.wsol.methods)]
    return {flag: text for space in spaces for flag, text in space.items()}


def _read_space(text: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise CalmError(f"--search {text!r}: give NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C")
    suggestion(name, values)
    return name.removeprefix("--"), values


def suggestion(name: str, text: str) -> Callable[[optuna.Trial], Any]:
    """Return how a trial draws a value: from a range ``LOW:HIGH``, also ``:log``, or from words ``A,B,C``.

    A range of two whole numbers, such as ``1:8``, still gives fractions.

    Raises:
        CalmError: the text is neither, or the range is empty, or a logarithmic one reaches 0.
    """
    if ":" not in text:
        return lambda trial: trial.suggest_categorical(name, text.split(","))
    parts = text.split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
        if parts[2:] not in ([], ["log"]) or not low < high < math.inf or (parts[2:] and low <= 0):
            raise ValueError
    except ValueError:
        fix = "LOW:HIGH with LOW < HIGH, LOW:HIGH:log with LOW above 0, or A,B,C"
        raise CalmError(f"--search {name}={text}: give {fix}") from None
    return lambda trial: trial.suggest_float(name, low, high, log=bool(parts[2:]))


class _Sweep:
    """A study in a folder, and the process's part in it."""

    def __init__(
        self,
        out: Path,
        config: TrainConfig,
        words: Sequence[str],
        space: Mapping[str, str],
        measure: str | None,
        sampler: str,
        prune: bool,
    ) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        from calm.train.folder import config_dict

        self.out, self.config, self.words, self.space = out, config, list(words), dict(space)
        for name, text in space.items():  # a wrong name is found now
            first = text.split(":")[0].split(",")[0]
            train_command.parse([*words, f"--{name}={first}"])
        self.measure, self.sampler, self.prune = measure or self._default_measure(), sampler, prune
        self.needs = "classification" if self.measure == "accuracy" else "localization"
        if self.needs == "localization":
            self._check_truth()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        out.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in config_dict(config).items() if name != "run_dir"}
        about = {"search": self.space, "measure": self.measure, "train": json.loads(json.dumps(settings, default=str))}
        known = out / "sweep.json"
        if known.is_file():
            if (before := json.loads(known.read_text(encoding="utf-8"))) != about:
                which = ", ".join(name for name in about if before.get(name) != about[name])
                raise CalmError(f"{out} holds another sweep ({which} differs): choose another --out")
        else:
            write_json(known, about)
        self.study = optuna.create_study(
            # Optuna gives up the lock of a killed process after 30 s, but by a relative path never.
            storage=JournalStorage(JournalFileBackend(str(out.absolute() / "journal.log"))),
            study_name="sweep",
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.PercentilePruner(25.0, n_startup_trials=5, n_warmup_steps=config.epochs // 4),
        )

    def _split(self, name: str) -> Any:
        from calm.data.loading import load_split

        names = ("layout", "metadata_root", "val_fraction", "present_classes_only")
        reading: dict[str, Any] = {key: getattr(self.config.reading, key) for key in names}
        return load_split(self.config.data, name, **reading)  # type: ignore[arg-type]

    def _default_measure(self) -> str:
        from calm.evaluate.localization import truth_kinds

        try:
            kinds, _ = truth_kinds(self._split("val"))
        except CalmError:
            return "accuracy"
        return "maxboxacc_v2" if "boxes" in kinds else "pxap"

    def _check_truth(self) -> None:
        from calm.evaluate.localization import truth_kinds

        needed = "masks" if self.measure == "pxap" else "boxes"
        if needed not in truth_kinds(self._split("val"))[0]:
            raise CalmError(f"--measure {self.measure} needs {needed} of the validation images, which have none")

    def run(self, trials: int) -> Path:
        """Run trials until there are ``trials`` of all processes; the last process tests the best one."""
        import optuna
        from optuna.trial import TrialState

        while self._begun() < trials:
            trial = self.study.ask()
            trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
            seed = int.from_bytes(hashlib.blake2b(f"{self.config.seed} {trial.number}".encode()).digest()[:4])
            kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
            self.study.sampler = kinds[self.sampler](seed=seed)  # by the trial's number, in whatever process it is
            try:
                value = self._trial(trial)
            except optuna.TrialPruned as pruned:
                trial.set_user_attr("stopped", str(pruned)[:300])
                self.study.tell(trial, state=TrialState.PRUNED)
            except BaseException:
                self.study.tell(trial, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params)
                raise
            else:
                self.study.tell(trial, value)
            self._show(trial.number, trials)
        if running := self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            at = {"process {1} on {0}".format(*trial.user_attrs.get("process", ("?", "?"))) for trial in running}
            who = ", ".join(sorted(at))
            print(f"other processes are still at work on {self.out} ({who}): the last one tests the best trial")
            return self.out
        return self._finish()

    def _count(self, *states: Any) -> int:
        return len(self.study.get_trials(deepcopy=False, states=states))

    def _begun(self) -> int:
        """Return how many trials are done or at work.

        What processes of this machine that no longer run had begun is to be tried again; the runs go on where they
        stopped.
        """
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            host, process = trial.user_attrs.get("process", [None, 0])
            # One without a process was killed while it drew the trial, or is drawing it.
            age = datetime.now() - (trial.datetime_start or datetime.now())
            unsigned = host is None and age > SIGNED_WITHIN
            if unsigned or (host == socket.gethostname() and not _runs(process)):
                with suppress(ValueError, RuntimeError):  # another process was quicker
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    if values := trial.params or trial.system_attrs.get("fixed_params"):
                        self.study.enqueue_trial(values)
        return self._count(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)

    def _trial(self, trial: optuna.Trial) -> float:
        """Train with the values that a trial draws, and measure it on the validation split."""
        import optuna
        from optuna.trial import TrialState

        from calm.train.run import train

        values = {name: suggestion(name, text)(trial) for name, text in self.space.items()}
        flags = [f"--{name}={value}" for name, value in values.items()]
        name = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
        trial.set_user_attr("run", name)
        others = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if any(other.number != trial.number and other.user_attrs.get("run") == name for other in others):
            name += f"-{trial.number + 1}"  # another process trains with the same values now
            trial.set_user_attr("run", name)
        run_dir = self.out / "runs" / name
        config = replace(train_command.parse([*self.words, *flags]), run_dir=run_dir)
        train_command.check_code(config, [*self.words, *flags])
        try:
            train(config, loggers=[_pruning_logger(trial)] if self.prune else [], quiet=True)
        except optuna.TrialPruned:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        except CalmError as error:
            if "training stopped" not in str(error):
                raise
            raise optuna.TrialPruned(str(error)) from error  # these values diverge: a result, too
        found = self._figures(run_dir, "val")
        trial.set_user_attr("figures", found)
        return found[self.measure]

    def _figures(self, run_dir: Path, split_name: str) -> dict[str, float]:
        """Return the figures of a run's best model on a split, by name: accuracy, and of localization if it can be."""
        from calm.evaluate.classification import classification
        from calm.evaluate.localization import localization
        from calm.evaluate.subject import model_subject
        from calm.inference import resolve_device
        from calm.model import load

        model = load(run_dir, map_location=resolve_device())
        split = self._split(split_name)
        subject = model_subject(model, predictor=model.optimized_for_inference())
        results = [classification(subject, split, replicates=0)]
        if self.needs == "localization":
            results.append(localization(subject, split, replicates=0))
        figures = {name: estimate.value for result in results for name, estimate in result.figures.items()}
        return {"accuracy": figures.pop("top1"), **figures}

    def _show(self, number: int, trials: int) -> None:
        trial = self.study.trials[number]
        values = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
        result = (
            f"{self.measure} {100 * (trial.value or 0.0):.1f}" if trial.state.name == "COMPLETE" else "stopped early"
        )
        done = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in self.study.trials)
        print(f"trial {number + 1} ({done} of {trials}): {result}  ({values})", flush=True)

    def _finish(self) -> Path:
        """Test the best trial, once, and write the table and the plot."""
        done = [trial for trial in self.study.trials if trial.state.is_finished() and trial.state.name != "FAIL"]
        complete = sorted((t for t in done if t.state.name == "COMPLETE"), key=lambda trial: -(trial.value or 0.0))
        if not complete:
            raise CalmError(f"no trial of {self.out} was finished: narrow --search, or give --prune false")
        best, tested = complete[0], self.out / "test.json"
        stopped = [trial for trial in done if trial.state.name == "PRUNED"]
        with atomic_path(self.out / "trials.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            names = list(best.user_attrs["figures"])
            rows = csv.writer(file)
            rows.writerow(["trial", "state", *self.space, *names, "run"])
            for trial in (*complete, *stopped):
                figures = [trial.user_attrs.get("figures", {}).get(name, "") for name in names]
                values = [trial.params.get(name, "") for name in self.space]
                rows.writerow([trial.number + 1, trial.state.name.lower(), *values, *figures, trial.user_attrs["run"]])
        self._plot(complete)
        run = self.out / "runs" / best.user_attrs["run"]
        before = json.loads(tested.read_text(encoding="utf-8")) if tested.is_file() else {}
        if before.get("trial") != best.number + 1:
            write_json(tested, {"trial": best.number + 1, "run": str(run), "test": self._figures(run, "test")})
            before = json.loads(tested.read_text(encoding="utf-8"))
        test = ", ".join(f"{name} {100 * value:.1f}" for name, value in before["test"].items() if name in MEASURES)
        chosen = ", ".join(f"{name} {_short(value)}" for name, value in best.params.items())
        print(
            f"best of {len(complete)} trials, {len(stopped)} stopped early: {chosen}\n  validation {self.measure} "
            f"{100 * (best.value or 0.0):.1f}; test {test}\n  {run}; {self.out / 'trials.csv'}, trials.png"
        )
        return self.out

    def _plot(self, trials: Sequence[Any]) -> None:
        """Draw the measure over each value that was searched, the best trial in another colour."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter

        figure = Figure(figsize=(3.2 * len(self.space), 3), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(self.space), squeeze=False)[0], self.space, strict=True):
            for rank, trial in reversed(list(enumerate(trials))):
                colour = "#c0392b" if rank == 0 else "#4a6fa5"
                axes.scatter([trial.params[name]], [100 * trial.value], color=colour, s=28)
            if self.space[name].endswith(":log"):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(name)
            axes.set_ylabel(f"validation {self.measure}, %")
        with atomic_path(self.out / "trials.png") as path:
            figure.savefig(path, dpi=120, format="png")


def _runs(process: int) -> bool:
    """Return whether this machine has another process of that number."""
    if process == os.getpid():  # an earlier one had it: in a container they repeat
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _pruning_logger(trial: optuna.Trial) -> Any:
    """Return a logger of Lightning that reports a run's validation accuracy to Optuna, and stops hopeless ones."""
    import optuna
    from lightning.fabric.loggers.logger import Logger

    class PruningLogger(Logger):
        name, version = "sweep", trial.number

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if (accuracy := metrics.get("epoch/val_accuracy")) is None:
                return
            epoch = len(trial.storage.get_trial(trial._trial_id).intermediate_values) + 1
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned(f"validation accuracy {100 * accuracy:.1f} % after epoch {epoch}")

        def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
            """Nothing: the trial has them."""

    return PruningLogger()
