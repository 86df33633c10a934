"""How long the study will take, as `make plan` prints: `python -m fmfa.study.plan scale=standard chosen="fmfa alpha"`.

A run's time is taken from finished runs of its kind (the same losses) on the same sort of device; where there is none,
from the measured costs in study.yml.
"""

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import psutil

from fmfa.errors import ConfigError, FmfaError
from fmfa.files import PROJECT
from fmfa.models.objectives import objectives
from fmfa.notebook import Parameter, notebook_parameters, resolve_parameters
from fmfa.records import read_record
from fmfa.simpedes.generate import SCALES
from fmfa.study.definition import RUNS, SIMPEDES, Run, Study, is_finished, parse_arguments, read_study, spoken
from fmfa.training.config import TrainConfig

PAIRS = 5600  # training pairs that the costs in study.yml are for
_CAPTIONS = 8  # of a SimPEDES identity: 4 pictures, 2 captions each


def estimate(study: Study, costs: Mapping[str, float], device: str) -> pd.DataFrame:
    """What is left to do, one line a row of the study.

    Args:
        study: the runs; finished steps are left out.
        costs: seconds by part, as in study.yml: of an epoch over 5,600 pairs, of an evaluation, and of a notebook.
        device: "cpu" or "cuda"; only records of this sort of device count as measurements.

    Returns:
        Columns row, runs (all), left (to train), seconds a run (training and evaluation; NaN where nothing tells),
        seconds (of all that is left), and from ("finished runs" or "study.yml").

    Raises:
        ConfigError: a row's parameters are not those of a training.
    """
    measured = _measured(Path(RUNS), device)
    rows: dict[str, dict[str, Any]] = {}
    for run in study.runs:
        row = rows.setdefault(run.row, {"row": run.row, "runs": 0, "left": 0, "seconds": 0.0})
        training, source = _training(run, costs, measured, device)
        evaluation = _evaluation(run, costs)
        row |= {"runs": row["runs"] + 1, "seconds a run": training + evaluation, "from": source}
        if not is_finished(f"{run.folder}/train"):
            row["left"] += 1
            row["seconds"] += training
        if not is_finished(f"{run.folder}/evaluate"):
            row["seconds"] += evaluation
    table = pd.DataFrame(rows.values())
    return table[["row", "runs", "left", "seconds a run", "seconds", "from"]]


def step_seconds(study: Study, costs: Mapping[str, float], device: str) -> dict[str, float]:
    """Expected seconds of every step of the study, finished or not; NaN where nothing tells.

    A step is the path of an executed notebook without its ending, such as `runs/quick/irra-0/train`. Arguments and
    errors are those of `estimate`; `costs` has `data`, `comparison` and `pictures` too.
    """
    measured = _measured(Path(RUNS), device)
    steps = {}
    for run in study.runs:
        steps[f"{run.folder}/train"] = _training(run, costs, measured, device)[0]
        steps[f"{run.folder}/evaluate"] = _evaluation(run, costs)
    return steps | _other_steps(study, costs)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 printed, 2 no such study."""
    parser = argparse.ArgumentParser(
        prog="python -m fmfa.study.plan", description="Print what the study has left to do."
    )
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help="scale=..., chosen=..., seeds=...")
    options = parser.parse_args(arguments)
    try:
        study = read_study(parse_arguments(options.words))
        device, cores = compute_device(), psutil.cpu_count()
        table = estimate(study, study.seconds, device)
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    others = {step: cost for step, cost in _other_steps(study, study.seconds).items() if not is_finished(step)}
    evaluations = [f"{run.folder}/evaluate" for run in study.runs]
    left = [*others, *(step for step in evaluations if not is_finished(step))]
    kinds = Counter(step.split("/")[-1].split("-")[0] for step in left)
    shown = table.assign(minutes=(table["seconds a run"] / 60).round(1)).drop(columns=["seconds a run", "seconds"])
    print(shown.rename(columns={"minutes": "minutes a run"}).to_string(index=False))
    seconds = table["seconds"].sum() + pd.Series(others).sum()
    jobs = max(1, min(cores, int(table["left"].sum()) + len(left)))
    print(f"{len(study.runs)} runs, {table['left'].sum()} to train; {spoken(seconds)} on one core, "
          f"about {spoken(seconds / jobs)} on {cores} ({device})")  # fmt: skip
    print("Beside the trainings: " + (", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing left"))
    if unknown := int(table["seconds"].isna().sum()):
        print(f"Without {unknown} rows that nothing was measured for yet; the first finished run of each will tell.")
    return 0


def training_config(run: Run) -> TrainConfig:
    """The complete parameters of a run's training; ConfigError names the row that has others."""
    try:
        values = resolve_parameters(_declared(), run.parameters)
        known = {name: value for name, value in values.items() if name in TrainConfig.__dataclass_fields__}
        return TrainConfig(**known).resolved()
    except FmfaError as error:
        raise ConfigError(f"row {run.row} of study.yml: {error}") from error


