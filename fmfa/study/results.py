"""What an evaluated run leaves behind, and the few long tables that the comparison reads of all runs.

An evaluation is its tables (CSV) and `evaluation-SPLIT.json`, which is written last, lists them by checksum and has one
of its own. What is not listed, or is not as listed, is not read: an evaluation counts once it has finished.

`read_results` reads a folder of runs, or of the files that `export_results` writes, into the same frames (`Results`).
"""

import argparse
import hashlib
import json
import lzma
import re
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmfa.data.annotations import SIMPEDES, Dataset
from fmfa.data.datasets import open_dataset, which_dataset
from fmfa.errors import ConfigError, TrainingError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, gallery_of, shuffle_captions
from fmfa.evaluation.score_record import Cost, Identities, ScoreRecord, describe_split, queries_of, write_record
from fmfa.evaluation.statistics import (
    Interval,
    RowComparison,
    SeedScatter,
    compare_rows,
    hierarchical_interval,
    seed_scatter,
)
from fmfa.files import PROJECT, content_checksum, read_json, said_plainly, whole_file, write_json
from fmfa.records import RECORD, read_metrics, read_record, row_of
from fmfa.study.definition import study_rows

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
CHANCE, ZERO_SHOT, CEILING, SHUFFLED = "chance", "zero-shot", "ceiling of the captions", "shuffled"
_EVALUATION, _QUERIES, _CHECKSUM = "evaluation", "queries", "checksum"
Level = tuple[float, float | None, float | None]  # value and interval in percent
SAME = ["identity", "image"]
_KEYS = ["run", "row", "seed"]
_TEST = [*_KEYS, "trained_on", "tested_on", "split"]


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
    "test@SimPEDES-station" (`results_split`), so that no file takes another's place.

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
    record: dict[str, Any] = {"dataset": dataset.name, "split": split, "metrics": _metrics(evaluation)}
    if dataset.truth:
        record["ceiling"] = dataset.truth.ceiling(split)
    shuffled = shuffle_captions(evaluation, evaluation.seed)
    written = {f"{_QUERIES}-{name}": _queries(evaluation), f"{_QUERIES}-{name}-shuffled": _queries(shuffled)}
    if start:
        record["zero_shot"] = _metrics(start)
        written[f"{_QUERIES}-{name}-zero-shot"] = _queries(start)
    written |= {f"{kind}-{name}": table for kind, table in (tables or {}).items() if len(table)}
    write_evaluation(folder, name, record, written)
    described = describe_split(dataset.name, split, evaluation.rows, evaluation.gallery)
    cost = Cost(evaluation.image_features.shape[1], 0, 1)
    seed = read_record(folder).get("seed", 0)
    scored = ScoreRecord(row_of(folder), seed, "validation", described, cost, queries_of(evaluation))
    write_record(scored, folder / f"{_QUERIES}-{name}.record")


def study_records(
    folder: str | Path, split: str = "test", root: str | Path = "", scale: str = "", data_seed: int = -1
) -> Iterator[tuple[str, ScoreRecord]]:
    """The name and record of every evaluated run of a folder of runs or exported results, on its own data set.

    Args:
        folder: as `read_results` takes it.
        split: of the data sets.
        root: of the data set that they were evaluated on, if it is not where it was when they were trained.
        scale, data_seed: of the SimPEDES without a root that they were evaluated on, if it is not the one that they
            were trained on; empty and -1 for that.

    Raises:
        ConfigError: no evaluated run, or one that was evaluated on other queries than the data set has now.
        AnnotationError: the data set cannot be read.
    """
    results, rows = read_results(folder), {}
    table = results.own("identities", split)
    table = _by_identity(table[table["of"] == "run"])
    if table.empty:
        raise ConfigError(f"{folder} has no run that was evaluated on {split}: run notebooks/04_evaluate.ipynb first")
    for run in results.runs.itertuples():
        part = table[table["run"] == run.run]
        if part.empty:
            continue
        config = run.config
        place = root or ("" if scale else config.get("root", ""))
        seed = config.get("data_seed", 0) if data_seed < 0 else data_seed
        key = run.trained_on, place, scale or config.get("scale") or "small", seed
        if key not in rows:
            drop = bool(config.get("drop_empty_captions"))
            data = open_dataset(*key[:2], scale=key[2], seed=key[3], drop_empty_captions=drop)
            rows[key] = data.split(split)
        counts = rows[key].groupby("identity").size()
        if dict(zip(part["identity"], part["queries"])) != counts.to_dict():
            raise ConfigError(
                f"{folder}: {run.run} was evaluated on other queries than {run.trained_on} {split} has here; give the "
                "scale and data seed, or the root, of the data set that it was evaluated on"
            )
        sums = {metric: part[metric].tolist() for metric in METRICS}
        queries = Identities(part["identity"].tolist(), part["queries"].astype(int).tolist(), sums)
        described = describe_split(run.trained_on, split, rows[key], gallery_of(rows[key]))
        yield run.run, ScoreRecord(run.row, int(run.seed), "validation", described, Cost(None, 0, 1), queries)


