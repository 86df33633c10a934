"""The study's definition (`study.yml`) as runs: which rows at a scale, which seeds, on which data, in which folder.

The workflow (`Snakefile`), the estimate (`fmfa.plan`) and the tests read the definition through `read_study`.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from fmfa.errors import ConfigError

RUNS = "runs"
SIMPEDES = "SimPEDES"
_NOT_PARAMETERS = ("core", "over", "seeds")


@dataclass(frozen=True)
class Row:
    """One system or variant: parameters of `notebooks/02_train.ipynb`."""

    name: str
    group: str  # the row's name in study.yml: for a point of a curve, the curve's
    core: bool
    seeds: int  # 0 = the scale's
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    folder: str  # RESULTS/ROW-SEED
    results: str  # folder of the runs that are compared with each other
    row: str
    seed: int
    parameters: dict[str, Any]  # of 02_train, complete but for defaults
    source: str = ""  # of a cross-domain evaluation: the folder of the run that is evaluated
    test: dict[str, Any] = field(default_factory=dict)  # of 03_evaluate, where it differs from 02_train

    @property
    def data(self) -> dict[str, Any]:
        """The parameters that name the data set that is trained on, shared by notebooks 01, 02 and 03."""
        return {name: self.parameters[name] for name in ("dataset", "root", "scale") if name in self.parameters}

    @property
    def tested(self) -> dict[str, Any]:
        """The same of the data set that is tested on."""
        return self.data | self.test


@dataclass(frozen=True)
class Study:
    """What `make study` does at a scale."""

    scale: str
    settings: dict[str, Any]  # of the scale
    runs: tuple[Run, ...]
    cross: tuple[Run, ...]  # finished runs evaluated on another data set

    @property
    def folder(self) -> str:
        """The scale's folder, `runs/SCALE`."""
        return f"{RUNS}/{self.scale}"

    @property
    def results(self) -> dict[str, list[Run]]:
        """Trained runs by the folder in which they are compared with each other."""
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            groups.setdefault(run.results, []).append(run)
        return groups

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """Parameters of 01_data by the notebook's path without ending, for every data set trained or tested on."""
        used = [*(run.data for run in self.runs), *(run.tested for run in (*self.runs, *self.cross))]
        return {self.data_step(data): data for data in used}

    def data_step(self, data: Mapping[str, Any]) -> str:
        """Where a data set's notebook lies, without ending: `runs/SCALE/data-SimPEDES-street-small`."""
        return "-".join([f"{self.folder}/data", data["dataset"], *filter(None, [data.get("scale")])])

    def find(self, folder: str) -> Run:
        """The run or cross-domain evaluation of a folder; KeyError where the study has none."""
        return {run.folder: run for run in (*self.runs, *self.cross)}[folder]

    def only_finished(self) -> "Study":
        """The same study without the runs that are not evaluated yet; ConfigError where none is."""
        kept, cross = ([run for run in runs if is_finished(run, "evaluate")] for runs in (self.runs, self.cross))
        if not kept:
            raise ConfigError(f"no run of {self.folder} is evaluated yet: make study SCALE={self.scale}")
        return Study(self.scale, self.settings, tuple(kept), tuple(cross))


def read_study(config: Mapping[str, Any]) -> Study:
    """Resolve the definition to runs.

    Args:
        config: the content of study.yml; beside it `scale` (a name), and optionally `chosen` (names of rows or curves
            divided by spaces, `core` or `all`), `seeds` (how many), `datasets` (names divided by spaces), `weights`
            (file of the two-stream models), `weights_ivt` and `text_weights_ivt` (ViT and BERT of IVT), `root_NAME`
            (folder of the data set NAME), and `only_finished` (leave out what is not evaluated yet).

    Raises:
        ConfigError: an unknown scale or row, or a real data set without its folder.
    """
    scales = config["scales"]
    name = config.get("scale", "quick")
    if name not in scales:
        raise ConfigError(f"no scale {name!r} in study.yml; known are {', '.join(scales)}")
    settings = scales[name]
    rows = expand_rows(config["rows"])
    chosen = select_rows(rows, config.get("chosen") or settings["rows"])
    names = str(config.get("datasets") or " ".join(settings["datasets"])).split()
    crossed = settings.get("cross", {"rows": [], "datasets": []})
    others = [other for other in crossed["datasets"] if other.startswith(SIMPEDES) or other in names]
    roots = _roots(config, [*names, *others])
    shared = {**settings.get("data", {}), **settings.get("train", {})}
    runs, cross = [], []
    for dataset in names:
        results = f"{RUNS}/{name}" if len(settings["datasets"]) == 1 else f"{RUNS}/{name}/{dataset}"
        for row in chosen:
            for seed in range(_seeds(row, settings, config.get("seeds"))):
                weights = _weights(config, row.parameters["method"])
                kept = {"keep_epochs": True} if row.name in settings.get("keep_epochs", ()) else {}
                data = {"dataset": dataset, **roots[dataset]}
                parameters = {**data, **shared, **kept, **weights, **row.parameters, "seed": seed}
                folder = f"{results}/{row.name}-{seed}"
                run = Run(folder, results, row.name, seed, parameters, test=settings.get("test", {}))
                runs.append(run)
                if row.name in crossed["rows"]:
                    cross += [_crossed(run, other, roots[other]) for other in others if other != dataset]
    study = Study(name, settings, tuple(runs), tuple(cross))
    return study.only_finished() if config.get("only_finished") else study


