"""Run the study, report what is finished, or say what is left to do: `python -m fmfa.workflow study scale=quick`.

Snakemake runs the steps (`Snakefile`); what it and the notebooks print goes to `runs/SCALE/study.log`. Here one line is
printed for everything that a step does, read from the records that the steps leave.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd
import psutil

from fmfa.errors import ConfigError, FmfaError
from fmfa.files import PROJECT, held_folder, said_plainly, write_json
from fmfa.notebook import Parameters, notebook_parameters, resolve_parameters
from fmfa.processes import end_with
from fmfa.records import read_metrics
from fmfa.report import write_report
from fmfa.simpedes.generate import SCALES
from fmfa.study.definition import Run, Study, parse_arguments, read_study, spoken, step_record
from fmfa.study.levels import seeds_table
from fmfa.study.results import read_results
from fmfa.training.config import TrainConfig

ASKED = "asked.json"  # the words of the command line
INTERRUPTED = 130  # a shell's exit status for Ctrl-C
PATIENCE = 30  # seconds that interrupted steps get to write their records
_LAST = ("comparison", "pictures")
_SILENCE = 60, 300  # seconds without a line until one says what is running: of a short study and of a long one


class Watch:
    """The steps of a study: how long they take and, while they run, a line for every change.

    A step is the path of an executed notebook without its ending, such as `runs/quick/irra-0/train`. Its kind is the
    method of a training, or the notebook's name. It takes what steps of its kind took in this study or, before one is
    finished, what study.yml says; a training that many times its epochs.
    """

    def __init__(self, study: Study, slots: int) -> None:
        """Note what is finished.

        Args:
            study: the runs.
            slots: steps that run side by side.

        Raises:
            ConfigError: a row's parameters are not those of a training.
        """
        trainings = {f"{run.folder}/train": run for run in study.runs}
        evaluations = {f"{run.folder}/evaluate": run for run in (*study.runs, *study.cross)}
        self.folder, self.slots = study.folder, slots
        self.kinds = {step: run.parameters["method"] for step, run in trainings.items()}
        self.kinds |= dict.fromkeys(study.data, "data") | dict.fromkeys(evaluations, "evaluate")
        self.kinds |= {f"{folder}/{name}": name for folder in study.results for name in _LAST}
        self.count = {step: training_epochs(run) for step, run in trainings.items()}
        self.guesses = {step: study.seconds[kind] for step, kind in self.kinds.items()}
        self.guesses |= {step: self.guesses[step] * _size(run.data, 0) for step, run in trainings.items()}
        self.guesses |= {step: self.guesses[step] * _size(run.tested, 2) for step, run in evaluations.items()}
        if study.settings["gpu"]:
            self.guesses |= dict.fromkeys(trainings, float("nan"))
        self.records = {step: step_record(step) for step in self.kinds}
        self.epochs = {step: _epochs(step) for step in self.count}
        self.ahead = {step for step, record in self.records.items() if record.get("status") != "finished"}
        self.running: dict[str, float] = {}  # when the steps of this session, or their present epochs, began
        self.failed: list[str] = []
        self.begun = self.spoken = time.monotonic()

    def look(self) -> None:
        """Print what changed since the last look; after a while without a change, what is running."""
        for step, before in self.records.items():
            record = self.records[step] = step_record(step)
            if record.get("started") != before.get("started"):
                self.running[step] = time.monotonic()
                self._say(step, f"started after epoch {len(self.epochs[step])}" if self.epochs.get(step) else "started")
            if step in self.running and step in self.count:
                self._look_at_epochs(step)
            if step in self.running and record.get("status") in ("finished", "failed", "interrupted"):
                self._end(step, record)
        now, (short, long) = time.monotonic(), _SILENCE
        if self.running and now - self.spoken > min(max(short, (now - self.begun) / 30), long):
            self._say("running", ", ".join(f"{self._name(s)} ({spoken(now - t)})" for s, t in self.running.items()))

    def only_the_report_is_left(self) -> None:
        """Wait for nothing else any more: a training that is not finished has failed."""
        self.ahead = {step for step, kind in self.kinds.items() if kind in _LAST}
        self.running.clear()

    def seconds(self, step: str) -> float:
        """What a step takes from its beginning to its end; NaN if unknown."""
        return self._unit(step) * self.count.get(step, 1)

    def left(self) -> float:
        """Seconds until the last step is done; NaN while nothing tells how long a training takes."""
        left = [self._left(step) for step in self.ahead]
        return max(sum(left) / min(self.slots, len(left)), *left) if left else float("nan")

    def _unit(self, step: str) -> float:
        """Seconds of a step, or of an epoch of a training."""
        if step in self.count:
            took = {other: mean(e["train/seconds"] for e in epochs) for other, epochs in self.epochs.items() if epochs}
        else:
            finished = {other: record for other, record in self.records.items() if record.get("status") == "finished"}
            took = {other: _seconds(record) for other, record in finished.items()}
        same = [seconds for other, seconds in took.items() if self.kinds[other] == self.kinds[step]]
        return median(same) if same else self.guesses[step]

    def _left(self, step: str) -> float:
        since = time.monotonic() - self.running[step] if step in self.running else 0.0
        unit = self._unit(step)
        epochs = self.count.get(step, 1) - len(self.epochs.get(step, ()))
        return max(unit * epochs - since, unit * epochs / 10)

    def _look_at_epochs(self, step: str) -> None:
        before, epochs = len(self.epochs[step]), _epochs(step)
        self.epochs[step] = epochs
        if len(epochs) <= before:
            return
        self.running[step] = time.monotonic()
        told = f"epoch {len(epochs)} of {self.count[step]}, loss {epochs[-1].get('train/loss/total', float('nan')):.3f}"
        if "val/R@1" in epochs[-1]:
            told += f", R@1 on validation {100 * epochs[-1]['val/R@1']:.1f} %"
        if len(epochs) < self.count[step]:
            told += f", {spoken(self._left(step))} left"
        self._say(step, told)

    def _end(self, step: str, record: Mapping[str, Any]) -> None:
        del self.running[step]
        self.ahead.discard(step)
        if record["status"] == "finished":
            self._say(step, f"finished in {spoken(_seconds(record))}")
            return
        self.failed.append(step)
        self.ahead.discard(f"{Path(step).parent}/evaluate")
        reason = " ".join(str(record.get("error")).split())[:300]
        self._say(step, f"{record['status'].upper()}, {reason} (see {step}.html)")

    def _name(self, step: str) -> str:
        return step.removeprefix(f"{self.folder}/")

    def _say(self, step: str, line: str) -> None:
        left = self.left()
        ending = f"; about {spoken(left)} to go" if left == left else ""
        print(f"{datetime.now():%H:%M}  {self._name(step)}: {line}{ending}", flush=True)
        self.spoken = time.monotonic()


def training_epochs(run: Run) -> int:
    """How many epochs a run trains; ConfigError names the row whose parameters are not those of a training."""
    try:
        values = resolve_parameters(_declared(), run.parameters)
        del values["run"]
        return TrainConfig(**values).resolved().epochs
    except FmfaError as error:
        raise ConfigError(f"row {run.row} of study.yml: {error}") from error


def print_plan(study: Study) -> None:
    """Print the rows with what is left to train, the jobs that are left by kind, and about how long they take."""
    cores = psutil.cpu_count() or 1
    watch = Watch(study, cores)
    runs = pd.DataFrame({"row": [run.row for run in study.runs], "step": [f"{run.folder}/train" for run in study.runs]})
    runs = runs.assign(left=runs["step"].isin(watch.ahead), minutes=runs["step"].map(watch.seconds) / 60)
    rows = runs.groupby("row", sort=False)
    rows = rows.agg(runs=("row", "size"), left=("left", "sum"), **{"minutes per run": ("minutes", "first")})
    print(rows.round(1).rename_axis(None).to_string())
    kinds = Counter(watch.kinds[step] for step in watch.ahead)
    print(f"{len(runs)} runs, {rows['left'].sum()} to train; jobs left:", end=" ")
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none")
    seconds = [watch.seconds(step) for step in watch.ahead]
    total = sum(value for value in seconds if value == value)
    print(f"{spoken(total)} on one core, about {spoken(total / max(1, min(cores, len(seconds))))} on {cores}")
    if unknown := sum(value != value for value in seconds):
        print(f"Without {unknown} trainings of methods that have not trained an epoch here yet.")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 1 a step failed, 2 bad arguments, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.workflow", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("study", "report", "plan"), help="plan: say what is left and run nothing")
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help="scale=..., chosen=..., seeds=..., and so on")
    parser.add_argument("--gpus", type=int, default=1, help="trainings side by side at a scale that takes GPUs")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "MAKELEVEL" in os.environ:
        end_with(os.getppid())
    try:
        study = read_study(parse_arguments(options.words))
        if options.what == "plan":
            print_plan(study)
            return 0
        with said_plainly(f"{study.folder} cannot be made"):
            Path(study.folder).mkdir(parents=True, exist_ok=True)
        with held_folder(study.folder):
            return _run(options, study)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace, study: Study) -> int:
    if options.what == "report":
        study.only_finished()
    gpu, log = study.settings["gpu"], Path(study.folder) / "study.log"
    watch = Watch(study, max(1, options.gpus // gpu) if gpu else psutil.cpu_count() or 1)
    log.unlink(missing_ok=True)
    # On Snakemake's command line a value would be read as a number, YAML or a quoted text.
    write_json(log.with_name(ASKED), dict(word.split("=", 1) for word in options.words if not word.endswith("=")))
    done = options.what == "report" or _snakemake(options, log, watch, "--", "evaluations")
    watch.only_the_report_is_left()
    if not _snakemake(options, log, watch, "--config", "only_finished=true", "--forcerun", "report", "--", "all"):
        done = False
        if not watch.failed:
            print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]))
        write_report(study.folder, shown=[f"{row}-0" for row in study.settings["shown"]])
    if watch.failed:
        names = ", ".join(step.removeprefix(f"{study.folder}/") for step in watch.failed)
        print(f"failed: {names}; make study tries again")
    print(f"The log: {log.absolute()}")
    for folder, runs in study.results.items():
        print(f"\nR@1 on {runs[0].tested['dataset']} (percent, 95 % interval):")
        try:
            table = seeds_table(read_results(folder))
            print("none" if table.empty else table.set_index("row").rename_axis(None)[["seeds", "R@1"]].to_string())
        except ValueError as error:
            print(f"none ({error})")
    print(f"\nThe report: {(Path(study.folder) / 'report.html').absolute()}")
    return 0 if done else 1


def _snakemake(options: argparse.Namespace, log: Path, watch: Watch, *arguments: str) -> bool:
    """Run the workflow up to a target; returns whether every step succeeded."""
    command = [sys.executable, "-m", "fmfa.processes", str(os.getpid()), "snakemake", "--cores", "all"]
    command += ["--resources", f"gpu={options.gpus}", "--rerun-triggers", "mtime", "--rerun-incomplete", "--keep-going"]
    command += ["--nolock", "--configfile", str(log.with_name(ASKED)), *arguments]  # `main` holds the folder
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(1)
                watch.look()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(PATIENCE)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode == 0


def _epochs(step: str) -> list[dict[str, float]]:
    """The metrics of a training's complete epochs, by "SPLIT/NAME"; one that is still to be validated is left out."""
    try:
        table = read_metrics(Path(step).parent)
    except ValueError:  # damaged; the training says so when it starts
        return []
    epochs: dict[int, dict[str, float]] = {}
    for row in table[table["epoch"] > 0].itertuples():
        epochs.setdefault(row.epoch, {})[f"{row.split}/{row.metric}"] = row.value
    done = [values for values in epochs.values() if "train/seconds" in values]
    awaited = done and "val" in table["split"].to_numpy() and table["split"].iloc[-1] == "train"
    return done[:-1] if awaited else done


def _seconds(record: Mapping[str, Any]) -> float:
    begun, end = (datetime.fromisoformat(record[name]) for name in ("started", "finished"))
    return (end - begun).total_seconds()


def _size(data: Mapping[str, Any], column: int) -> float:
    """Identities to train on (column 0) or to test on (2), relative to the scale `small` of SimPEDES."""
    small = SCALES["small"]
    return SCALES.get(data.get("scale", "small"), small)[column] / small[column]


@functools.cache
def _declared() -> type[Parameters]:
    return notebook_parameters(PROJECT / "notebooks" / "03_train.ipynb")


if __name__ == "__main__":
    sys.exit(main())
