"""What an evaluated run leaves behind, and what the comparison reads of it.

An evaluation is its tables (CSV) and `evaluation-SPLIT.json`, which is written last, lists them by checksum and has one
of its own. What is not listed, or is not as listed, is not read: an evaluation counts once it has finished.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import which_dataset
from fmfa.errors import ConfigError, checked
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, shuffle_captions
from fmfa.evaluation.statistics import Interval, RowComparison, compare_rows, hierarchical_interval
from fmfa.files import PROJECT, read_json, said_plainly, whole_file, write_json
from fmfa.notebook import require_results
from fmfa.records import METRICS as METRICS_FILE
from fmfa.records import RECORD, read_record
from fmfa.simpedes.truth import is_simpedes, read_dataset_record

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
CHANCE, ZERO_SHOT, CEILING = "chance", "zero-shot", "ceiling of the captions"
_EVALUATION, _QUERIES, _IDENTITIES, _CHECKSUM = "evaluation", "queries", "identities", "checksum"
Level = tuple[float, float | None, float | None]  # value and interval in percent
SAME = ["identity", "image"]


def save_evaluation(
    evaluation: Evaluation,
    dataset: Dataset,
    split: str,
    folder: str | Path,
    start: Evaluation | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> None:
    """Write an evaluation into a run's folder: its tables, then `evaluation-SPLIT.json`, which lists them.

    The tables are `queries-SPLIT.csv` (one row per caption: identity, image, rank of the first hit, and the metrics as
    fractions), the same of the control with shuffled captions (`queries-SPLIT-shuffled.csv`) and of the starting
    weights, and `KIND-SPLIT.csv` for each of `tables`. On another data set than the run's own, SPLIT is
    "test@SimPEDES-station" (`names.results_split`), so that no file takes another's place.

    Args:
        evaluation: of the run.
        dataset: what was evaluated.
        split: of the data set.
        folder: of the run.
        start: evaluation of the weights that training began with, the zero-shot level.
        tables: further tables by kind ("grounding", "counterfactual", "epochs"); empty ones are left out.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    folder, name = Path(folder), results_split(folder, dataset, split)
    record = {"dataset": dataset.name, "split": split, "metrics": _metrics(evaluation)}
    if is_simpedes(dataset.images.parent):
        record["ceiling"] = read_dataset_record(dataset.images.parent)["ceiling"].get(split)
    shuffled = shuffle_captions(evaluation, evaluation.seed)
    written = {f"{_QUERIES}-{name}": _queries(evaluation), f"{_QUERIES}-{name}-shuffled": _queries(shuffled)}
    if start:
        record["zero_shot"] = _metrics(start)
        written[f"{_QUERIES}-{name}-zero-shot"] = _queries(start)
    written |= {f"{kind}-{name}": table for kind, table in (tables or {}).items() if len(table)}
    write_evaluation(folder, name, record, written)