def compute_device() -> str:
    """Where the study's trainings run: "cuda" or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def _declared() -> dict[str, Parameter]:
    return notebook_parameters(PROJECT / "notebooks" / "03_train.ipynb")


def _training(
    run: Run, costs: Mapping[str, float], measured: Mapping[tuple, list[float]], device: str
) -> tuple[float, str]:
    config = training_config(run)
    rate, source = _rate(config, costs, measured, device)
    return costs["notebook"] + config.epochs * _pairs(config) * rate, source


def _evaluation(run: Run, costs: Mapping[str, float]) -> float:
    return costs["notebook"] + costs["evaluate"] * _test_captions(run) / 1600


def _other_steps(study: Study, costs: Mapping[str, float]) -> dict[str, float]:
    """Expected seconds of the steps beside trainings and their evaluations."""
    steps = dict.fromkeys(study.data, costs["data"])
    steps |= {f"{run.folder}/evaluate": _evaluation(run, costs) for run in study.cross}
    return steps | {f"{folder}/{name}": costs[name] for folder in study.results for name in ("comparison", "pictures")}


def _kind(config: TrainConfig) -> tuple:
    """What decides a step's cost: the backbone's data, the method and the parts that cost something."""
    embedded = config.dataset.startswith(SIMPEDES)
    if config.method == "ivt":
        return embedded, "ivt", config.text_levels != "off"
    chosen = objectives(config.method, config.preset, config.dataset, **config.objective_overrides())
    return embedded, "two-stream", chosen.irr > 0, chosen.efa > 0


def _measured(runs: Path, device: str) -> dict[tuple, list[float]]:
    """Seconds a training pair of uninterrupted finished runs, by kind."""
    found: dict[tuple, list[float]] = {}
    for path in runs.rglob("run.json"):
        record = read_record(path.parent)
        if record.get("status") != "finished" or record.get("resumed") or path.parent.is_symlink():
            continue
        try:
            config = TrainConfig(**record["config"])
            seconds = (pd.Timestamp(record["finished"]) - pd.Timestamp(record["started"])).total_seconds()
            if record["device"].startswith(device):
                found.setdefault(_kind(config), []).append(seconds / (record["steps"] * config.batch_size))
        except (KeyError, TypeError, FmfaError, ZeroDivisionError):
            continue  # a record of another version of the package measures nothing here
    return found


def _rate(
    config: TrainConfig, costs: Mapping[str, float], measured: Mapping[tuple, list[float]], device: str
) -> tuple[float, str]:
    """Seconds a training pair, and where that comes from."""
    kind = _kind(config)
    if kind in measured:
        return median(measured[kind]), "finished runs"
    if not kind[0] or device != "cpu":
        return float("nan"), ""
    if kind[1] == "ivt":
        return costs["mla" if kind[2] else "ivt"] / PAIRS, "study.yml"
    return (costs["two-stream"] + costs["irr"] * kind[2] + costs["efa"] * kind[3]) / PAIRS, "study.yml"


def _pairs(config: TrainConfig) -> float:
    return SCALES[config.scale][0] * _CAPTIONS if config.dataset.startswith(SIMPEDES) else float("nan")


def _test_captions(run: Run) -> float:
    if not run.tested["dataset"].startswith(SIMPEDES):
        return float("nan")
    scale = run.tested.get("scale", TrainConfig.scale)
    if scale not in SCALES:
        raise ConfigError(f"study.yml: {run.folder} is tested at scale {scale!r}; expected one of {', '.join(SCALES)}")
    return SCALES[scale][2] * _CAPTIONS


if __name__ == "__main__":
    sys.exit(main())
