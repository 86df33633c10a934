"""The study's definition (`study.yml`) as runs: which rows at a scale, which seeds, on which data, in which folder.

The workflow (`Snakefile`) and `make study` (`fmfa.workflow`) read the definition through `read_study`, which checks it.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from fmfa.errors import ConfigError, nearest, told
from fmfa.files import PROJECT, read_json

RUNS = "runs"
SIMPEDES = "SimPEDES"
_NOT_PARAMETERS = ("core", "over", "passes", "seeds")
_DATA = ("dataset", "root", "scale", "data_seed")


@dataclass(frozen=True)
class Row:
    """One system or variant: parameters of `notebooks/03_train.ipynb`."""

    name: str
    group: str  # the row's name in study.yml: for a point of a curve, the curve's
    core: bool
    seeds: int  # 0 = the scale's
    passes: int  # over the pairs, times those of the scale
    parameters: dict[str, Any]
    point: dict[str, Any]  # of a curve: value by variable; else empty


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    folder: str  # RESULTS/ROW-SEED
    results: str  # folder of the runs that are compared with each other
    row: str
    seed: int
    parameters: dict[str, Any]  # of 03_train, complete except for defaults
    source: str = ""  # of a cross-domain evaluation: the folder of the run that is evaluated
    test: dict[str, Any] = field(default_factory=dict)  # of 04_evaluate, where it differs from 03_train

    @property
    def data(self) -> dict[str, Any]:
        """The parameters that name the data set that is trained on, shared by notebooks 01, 02 and 03."""
        return {name: self.parameters[name] for name in _DATA if name in self.parameters}

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
    seconds: dict[str, float]  # what a step of each kind is expected to take, see study.yml

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
        words = [str(data[name]) for name in ("scale", "data_seed") if data.get(name)]
        return "-".join([f"{self.folder}/data", data["dataset"], *words])

    def find(self, folder: str) -> Run:
        """The run or cross-domain evaluation of a folder; KeyError where the study has none."""
        return {run.folder: run for run in (*self.runs, *self.cross)}[folder]

    def only_finished(self) -> "Study":
        """The same study without the runs that are not evaluated yet; ConfigError where none is."""
        kept, cross = (
            tuple(run for run in runs if step_record(f"{run.folder}/evaluate").get("status") == "finished")
            for runs in (self.runs, self.cross)
        )
        if not kept:
            raise ConfigError(f"no run of {self.folder} is evaluated yet: make study SCALE={self.scale}")
        return replace(self, runs=kept, cross=cross)


def read_study(config: Mapping[str, Any]) -> Study:
    """Resolve the definition to runs.

    Args:
        config: the content of study.yml; beside it `scale` (a name), and optionally `chosen` (names of rows or curves
            divided by spaces, `core` or `all`), `seeds` (how many), `datasets` (names divided by spaces), `weights`
            (file of the two-stream models), `weights_ivt` and `text_weights_ivt` (ViT and BERT of IVT), `root_NAME`
            (folder of the data set NAME), `folders` (the same for several, as "NAME=FOLDER NAME=FOLDER"), and
            `only_finished` (leave out what is not evaluated yet).

    Raises:
        ConfigError: the definition or what is asked for is not of its form (the place is named), an unknown scale or
            row, or a real data set without its folder.
    """
    definition = _checked(config)
    scales, name = definition["scales"], definition["scale"]
    if name not in scales:
        raise ConfigError(f"no scale {name!r} in study.yml; {nearest(name, scales)}known are {', '.join(scales)}")
    settings = scales[name]
    rows, crossed = expand_rows(definition["rows"]), settings["cross"]
    select_rows(rows, [settings["baseline"], *settings["shown"], *settings["keep_epochs"], *crossed["rows"]])
    chosen = select_rows(rows, definition["chosen"] or settings["rows"])
    names = list(dict.fromkeys(definition["datasets"] or settings["datasets"]))
    others = [other for other in crossed["datasets"] if other.startswith(SIMPEDES) or other in names]
    roots = _roots(definition, [*names, *others])
    shared = settings["data"] | settings["train"]
    runs, cross = [], []
    for dataset in names:
        results = f"{RUNS}/{name}" if len(settings["datasets"]) == 1 else f"{RUNS}/{name}/{dataset}"
        for row in chosen:
            for seed in range(_seeds(row, settings, definition["seeds"])):
                method = row.parameters["method"]
                given = settings["methods"].get(method, {}) | _weights(definition, method)
                kept = {"keep_epochs": True} if row.name in settings["keep_epochs"] else {}
                data = {"dataset": dataset, **roots[dataset]} | ({"data_seed": seed} if settings["fresh"] else {})
                parameters = {**data, **shared, **kept, **given, **row.parameters, "seed": seed}
                parameters |= _lengthened(parameters, row.passes)
                folder = f"{results}/{row.name}-{seed}"
                run = Run(folder, results, row.name, seed, parameters, test=settings["test"])
                runs.append(run)
                if row.name in crossed["rows"]:
                    cross += [_crossed(run, other, roots[other]) for other in others if other != dataset]
    study = Study(name, settings, tuple(runs), tuple(cross), definition["seconds"])
    return study.only_finished() if definition["only_finished"] else study


def expand_rows(defined: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """The rows of study.yml by name, each curve expanded to one row per point.

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
            if not re.fullmatch(_NAME, name):
                raise ConfigError(f"study.yml, rows.{group}.over: a point cannot be named {name!r}; use plainer values")
            filled = {key: _fill(value, point) for key, value in parameters.items()}
            seeds, passes = content.get("seeds") or 0, content.get("passes", 1)
            rows[name] = Row(name, group, content.get("core", False), seeds, passes, filled, point)
    return rows


