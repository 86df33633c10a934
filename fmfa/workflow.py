"""Run the study: `python -m fmfa.workflow study scale=quick`, as `make study` does, or make the `report` alone.

Snakemake runs the steps (`Snakefile`); what it and the notebooks print goes to `runs/SCALE/study.log`. Here one line is
printed for everything that a step does, read from the records that the steps leave.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from fmfa.errors import ConfigError, FmfaError
from fmfa.files import held_folder, said_plainly, write_json
from fmfa.processes import end_with
from fmfa.study.definition import Study, parse_arguments, read_study, spoken, step_record

ASKED = "asked.json"  # the words of the command line
INTERRUPTED = 130  # a shell's exit status for Ctrl-C
PATIENCE = 30  # seconds that interrupted steps get to write their records
_LAST = ("/comparison", "/pictures")
_SILENCE = 60, 300  # seconds without a line until one says what is running: of a short study and of a long one


class Watch:
    """The steps of a study while it runs: a line for every change, with the time that is left."""

    def __init__(self, folder: str, expected: Mapping[str, float], count: Mapping[str, int], slots: int) -> None:
        """Note what is finished.

        Args:
            folder: of the study, left out of the names of its steps.
            expected: seconds of every step, NaN where nothing tells; see `fmfa.study.plan.step_seconds`.
            count: epochs of every training, by its step.
            slots: steps that run side by side.
        """
        self.folder, self.expected, self.count, self.slots = folder, dict(expected), count, slots
        self.records = {step: step_record(step) for step in expected}
        self.epochs = {step: _epochs(step) for step in count}
        self.ahead = {s for s, r in self.records.items() if s.endswith(_LAST) or r.get("status") != "finished"}
        self.running: dict[str, float] = {}  # when the steps of this session, or their present epochs, began
        self.failed: list[str] = []
        self.took, self.should_take = 120.0, 120.0  # seconds of finished steps; the first minutes temper their ratio
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
        self.ahead = {step for step in self.ahead if step.endswith(_LAST)}
        self.running.clear()

    def left(self) -> float:
        """Seconds until the last step is done; NaN while nothing tells how long a training takes."""
        left = {step: self._left(step) for step in self.ahead}
        known = [seconds for seconds in left.values() if seconds == seconds]
        if not known or any(left[step] != left[step] for step in self.ahead & self.count.keys()):
            return float("nan")
        return max(sum(known) / min(self.slots, len(known)), *known)

    def _left(self, step: str) -> float:
        since = time.monotonic() - self.running[step] if step in self.running else 0.0
        if done := self.epochs.get(step):
            return max((self.count[step] - len(done)) * _mean_seconds(done) - since, 0.0)
        whole = self.expected[step] * self.took / self.should_take
        return max(whole - since, whole / 10)

    def _look_at_epochs(self, step: str) -> None:
        before, found = len(self.epochs[step]), _epochs(step)
        self.epochs[step] = found
        if len(found) <= before:
            return
        self.running[step] = time.monotonic()
        for other, count in self.count.items():
            if self.expected[other] != self.expected[other]:
                self.expected[other] = count * _mean_seconds(found)
        told = f"epoch {len(found)} of {self.count[step]}, loss {found[-1].get('train/loss/total', float('nan')):.3f}"
        if "val/R@1" in found[-1]:
            told += f", R@1 on validation {100 * found[-1]['val/R@1']:.1f} %"
        if len(found) < self.count[step]:
            told += f", {spoken(self._left(step))} left"
        self._say(step, told)

    def _end(self, step: str, record: Mapping[str, Any]) -> None:
        del self.running[step]
        self.ahead.discard(step)
        if record["status"] == "finished":
            begun, end = (datetime.fromisoformat(record[name]) for name in ("started", "finished"))
            seconds = (end - begun).total_seconds()
            if self.expected[step] == self.expected[step]:
                self.took, self.should_take = self.took + seconds, self.should_take + self.expected[step]
            self._say(step, f"finished in {spoken(seconds)}")
            return
        self.failed.append(step)
        self.ahead.discard(f"{Path(step).parent}/evaluate")
        error = record.get("error") or {}
        reason = " ".join(f"{error.get('type')}: {error.get('message')}".split())[:300]
        self._say(step, f"{record['status'].upper()}, {reason} (see {step}.html)")

    def _name(self, step: str) -> str:
        return step.removeprefix(f"{self.folder}/")

    def _say(self, step: str, line: str) -> None:
        left = self.left()
        ending = f"; about {spoken(left)} to go" if left == left else ""
        print(f"{datetime.now():%H:%M}  {self._name(step)}: {line}{ending}", flush=True)
        self.spoken = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 1 a step failed, 2 bad arguments, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.workflow", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("study", "report"), help="all of it, or the report of what is finished")
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help="scale=..., chosen=..., seeds=..., and so on")
    parser.add_argument("--gpus", type=int, default=1, help="trainings side by side at a scale that takes GPUs")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "MAKELEVEL" in os.environ:
        end_with(os.getppid())
    try:
        study = read_study(parse_arguments(options.words))
        with said_plainly(f"{study.folder} cannot be made"):
            Path(study.folder).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(held_folder(study.folder))
            except ConfigError as error:
                raise ConfigError(f"another make study or make report is running: {error}") from None
            return _run(options, study)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace, study: Study) -> int:
    # These take seconds to import, and a mistake is told at once.
    from fmfa.report import write_report
    from fmfa.study.levels import seeds_table
    from fmfa.study.plan import compute_device, step_seconds, training_config

    if options.what == "report":
        study.only_finished()
    gpu, log = study.settings["gpu"], Path(study.folder) / "study.log"
    epochs = {f"{run.folder}/train": training_config(run).epochs for run in study.runs}
    slots = max(1, options.gpus // gpu) if gpu else psutil.cpu_count()
    watch = Watch(study.folder, step_seconds(study, study.seconds, compute_device()), epochs, slots)
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
            table = seeds_table(folder)
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
    from fmfa.records import read_metrics

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


def _mean_seconds(epochs: list[dict[str, float]]) -> float:
    return mean(values["train/seconds"] for values in epochs)


if __name__ == "__main__":
    sys.exit(main())