def expand_rows(defined: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """The rows of study.yml by name, each curve expanded to one row a point.

    A curve has `over`, a list of values by variable; `{variable}` in its parameters is replaced. A point is named
    `CURVE=value` where the variable has the curve's name, else `CURVE_variable=value_...`.
    """
    rows = {}
    for group, content in defined.items():
        parameters = {key: value for key, value in content.items() if key not in _NOT_PARAMETERS}
        over = content.get("over", {})
        for values in itertools.product(*over.values()):
            point = dict(zip(over, values, strict=True))
            words = [f"{variable}={value}" for variable, value in point.items()]
            name = "_".join(words if next(iter(over), None) == group else [group, *words])
            filled = {
                key: value.format(**point) if point and isinstance(value, str) else value
                for key, value in parameters.items()
            }
            rows[name] = Row(name, group, content.get("core", False), content.get("seeds", 0), filled)
    return rows


def select_rows(rows: Mapping[str, Row], wanted: str | list[str]) -> list[Row]:
    """Rows by name, by curve, `core` or `all`, each once, in the order of study.yml; ConfigError for an unknown one."""
    words = wanted.split() if isinstance(wanted, str) else wanted
    known = {*rows, *(row.group for row in rows.values()), "core", "all"}
    for word in words:
        if word not in known:
            near = get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            groups = dict.fromkeys(row.group for row in rows.values())
            raise ConfigError(f"no row {word!r} in study.yml; {hint}known are core, all, {', '.join(groups)}")
    return [
        row
        for row in rows.values()
        if {row.name, row.group, "all"} & set(words) or (row.core and "core" in words)
    ]  # fmt: skip


def is_finished(run: Run, step: str) -> bool:
    """Whether the notebook of a step (train or evaluate) of a run was executed to its end."""
    path = Path(run.folder) / f"{step}.status.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def parse_arguments(words: list[str], definition: str | Path = "study.yml") -> dict[str, Any]:
    """Build the definition with overrides `name=value` from a command line, as `snakemake --config` takes them."""
    config = yaml.safe_load(Path(definition).read_text(encoding="utf-8"))
    return config | dict(word.split("=", 1) for word in words)


def _seeds(row: Row, settings: Mapping[str, Any], asked: Any) -> int:
    if asked:
        return int(asked)
    return row.seeds or settings["seeds" if row.core or "further_seeds" not in settings else "further_seeds"]


def _weights(config: Mapping[str, Any], method: str) -> dict[str, str]:
    kind = "_ivt" if method == "ivt" else ""
    given = {name: config.get(f"{name}{kind}") for name in ("weights", "text_weights")}
    return {name: str(value) for name, value in given.items() if value}


def _crossed(run: Run, dataset: str, root: dict[str, str]) -> Run:
    results = f"{run.results}/on-{dataset}"
    parameters = {key: value for key, value in run.parameters.items() if key != "root"} | {"dataset": dataset} | root
    return Run(f"{results}/{run.row}-{run.seed}", results, run.row, run.seed, parameters, run.folder, run.test)


def _roots(config: Mapping[str, Any], names: list[str]) -> dict[str, dict[str, str]]:
    given = {name: str(config.get(f"root_{name}") or config.get("roots", {}).get(name) or "") for name in names}
    missing = [name for name, root in given.items() if not name.startswith(SIMPEDES) and not Path(root or "-").is_dir()]
    if missing:
        listed = "\n".join(f"  {name}: {given[name] or 'no folder given'}" for name in missing)
        example = " ".join(f"{name}=/data/{name}" for name in missing)
        raise ConfigError(
            f"these data sets are licensed by their owners and no folder of theirs was found:\n{listed}\n"
            f'give their folders, make study SCALE={config.get("scale")} ROOTS="{example}" (or `roots` in study.yml), '
            f'or name those that you have, DATASETS="..."; check a folder with make check ROOT=/data/{missing[0]}.\n'
            "This scale also needs a GPU, and the starting weights of ViT-B/16, which open_clip fetches once "
            "(without a network: WEIGHTS=/path/to/ViT-B-16.pt)"
        )
    return {name: {"root": str(Path(root).absolute())} if root else {} for name, root in given.items()}