def write_evaluation(
    folder: str | Path, split: str, record: dict[str, Any], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Write tables as `NAME.csv`, each whole or not at all, and then `evaluation-SPLIT.json`, which lists them."""
    folder = Path(folder)
    with said_plainly(f"the evaluation cannot be written to {folder}"):
        for name, table in tables.items():
            with whole_file(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g")
        _list_files(folder, split, record, [f"{name}.csv" for name in tables])


def _list_files(folder: Path, split: str, record: Mapping, names: Iterable[str]) -> None:
    content = {**record, "files": {name: _checksum(folder / name) for name in names}}
    write_json(folder / f"{_EVALUATION}-{split}.json", content | {_CHECKSUM: _content_checksum(content)})


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content_checksum(record: Mapping) -> str:
    content = {name: value for name, value in record.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _metrics(evaluation: Evaluation) -> list[dict[str, Any]]:
    table = evaluation.table().round(4)
    return table.astype(object).where(table.notna(), None).to_dict("records")  # one identity has no interval


def _queries(evaluation: Evaluation) -> pd.DataFrame:
    return evaluation.per_query()[["identity", "image", "first_rank", *METRICS]]


def read_evaluation(folder: str | Path, split: str) -> dict[str, Any]:
    """Read `evaluation-SPLIT.json` of a run; empty where the run was not evaluated.

    Raises:
        ConfigError: the evaluation did not finish, or its record or a file that it lists was changed or is missing.
    """
    path = Path(folder) / f"{_EVALUATION}-{split}.json"
    if not path.is_file() and not path.with_name(f"{_QUERIES}-{split}.csv").is_file():
        return {}
    record = read_json(path) if path.is_file() else {}
    with said_plainly(f"the evaluation in {folder} cannot be read"):
        wrong = _not_as_listed(path, record)
    if wrong:
        raise ConfigError(
            f"the evaluation in {folder} did not finish, or was changed since: {wrong}; run "
            "notebooks/04_evaluate.ipynb on it again"
        )
    return record


def _not_as_listed(path: Path, record: Mapping) -> str:
    listed = record.get("files")
    if not isinstance(listed, dict):
        return f"{path.name} is missing or does not list its files"
    if record.get(_CHECKSUM) != _content_checksum(record):
        return f"{path.name} is not as its checksum says"
    files = [(path.parent / name, checksum) for name, checksum in listed.items()]
    wrong = next((file.name for file, checksum in files if not file.is_file() or _checksum(file) != checksum), "")
    return wrong and f"{wrong} is missing or not as {path.name} lists it"


def finished_evaluation(folder: str | Path, split: str) -> dict[str, Any]:
    """The record of `read_evaluation`; empty too where the evaluation did not finish (`run_results` tells which)."""
    try:
        return read_evaluation(folder, split)
    except ConfigError:
        return {}


def find_table(folder: str | Path, split: str, *kinds: str, suffix: str = "") -> Path | None:
    """Path of the first of `KIND-SPLIT[-SUFFIX].csv` that a run's finished evaluation lists; None without any."""
    listed = finished_evaluation(folder, split).get("files", {})
    names = (f"{kind}-{split}{'-' * bool(suffix)}{suffix}.csv" for kind in kinds)
    return next((Path(folder) / name for name in names if name in listed), None)


def find_queries(folder: str | Path, split: str, kind: str = "") -> Path | None:
    """Path of a run's queries, or of their sums by identity in an exported run; None where there are neither."""
    return find_table(folder, split, _QUERIES, _IDENTITIES, suffix=kind)


def read_queries(folder: str | Path, split: str, kind: str = "") -> pd.DataFrame:
    """Read what was written for each query of a run.

    Of an exported run only the sums over each identity's queries are kept: each query then has its identity's mean, and
    no image. Every mean, interval and test of this package is over identities, so they are the same. `kind` is "" for
    the run itself, "zero-shot" for the weights it started from, "shuffled" for shuffled captions.

    Raises:
        ConfigError: the run was not evaluated, or its evaluation did not finish.
    """
    path = find_queries(folder, split, kind)
    if path is None:
        read_evaluation(folder, split)
        of = f" of {kind}" if kind else ""
        raise ConfigError(f"{folder} has no evaluation on {split}{of}: run notebooks/04_evaluate.ipynb on it first")
    table = pd.read_csv(path)
    if path.name.startswith(_QUERIES):
        return table
    means = table[list(METRICS)].div(table["queries"], axis=0)
    table = pd.concat([table["identity"], means], axis=1).loc[table.index.repeat(table["queries"])]
    return table.assign(image="").reset_index(drop=True)


def run_folders(results: str | Path, points: bool = False) -> list[Path]:
    """Return the folders of the runs under a results folder, in order of their names.

    Points of curves, which have a table of their own (`fmfa.study.curves`), are among them only where `points` is
    True or the folder has nothing else.
    """
    found = [path.parent for path in sorted(Path(results).glob(f"*/{RECORD}"))]
    rows = [folder for folder in found if not is_point(folder.name)]
    return found if points or not rows else rows


def is_point(run: str) -> bool:
    """Whether a run or row is a point of a curve of `study.yml`, by its name."""
    return "=" in run


def row_and_seed(run: str) -> tuple[str, int]:
    """Split a run's name ROW-SEED; a name without a number is a row of its own with seed 0."""
    found = re.fullmatch(r"(.+)-(\d+)", run)
    return (found[1], int(found[2])) if found else (run, 0)


def start_names(results: str | Path) -> dict[Path, str]:
    """Name the starting weights of every run folder but those of runs from random weights.

    They are "zero-shot" for the two-stream systems and "zero-shot IVT" for IVT; weights other than the first ones
    found of either have their file's name behind: "zero-shot IVT (tiny_ivt_equal)".
    """
    names: dict[Path, str] = {}
    first: dict[str, str] = {}
    for folder in run_folders(results, points=True):
        config = read_record(folder).get("config", {})
        weights = config.get("weights", "")
        if weights != "none":
            name = f"{ZERO_SHOT} IVT" if config.get("method") == "ivt" else ZERO_SHOT
            same = first.setdefault(name, weights) == weights
            names[folder] = name if same else f"{name} ({Path(weights).stem or 'shipped'})"
    return names


def references(results: str | Path, split: str) -> dict[str, dict[str, Level]]:
    """Levels to compare rows with, by name and metric: chance, zero-shot and the ceiling, as far as they are known."""
    known: dict[str, dict[str, Level]] = {}
    ceiling: dict[str, Level] = {}
    names = start_names(results)
    for folder in run_folders(results):
        record = finished_evaluation(folder, split)
        if not record:
            continue
        forward = [m for m in record["metrics"] if m["direction"] == TEXT_TO_IMAGE]
        known.setdefault(CHANCE, {m["metric"]: (m["chance"], None, None) for m in forward})
        start = [m for m in record.get("zero_shot", ()) if m["direction"] == TEXT_TO_IMAGE]
        if start and folder in names:
            known.setdefault(names[folder], {m["metric"]: (m["value"], m["low"], m["high"]) for m in start})
        ceiling = {m: (100 * record["ceiling"][m], None, None) for m in METRICS} if record.get("ceiling") else ceiling
    return known | ({CEILING: ceiling} if ceiling else {})


def export_results(results: str | Path, target: str | Path) -> list[Path]:
    """Copy what the tables of `notebooks/05_ablation.ipynb` read, without checkpoints and notebooks.

    What `target` holds already stays, so that results may come from several places. Evaluations on other domains
    (`on-DATASET`) are copied too. Queries become sums by identity (see `read_queries`), of each starting weights only
    the first queries are kept, rows before points, and a data folder in the project loses the path of the project.
    `python -m fmfa.study runs/standard data/results/standard` makes the committed tables.

    Returns:
        The folders written, one per run.

    Raises:
        ConfigError: no run in the folder, an evaluation that did not finish, or a target that is the folder itself or
            cannot be written.
    """
    results, target = Path(results), Path(target)
    others = [other for other in sorted(results.glob("on-*")) if run_folders(other)]
    runs = run_folders(results, points=True)
    if not runs and not others:
        raise ConfigError(f"{results} holds no run; expected a folder with one folder per run, as `make study` writes")
    if results.resolve() == target.resolve():
        raise ConfigError(f"{target} is the folder that is copied; give another one")
    with said_plainly(f"{target} cannot be written"):
        for run in runs:
            _export_run(run, target / run.name)
        _keep_one_start(target)
    return [*(target / run.name for run in runs), *(f for o in others for f in export_results(o, target / o.name))]


def _export_run(run: Path, folder: Path) -> None:
    paths = [*run.glob(f"{_EVALUATION}-*.json"), *run.glob(f"{_QUERIES}-*.csv")]
    names = (path.stem.split("-", 1)[1].removesuffix("-shuffled").removesuffix(f"-{ZERO_SHOT}") for path in paths)
    evaluations = {split: read_evaluation(run, split) for split in sorted(set(names))}
    folder.mkdir(parents=True, exist_ok=True)
    for name in filter(lambda name: (run / name).is_file(), (RECORD, METRICS_FILE)):
        _copy(run / name, folder)
    record = read_record(run)
    root = Path(record.get("config", {}).get("root", ""))
    if root.is_relative_to(PROJECT):
        record["config"]["root"] = str(root.relative_to(PROJECT))
        write_json(folder / RECORD, record)
    for split, evaluation in evaluations.items():
        names = [_sum_by_identity(run / name, folder) if name.startswith(_QUERIES) else _copy(run / name, folder)
                 for name in evaluation["files"]]  # fmt: skip
        _list_files(folder, split, evaluation, names)


def _copy(path: Path, folder: Path) -> str:
    with whole_file(folder / path.name) as temporary:
        shutil.copyfile(path, temporary)
    return path.name


def _sum_by_identity(path: Path, folder: Path) -> str:
    queries = pd.read_csv(path).dropna(subset=["R@1"]).groupby("identity", sort=False)
    sums = queries[list(METRICS)].sum()
    sums.insert(0, "queries", queries.size())
    name = path.name.replace(_QUERIES, _IDENTITIES, 1)
    with whole_file(folder / name) as temporary:
        sums.to_csv(temporary, float_format="%.5g")
    return name


def _keep_one_start(results: Path) -> None:
    """Delete all but the first exported queries of each starting weights and split, and those of random weights."""
    names, seen = start_names(results), set()
    for folder in sorted(run_folders(results, points=True), key=lambda folder: is_point(folder.name)):
        for path in sorted(folder.glob(f"{_EVALUATION}-*.json")):
            split = path.stem.removeprefix(f"{_EVALUATION}-")
            start = find_queries(folder, split, ZERO_SHOT)
            if start is None:
                continue
            if folder not in names or (names[folder], split) in seen:
                record = read_evaluation(folder, split)
                _list_files(folder, split, record, [name for name in record["files"] if name != start.name])
                start.unlink()
            seen.add((names.get(folder), split))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 copied, 2 nothing to copy."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.study", description="Copy what the tables read of runs.")
    parser.add_argument("runs", help="folder with one folder per run, such as runs/standard")
    parser.add_argument("target", help="folder that the runs are added to, such as data/results/standard")
    options = parser.parse_args(arguments)
    try:
        written = export_results(options.runs, options.target)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {len(written)} runs copied")
    return 0