def write_evaluation(
    folder: str | Path, split: str, record: dict[str, Any], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Write tables as `NAME.csv`, each whole or not at all, and then `evaluation-SPLIT.json`, which lists them."""
    folder = Path(folder)
    with said_plainly(f"the evaluation cannot be written to {folder}"):
        for name, table in tables.items():
            with whole_file(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, float_format="%.6g")
        content = record | {"files": {f"{name}.csv": _checksum(folder / f"{name}.csv") for name in tables}}
        write_json(folder / f"{_EVALUATION}-{split}.json", content | {_CHECKSUM: content_checksum(content)})


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if record.get(_CHECKSUM) != content_checksum(record):
        return f"{path.name} is not as its checksum says"
    files = [(path.parent / name, checksum) for name, checksum in listed.items()]
    wrong = next((file.name for file, checksum in files if not file.is_file() or _checksum(file) != checksum), "")
    return wrong and f"{wrong} is missing or not as {path.name} lists it"


@dataclass(frozen=True)
class Results:
    """All results of a folder as long tables.

    Every table names the `run`, its `row` of the study and its `seed`; those of evaluations also the data sets that the
    run was `trained_on` and `tested_on`, and the `split`.

    Attributes:
        runs: one line per run: what `run.json` holds, with `config`, `versions`, `git` and `resumed` as dict and list;
            `curve` and `point` (the value of each variable, a dict) for points of a curve or grid of study.yml;
            `left_out`, why its metrics or an evaluation of it are not read.
        identities: metrics of text-to-image queries as fractions, one line per query, or in exported results one per
            identity with the sums over its `queries`; `of` is "run", "zero-shot" (the weights it started from) or
            "shuffled" (captions shuffled; exported without mAP and mINP).
        levels: what each evaluation says of itself in percent, one line per metric and direction, with 95 % interval
            and chance; `of` is "run", "zero-shot" or "ceiling of the captions".
        metrics: of the training, one line per value (see `fmfa.records.read_metrics`).
        grounding: see `fmfa.analysis.grounding.measure_grounding`.
        counterfactual: see `fmfa.analysis.counterfactual.measure_counterfactual`.
        epochs: one line per epoch and identity: its `queries` and how many of them found it first (`R@1`).
    """

    runs: pd.DataFrame
    identities: pd.DataFrame
    levels: pd.DataFrame
    metrics: pd.DataFrame
    grounding: pd.DataFrame
    counterfactual: pd.DataFrame
    epochs: pd.DataFrame

    def compared(self) -> pd.DataFrame:
        """The runs that are compared as rows: all but points of curves, or those if the folder has nothing else."""
        rows = self.runs[~self.runs["point"].astype(bool)]
        return rows if len(rows) else self.runs

    def own(self, name: str, split: str) -> pd.DataFrame:
        """The part of a table of evaluations that is on a split of each run's own data set."""
        table = getattr(self, name)
        return table[(table["split"] == split) & (table["tested_on"] == table["trained_on"])]

    def queries(self, split: str, of: str = "run") -> dict[str, pd.DataFrame]:
        """Metrics of each query on the runs' own data set, by run (see `each_query`)."""
        table = self.own("identities", split)
        parts = each_query(table[table["of"] == of]).groupby("run", sort=False)
        return {run: part.reset_index(drop=True) for run, part in parts}

    def means(self, split: str) -> pd.DataFrame:
        """Mean metrics in percent of every run on a split of its own data set, by run."""
        table = self.own("identities", split)
        table = table[(table["of"] == "run") & table["R@1"].notna()]
        sums = table.groupby("run", sort=False)[["queries", *METRICS]].sum()
        return 100 * sums[list(METRICS)].div(sums["queries"], axis=0)

    def rows(self, split: str, of: str = "run") -> "Rows":
        """The queries by row and seed.

        Raises:
            ConfigError: two runs were evaluated on different queries.
        """
        queries, starts, names = self.queries(split, of), self.queries(split, ZERO_SHOT), start_names(self.runs)
        rows = Rows({}, {})
        for run in self.compared().itertuples():
            if run.run not in queries:
                continue
            rows.add(run.row, run.seed, queries[run.run])
            if run.run in starts and run.run in names and starts[run.run][SAME].equals(queries[run.run][SAME]):
                rows.starts.setdefault(names[run.run], starts[run.run])
        return rows


_COLUMNS = {
    "runs": [*_KEYS, "curve", "point", "trained_on", "left_out", "config", "status", "best", "best_epoch"],
    "identities": [*_TEST, "of", "identity", "queries", *METRICS],
    "levels": [*_TEST, "of", "direction", "metric", "value", "low", "high", "chance", "queries", "gallery"],
    "metrics": [*_KEYS, "split", "epoch", "step", "metric", "value"],
    "grounding": [*_TEST, "map", "part", "visibility", "phrases"],
    "counterfactual": [*_TEST, "kind", "attribute", "pairs"],
    "epochs": [*_TEST, "epoch", "identity", "queries", METRICS[0]],
}
_FORMATS = {"identities": "%.5g", "metrics": "%.6g", "grounding": "%.6g", "counterfactual": "%.6g"}
_JSON = ("point", "config", "versions", "git", "resumed")


def each_query(table: pd.DataFrame) -> pd.DataFrame:
    """One line per query of a part of `Results.identities`: run, identity, image and metrics.

    Of exported results each query has its identity's mean, and no image. Every mean, interval and test of this package
    is over identities, so they are the same.
    """
    means = table[["run", *SAME]].join(table[list(METRICS)].div(table["queries"], axis=0))
    return means.iloc[np.repeat(np.arange(len(table)), table["queries"])].reset_index(drop=True)


def read_results(folder: str | Path) -> Results:
    """Read a folder with one folder per run, or one that `export_results` wrote; without either all tables are empty.

    Raises:
        ConfigError: a file of an exported folder is damaged.
    """
    folder, runs = Path(folder), read_runs(folder)
    if _file(folder, "runs").is_file():
        return Results(runs, **{name: _read_table(folder, name) for name in _COLUMNS if name != "runs"})
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in _COLUMNS if name != "runs"}
    left_out = []
    for run in runs.itertuples():
        keys = {"run": run.run, "row": run.row, "seed": run.seed}
        left_out.append("")
        try:
            tables["metrics"].append(read_metrics(folder / run.run).assign(**keys))
        except TrainingError as error:
            left_out[-1] = str(error)
        for name in _evaluated(folder / run.run):
            try:
                record = read_evaluation(folder / run.run, name)
            except ConfigError as error:
                left_out[-1] = str(error)
                continue
            # evaluations that do not name the domain are from before there were others than the run's own
            tested = record.get("dataset", SIMPEDES)
            tested = run.trained_on if run.trained_on and tested == SIMPEDES else tested
            keys |= {"trained_on": run.trained_on or tested, "tested_on": tested, "split": record.get("split", name)}
            for kind, table in _tables(folder / run.run, name, record):
                tables[kind].append(table.assign(**keys))
    return Results(runs.assign(left_out=left_out), **{name: _joined(name, parts) for name, parts in tables.items()})


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Read the records of the runs of a folder, in order of their names, as `Results.runs`."""
    folder = Path(folder)
    if _file(folder, "runs").is_file():
        return _read_table(folder, "runs")
    study, lines = study_rows(), []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        record, run = read_record(path.parent), path.parent.name
        row = row_of(path.parent)
        point = study[row].point if row in study else {}
        known = {"run": run, "row": row, "seed": 0, "curve": study[row].group if point else "", "point": point,
                 "trained_on": trained_on(path.parent), "left_out": "", "config": {}, "status": None, "best": None,
                 "best_epoch": None}  # fmt: skip
        lines.append(known | record)
    runs = _joined("runs", [pd.DataFrame(lines)] if lines else [])
    return runs.astype({"best": float, "best_epoch": float})


def _evaluated(folder: Path) -> list[str]:
    """Names of the evaluations in a run's folder: "test", or "test@DATASET" on another data set."""
    paths = [*folder.glob(f"{_EVALUATION}-*.json"), *folder.glob(f"{_QUERIES}-*.csv")]
    names = (path.stem.split("-", 1)[1].removesuffix(f"-{SHUFFLED}").removesuffix(f"-{ZERO_SHOT}") for path in paths)
    return sorted(set(names))