def study_rows() -> dict[str, Row]:
    """The rows of the project's study.yml by name; ConfigError if it is not of its form."""
    return expand_rows(_checked(read_definition(PROJECT / "study.yml"))["rows"])


def select_rows(rows: Mapping[str, Row], wanted: str | list[str]) -> list[Row]:
    """Rows by name, by curve, `core` or `all`, each once, in the order of study.yml; ConfigError for an unknown one."""
    words = wanted.split() if isinstance(wanted, str) else wanted
    known = {*rows, *(row.group for row in rows.values()), "core", "all"}
    for word in words:
        if word not in known:
            groups = ", ".join(dict.fromkeys(row.group for row in rows.values()))
            raise ConfigError(f"no row {word!r} in study.yml; {nearest(word, known)}known are core, all, {groups}")
    return [
        row
        for row in rows.values()
        if {row.name, row.group, "all"} & set(words) or (row.core and "core" in words)
    ]  # fmt: skip


def step_record(step: str) -> dict[str, Any]:
    """The runner's record of a step, the path of an executed notebook without its ending; empty without one."""
    try:
        return read_json(f"{step}.status.json")
    except ConfigError:
        return {}


def spoken(seconds: float) -> str:
    """A duration as one reads it: "2.5 hours", "4 minutes", "20 seconds"."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def read_definition(path: str | Path = "study.yml") -> dict[str, Any]:
    """Read the content of study.yml, which `read_study` checks; ConfigError if it is no YAML mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML lets errors of every kind through
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected `rows:`, `scales:` and what they need")
    return content