def trained_on(folder: str | Path) -> str:
    """Name the data set that a run was trained on, by its record; "" where there is none."""
    name = read_record(folder).get("config", {}).get("dataset", "")
    return which_dataset(name) if name else ""


def results_split(folder: str | Path, dataset: Dataset, split: str) -> str:
    """Name a split in the files of a run's folder: "test", or "test@SimPEDES-station" on another data set than its own.

    So a cross-domain evaluation never takes the place of the run's own, and tables read it as a split of that name.
    A folder whose record is a link to a run elsewhere holds one evaluation, and keeps the plain name.
    """
    own, name = trained_on(folder), dataset.name
    if not own or own == name or (Path(folder) / RECORD).is_symlink():
        return split
    return f"{split}@{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"


@dataclass(frozen=True)
class Rows:
    """Queries of every evaluated run, by row and seed, all on the same queries.

    Attributes:
        runs: by row and training seed.
        starts: of the starting weights, which have no seed, by name (see `files.start_names`).
        folders: of the runs, by row and seed.
    """

    runs: dict[str, dict[int, pd.DataFrame]]
    starts: dict[str, pd.DataFrame]
    folders: dict[tuple[str, int], Path]

    @property
    def identity(self) -> np.ndarray:
        """Identity of each query, integers [Q]; empty without runs."""
        return next((run["identity"].to_numpy() for seeds in self.runs.values() for run in seeds.values()), np.empty(0))

    @property
    def names(self) -> list[str]:
        """The rows, then the starting weights."""
        return [*self.runs, *self.starts]

    def values(self, row: str, metric: str = "R@1") -> np.ndarray:
        """Values of a row, float [S, Q], in order of its seeds; one line for starting weights."""
        runs = [self.starts[row]] if row in self.starts else [run for _, run in sorted(self.runs[row].items())]
        return np.stack([run[metric].to_numpy(dtype=np.float64) for run in runs])

    def mean(self, row: str, metric: str = "R@1", seed: int = 0) -> Interval:
        """Mean of a row with its 95 % interval over seeds and identities, as fractions."""
        return hierarchical_interval(self.values(row, metric), self.identity, np.random.default_rng(seed))

    def pair(self, first: str, second: str, metric: str = "R@1") -> tuple[np.ndarray, np.ndarray] | None:
        """Values of two rows for the seeds that both have; None where a row was not run or no seed is shared."""
        if not {first, second} <= set(self.names):
            return None
        seeds = [sorted(self.runs.get(row, ())) for row in (first, second)]
        trained = [set(found) for found in seeds if found]
        shared = set.intersection(*trained) if trained else set()
        sides = [
            self.values(row, metric)[[seed in shared for seed in found] if found else [0]]
            for row, found in zip((first, second), seeds, strict=True)
        ]
        return (sides[0], sides[1]) if len(sides[0]) and len(sides[1]) else None

    def compare(self, first: str, second: str, metric: str = "R@1", seed: int = 0) -> RowComparison | None:
        """Compare two rows, `first` minus `second`, over the seeds that both have; None as in `pair`."""
        found = self.pair(first, second, metric)
        return compare_rows(*found, self.identity, np.random.default_rng(seed)) if found else None