def _tables(folder: Path, name: str, record: Mapping[str, Any]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tables of one evaluation with the name of the frame that each is a part of."""
    for of in ("run", ZERO_SHOT, SHUFFLED):
        if (file := f"{_QUERIES}-{name}{f'-{of}' * (of != 'run')}.csv") in record["files"]:
            yield "identities", pd.read_csv(folder / file).assign(of=of, queries=1)
    for kind in ("grounding", "counterfactual", "epochs"):
        if (file := f"{kind}-{name}.csv") in record["files"]:
            yield kind, pd.read_csv(folder / file)
    for of, key in (("run", "metrics"), (ZERO_SHOT, "zero_shot")):
        yield "levels", pd.DataFrame(record.get(key, ()), columns=_COLUMNS["levels"][len(_TEST) + 1 :]).assign(of=of)
    if ceiling := record.get("ceiling"):
        values = {"metric": METRICS, "value": [100 * ceiling[metric] for metric in METRICS]}
        yield "levels", pd.DataFrame(values).assign(of=CEILING, direction=TEXT_TO_IMAGE)


def _joined(name: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
    parts = [part for part in parts if len(part)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    first = [*_COLUMNS[name], *(["image"] if name == "identities" else [])]
    return table.reindex(columns=[*first, *table.columns.drop(first, errors="ignore")])


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.csv{'.xz' * (name != 'runs')}"


def _read_table(folder: Path, name: str) -> pd.DataFrame:
    path = _file(folder, name)
    if not path.exists():
        return _joined(name, [])
    try:
        text = ("run", "row", "curve", "trained_on", "left_out")
        table = pd.read_csv(path, dtype={"seed": "int64"} | dict.fromkeys(text, str)).fillna(dict.fromkeys(text, ""))
        table = table.assign(**{column: table[column].map(json.loads) for column in _JSON if column in table})
        if not all(isinstance(value, dict) for column in ("config", "point") for value in table.get(column, ())):
            raise ValueError("config and point must be JSON objects")
        table = table[[*_COLUMNS[name], *table.columns.drop(_COLUMNS[name])]]
    except (OSError, EOFError, ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise ConfigError(f"{path} is damaged ({error}); export the runs again, or restore it") from error
    return table.assign(image="") if name == "identities" else table


def start_names(runs: pd.DataFrame) -> dict[str, str]:
    """Name the starting weights of every run but those from random weights.

    They are "zero-shot" for the two-stream systems and "zero-shot IVT" for IVT; weights other than the first ones
    of either have their file's name behind: "zero-shot IVT (tiny_ivt_equal)".
    """
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for run, config in zip(runs["run"], runs["config"], strict=True):
        weights = config.get("weights", "")
        if weights != "none":
            name = f"{ZERO_SHOT} IVT" if config.get("method") == "ivt" else ZERO_SHOT
            same = first.setdefault(name, weights) == weights
            names[run] = name if same else f"{name} ({Path(weights).stem or 'shipped'})"
    return names


def references(results: Results, split: str) -> dict[str, dict[str, Level]]:
    """Levels to compare rows with, by name and metric: chance, zero-shot and the ceiling, as far as they are known."""
    table, names = results.own("levels", split), start_names(results.runs)
    table = table[(table["direction"] == TEXT_TO_IMAGE) & table["run"].isin(results.compared()["run"])]
    known: dict[str, dict[str, Level]] = {}
    ceiling: dict[str, Level] = {}
    for (run, of), part in table.groupby(["run", "of"], sort=False):
        values = {line.metric: (line.value, line.low, line.high) for line in part.itertuples()}
        if of == "run":
            known.setdefault(CHANCE, {line.metric: (line.chance, None, None) for line in part.itertuples()})
        elif of == CEILING:
            ceiling = values
        elif run in names:
            known.setdefault(names[run], values)
    return known | ({CEILING: ceiling} if ceiling else {})


def export_results(results: str | Path, target: str | Path) -> list[str]:
    """Write what `read_results` reads of a folder of runs to one file per table: `runs.csv`, the others `NAME.csv.xz`.

    A table without lines has no file. What `target` holds of other runs stays, so that results may come from
    several places. Queries become sums by identity (see `each_query`), of each starting weights only the first
    queries are kept, rows before points, and a data folder in the project loses the path of the project.
    `python -m fmfa.study.results runs/standard data/results/standard` makes the committed tables.

    Returns:
        The runs that were written.

    Raises:
        ConfigError: no run in the folder, an evaluation that did not finish, or a target that is the folder itself,
            holds folders of runs, or cannot be written.
    """
    results, target = Path(results), Path(target)
    new = read_results(results)
    if new.runs.empty:
        raise ConfigError(f"{results} holds no run; expected a folder with one folder per run, as `make study` writes")
    if results.resolve() == target.resolve() or any(target.glob(f"*/{RECORD}")):
        raise ConfigError(f"{target} is a folder of runs, or the one that is copied; give another one")
    for wrong in filter(None, new.runs["left_out"]):
        raise ConfigError(wrong)
    old = read_results(target)
    tables = {}
    for name in _COLUMNS:
        kept = getattr(old, name)
        parts = [kept[~kept["run"].isin(new.runs["run"])], getattr(new, name)]
        tables[name] = _joined(name, parts).sort_values("run", kind="stable", ignore_index=True)
    config = [_portable(config) for config in tables["runs"]["config"]]
    tables["runs"] = tables["runs"].assign(config=config).astype({"best_epoch": "Int64"})
    tables["identities"] = _one_start(tables["runs"], _by_identity(tables["identities"]))
    with said_plainly(f"{target} cannot be written"):
        target.mkdir(parents=True, exist_ok=True)
        for name, table in reversed(tables.items()):  # runs.csv last
            if table.empty:
                _file(target, name).unlink(missing_ok=True)
                continue
            table = table.assign(**{column: table[column].map(json.dumps) for column in _JSON if column in table})
            content = table.to_csv(index=False, float_format=_FORMATS.get(name)).encode()
            with whole_file(_file(target, name)) as temporary:
                temporary.write_bytes(content if name == "runs" else lzma.compress(content))
    return list(new.runs["run"])


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    root = Path(config.get("root", ""))
    return config | {"root": str(root.relative_to(PROJECT))} if root.is_relative_to(PROJECT) else config


def _by_identity(queries: pd.DataFrame) -> pd.DataFrame:
    keys = [*_TEST, "of", "identity"]
    sums = queries.dropna(subset=["R@1"]).groupby(keys, sort=False, as_index=False)[["queries", *METRICS]].sum()
    sums.loc[sums["of"] == SHUFFLED, ["mAP", "mINP"]] = np.nan  # a third of all bytes, and not read
    return sums


def _one_start(runs: pd.DataFrame, identities: pd.DataFrame) -> pd.DataFrame:
    """Leave out all but the first queries of each starting weights and test set, and those of random weights."""
    start = identities[identities["of"] == ZERO_SHOT]
    points = runs.set_index("run")["point"].astype(bool)
    start = start.assign(name=start["run"].map(start_names(runs)), point=start["run"].map(points))
    start = start.sort_values("point", kind="stable")
    first = start.groupby(["name", "tested_on", "split"])["run"].transform("first")
    return identities.drop(start.index[start["run"] != first])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 copied, 2 nothing to copy."""
    parser = argparse.ArgumentParser(
        prog="python -m fmfa.study.results", description="Copy what the tables read of runs."
    )
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
    """Name the data set that a run was trained on, by its record; "" if there is none."""
    name = read_record(folder).get("config", {}).get("dataset", "")
    return which_dataset(name) if name else ""


def results_split(folder: str | Path, dataset: Dataset, split: str) -> str:
    """Name a split in the files of a run's folder: "test", or "test@SimPEDES-station" on another data set than its own.

    So a cross-domain evaluation never takes the place of the run's own.
    """
    own, name = trained_on(folder), dataset.name
    return split if own in ("", name) else f"{split}@{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"


@dataclass(frozen=True)
class Rows:
    """Queries of every evaluated run, by row and seed, all on the same queries.

    Attributes:
        runs: by row and training seed.
        starts: of the starting weights, which have no seed, by name (see `start_names`).
    """

    runs: dict[Any, dict[int, pd.DataFrame]]
    starts: dict[str, pd.DataFrame]

    def add(self, row: Hashable, seed: int, queries: pd.DataFrame) -> None:
        """Add a run; ConfigError if it was evaluated on other queries than those before."""
        first = next((run for seeds in self.runs.values() for run in seeds.values()), queries)
        if not queries[SAME].equals(first[SAME]):
            name, other = queries["run"].iloc[0], first["run"].iloc[0]
            raise ConfigError(f"{name} was evaluated on other queries than {other}: keep them apart")
        self.runs.setdefault(row, {})[seed] = queries

    @property
    def identity(self) -> np.ndarray:
        """Identity of each query, integers [Q]; empty without runs."""
        return next((run["identity"].to_numpy() for seeds in self.runs.values() for run in seeds.values()), np.empty(0))

    @property
    def names(self) -> list[str]:
        """The rows, then the starting weights."""
        return [*self.runs, *self.starts]

    def values(self, row: Hashable, metric: str = "R@1") -> np.ndarray:
        """Values of a row, float [S, Q], in order of its seeds; one line for starting weights."""
        runs = [self.starts[row]] if row in self.starts else [run for _, run in sorted(self.runs[row].items())]
        return np.stack([run[metric].to_numpy(dtype=np.float64) for run in runs])

    def mean(self, row: Hashable, metric: str = "R@1", seed: int = 0) -> Interval:
        """Mean of a row with its 95 % interval over seeds and identities, as fractions."""
        scatter = self.scatter(metric) if row in self.runs else None
        return hierarchical_interval(
            self.values(row, metric), self.identity, np.random.default_rng(seed), scatter=scatter
        )

    def pair(self, first: Hashable, second: Hashable, metric: str = "R@1") -> tuple[np.ndarray, np.ndarray] | None:
        """Values [R, S, Q] of two rows for the seeds that both have; None where one was not run or no seed is shared.

        Several names in one text, "asdm, fmfa", are several rows: the main effect of a factorial design.
        """
        sides = [side.split(", ") if isinstance(side, str) else [side] for side in (first, second)]
        if not {*sides[0], *sides[1]} <= set(self.names):
            return None
        trained = [set(self.runs[row]) for row in (*sides[0], *sides[1]) if row in self.runs]
        shared = set.intersection(*trained) if trained else set()
        values = [np.stack([self._shared(row, shared, metric) for row in side]) for side in sides]
        return (values[0], values[1]) if values[0].shape[1] and values[1].shape[1] else None

    def _shared(self, row: Hashable, seeds: set[int], metric: str) -> np.ndarray:
        kept = [seed in seeds for seed in sorted(self.runs[row])] if row in self.runs else [True]
        return self.values(row, metric)[kept]

    def compare(self, first: Hashable, second: Hashable, metric: str = "R@1", seed: int = 0) -> RowComparison | None:
        """Compare two rows or means of rows, `first` minus `second`, over the seeds that all have; see `pair`."""
        found, generator = self.pair(first, second, metric), np.random.default_rng(seed)
        return compare_rows(*found, self.identity, generator, scatter=self.scatter(metric)) if found else None

    def scatter(self, metric: str = "R@1") -> SeedScatter | None:
        """How much the seeds of the rows scatter, of all that are there when it is first asked for."""
        if metric not in self._scatter:
            self._scatter[metric] = seed_scatter([np.nanmean(self.values(row, metric), 1) for row in self.runs])
        return self._scatter[metric]

    @cached_property
    def _scatter(self) -> dict[str, SeedScatter | None]:
        return {}


if __name__ == "__main__":
    sys.exit(main())