def parse_arguments(words: list[str], definition: str | Path = "study.yml") -> dict[str, Any]:
    """Build the definition with overrides `name=value` from a command line, as `snakemake --config` takes them.

    A word without a value changes nothing.

    Raises:
        ConfigError: a word of another form, or `definition` cannot be read.
    """
    if odd := [word for word in words if "=" not in word]:
        raise ConfigError(f"{odd[0]!r} is not of the form NAME=VALUE, such as scale=quick")
    given = dict(word.split("=", 1) for word in words)
    return read_definition(definition) | {name: value for name, value in given.items() if value}


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole definition, defaults filled in; the folders of all data sets are under `roots`."""
    config = dict(config)
    folders = str(config.pop("folders", ""))
    given = {name: config.pop(name) for name in map(str, list(config)) if name.startswith("root_")}
    if isinstance(config.get("roots"), dict):
        config["roots"] = config["roots"] | {name.removeprefix("root_"): root for name, root in given.items()}
    try:
        definition = _Definition.model_validate(config).model_dump()
    except ValidationError as error:
        place = "study.yml, " * (error.errors()[0]["loc"][0] in ("rows", "scales", "roots", "seconds"))
        raise ConfigError(place + told(error)) from None
    definition["datasets"] = [_canonical(name) for name in definition["datasets"]]
    roots = {_canonical(name): root for name, root in definition["roots"].items()}
    known = {*roots, *definition["datasets"]}
    found = [name for name in re.finditer(r"(?<!\S)([^\s=]+)=", folders) if _canonical(name[1]) in known]
    ends = [*(name.start() for name in found), len(folders)]
    if before := folders[: ends[0]].strip():
        raise ConfigError(f'ROOTS has {before!r}; expected "NAME=FOLDER" with NAME one of {", ".join(sorted(known))}')
    given = {_canonical(name[1]): folders[name.end() : end].strip() for name, end in zip(found, ends[1:])}
    definition["roots"] = roots | given
    for scale in definition["scales"].values():
        for content in (scale, scale["cross"]):
            content["datasets"] = [_canonical(name) for name in content["datasets"]]
    return definition


def _canonical(name: str) -> str:
    if name in ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SimPEDES-street", "SimPEDES-station", "SimPEDES-night"):
        return name
    from fmfa.data.annotations import canonical_name

    return canonical_name(name)


def _fill(value: Any, point: Mapping[str, Any]) -> Any:
    for variable, filled in point.items() if isinstance(value, str) else ():
        value = value.replace(f"{{{variable}}}", str(filled))
    return value


def _seeds(row: Row, settings: Mapping[str, Any], asked: int | None) -> int:
    return asked or row.seeds or (not row.core and settings["further_seeds"]) or settings["seeds"]


def _lengthened(parameters: dict[str, Any], passes: int) -> dict[str, int | float]:
    """Epochs and warm-up of a row that makes so many times the scale's passes; empty where it makes the scale's."""
    lengths = {name: parameters[name] for name in ("epochs", "warmup_epochs") if passes > 1 and name in parameters}
    if lengths.get("epochs", 0) < 0:
        from fmfa.training.config import TrainConfig

        lengths["epochs"] = TrainConfig.from_dict(parameters).resolved().epochs
    return {name: round(passes * length, 6) for name, length in lengths.items() if length > 0}


def _weights(definition: Mapping[str, Any], method: str) -> dict[str, str]:
    kind = "_ivt" if method == "ivt" else ""
    given = {name: definition[f"{name}{kind}"] for name in ("weights", "text_weights")}
    return {name: value for name, value in given.items() if value}


def _crossed(run: Run, dataset: str, root: dict[str, str]) -> Run:
    results = f"{run.results}/on-{dataset}"
    parameters = {key: value for key, value in run.parameters.items() if key != "root"} | {"dataset": dataset} | root
    return Run(f"{results}/{run.row}-{run.seed}", results, run.row, run.seed, parameters, run.folder, run.test)


def _roots(definition: Mapping[str, Any], names: list[str]) -> dict[str, dict[str, str]]:
    given = {name: definition["roots"].get(name, "") for name in names}
    roots = {name: str(Path(root).expanduser().absolute()) for name, root in given.items() if root}
    missing = [name for name in given if not name.startswith(SIMPEDES) and not Path(roots.get(name, "-")).is_dir()]
    if missing:
        listed = "\n".join(f"  {name}: {given[name] or 'no folder given'}" for name in missing)
        example = " ".join(f"{name}=/data/{name}" for name in missing)
        raise ConfigError(
            f"these data sets are licensed by their owners and no folder of theirs was found:\n{listed}\n"
            f'give their folders, make study SCALE={definition["scale"]} ROOTS="{example}" (or `roots` in study.yml), '
            f'or name those that you have, DATASETS="..."; check a folder with make check ROOT=/data/{missing[0]}.\n'
            "This scale also needs a GPU, and the starting weights of ViT-B/16, which open_clip fetches once "
            "(without a network: WEIGHTS=/path/to/ViT-B-16.pt)"
        )
    return {name: {"root": roots[name]} if name in roots else {} for name in names}


# What study.yml may hold. Names become folders, and targets of Snakemake, to which braces and slashes mean something.
_NAME = r"^\w[\w.=+-]*$"
_SET_BY_THE_STUDY = {"dataset", "root", "seed", "run"}


def _parameters(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if name in _SET_BY_THE_STUDY:
            raise ValueError(f"{name} cannot be set here, the study sets it")
        if type(value) not in (str, int, float, bool):
            raise ValueError(f"{name} must be text, a number, true or false")
    return values


_Name = Annotated[str, Field(pattern=_NAME, max_length=100)]
_Words = Annotated[list[_Name], BeforeValidator(lambda value: value.split() if isinstance(value, str) else value)]
_Parameters = Annotated[dict[str, Any], AfterValidator(_parameters)]
_Count = Annotated[int, Field(ge=1, le=1000)]
_Method = Literal["clip", "irra", "fmfa", "ivt"]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Costs(BaseModel):
    clip: _Seconds
    irra: _Seconds
    fmfa: _Seconds
    ivt: _Seconds
    evaluate: _Seconds
    data: _Seconds
    comparison: _Seconds
    pictures: _Seconds


class _Row(BaseModel, extra="allow"):
    method: _Method
    core: bool = False
    passes: _Count = 1
    seeds: _Count | None = None
    over: dict[str, Annotated[list[str | int | float], Field(min_length=1)]] = {}

    @model_validator(mode="after")
    def _check(self) -> "_Row":
        _parameters(self.__pydantic_extra__ or {})
        return self


class _Cross(BaseModel, extra="forbid"):
    datasets: _Words = []
    rows: _Words = []


class _Scale(BaseModel, extra="forbid"):
    datasets: Annotated[_Words, Field(min_length=1)]
    rows: Annotated[_Words, Field(min_length=1)]
    seeds: _Count
    further_seeds: _Count | None = None
    baseline: _Name
    shown: _Words = []
    keep_epochs: _Words = []
    data: _Parameters = {}
    fresh: bool = False
    test: _Parameters = {}
    train: _Parameters = {}
    methods: dict[_Method, _Parameters] = {}
    cross: _Cross = _Cross()
    gpu: Annotated[int, Field(ge=0)] = 0


class _Definition(BaseModel, extra="forbid"):
    rows: dict[_Name, _Row]
    scales: dict[_Name, _Scale]
    roots: dict[_Name, str]
    seconds: _Costs
    # asked for on the command line
    scale: str = "quick"
    chosen: _Words = []
    seeds: _Count | None = None
    datasets: _Words = []
    weights: str = ""
    text_weights: str = ""
    weights_ivt: str = ""
    text_weights_ivt: str = ""
    only_finished: bool = False