def read_rows(results: str | Path, split: str, kind: str = "") -> Rows:
    """Read the queries of every evaluated run of a folder; `kind` as in `files.read_queries`.

    Raises:
        ConfigError: two runs were evaluated on different queries.
    """
    runs: dict[str, dict[int, pd.DataFrame]] = {}
    starts: dict[str, pd.DataFrame] = {}
    folders: dict[tuple[str, int], Path] = {}
    first: tuple[Path, pd.DataFrame] | None = None
    names = start_names(results)
    for folder in run_folders(results):
        if find_queries(folder, split, kind) is None:
            continue
        table = read_queries(folder, split, kind)
        first = first or (folder, table)
        if not table[SAME].equals(first[1][SAME]):
            raise ConfigError(f"{folder} was evaluated on other queries than {first[0].name}: keep them apart")
        row, seed = row_and_seed(folder.name)
        runs.setdefault(row, {})[seed], folders[row, seed] = table, folder
        name = names.get(folder)
        if name and name not in starts and find_queries(folder, split, "zero-shot"):
            start = read_queries(folder, split, "zero-shot")
            starts |= {name: start} if start[SAME].equals(table[SAME]) else {}
    return Rows(runs, starts, folders)


@checked
class CompareParameters:
    """Parameters of `notebooks/05_ablation.ipynb`, checked."""

    results: str
    baseline: str
    tuning: str
    away: list
    split: str
    seed: int

    def __post_init__(self) -> None:
        """Check that there are the results folders, and runs of the baseline row in the first; raises ConfigError."""
        for folder in (self.results, *self.away):
            require_results(folder)
        rows = sorted({row_and_seed(path.parent.name)[0] for path in Path(self.results).glob("*/run.json")})
        if self.baseline not in rows:
            raise ConfigError(f"baseline is {self.baseline!r}; {self.results} has runs of the rows {', '.join(rows)}")


if __name__ == "__main__":
    sys.exit(main())
