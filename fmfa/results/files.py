"""What an evaluated run leaves behind, and what the comparison reads of it."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd

from fmfa.data.annotations import Dataset
from fmfa.data.datasets import PROJECT
from fmfa.errors import ConfigError
from fmfa.evaluation import TEXT_TO_IMAGE, Evaluation
from fmfa.evaluation.controls import shuffle_captions
from fmfa.files import write_json
from fmfa.records import METRICS as METRICS_FILE
from fmfa.records import RECORD, read_record
from fmfa.results.names import dataset_label, results_split
from fmfa.simpedes import is_simpedes, read_dataset_record

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
CHANCE, ZERO_SHOT, CEILING = "chance", "zero-shot", "ceiling of the captions"
EXPORTED = (
    RECORD,
    METRICS_FILE,
    "evaluation-*.json",
    "grounding-*.csv",
    "counterfactual-*.csv",
    "identities-*.csv",
    "epochs-*.csv",
)
_QUERIES, _IDENTITIES, EPOCHS = "queries-", "identities-", "epochs-"
Level = tuple[float, float | None, float | None]  # value and interval in percent


def save_evaluation(
    evaluation: Evaluation, dataset: Dataset, split: str, folder: str | Path, start: Evaluation | None = None
) -> None:
    """Write `evaluation-SPLIT.json` (metrics, intervals, chance, ceiling) and `queries-SPLIT.csv` (one row a query).

    `start` is the evaluation of the weights that training began with, kept as the zero-shot level; its queries are
    written to `queries-SPLIT-zero-shot.csv` in the same form, so that rows can be compared with it, and those of the
    control with shuffled captions to `queries-SPLIT-shuffled.csv`. On another data set
    than the run's own, SPLIT is "test@SimPEDES-station" (`names.results_split`), so that no file takes another's place.
    """
    folder, name = Path(folder), results_split(folder, dataset, split)
    metrics = evaluation.table().round(4).to_dict("records")
    record = {"dataset": dataset_label(dataset), "split": split, "metrics": metrics}
    if is_simpedes(dataset.images.parent):
        record["ceiling"] = read_dataset_record(dataset.images.parent)["ceiling"].get(split)
    if start:
        record["zero_shot"] = start.table().round(4).to_dict("records")
        write_queries(start, folder / f"queries-{name}-zero-shot.csv")
    write_queries(evaluation, folder / f"queries-{name}.csv")
    write_queries(shuffle_captions(evaluation, evaluation.seed), folder / f"queries-{name}-shuffled.csv")
    write_json(folder / f"evaluation-{name}.json", record)


def write_queries(evaluation: Evaluation, path: str | Path) -> None:
    """Write one row a caption: identity, image, rank of the first hit, and the metrics as fractions."""
    queries = evaluation.per_query()[["identity", "image", "first_rank", *METRICS]]
    queries.to_csv(path, index=False, float_format="%.6g")


def read_queries(folder: str | Path, split: str, kind: str = "") -> pd.DataFrame:
    """Read what was written for each query of a run.

    Of an exported run only the sums over each identity's queries are kept: each query then has its identity's mean, and
    no image. Every mean, interval and test of this package is over identities, so they are the same. `kind` is "" for
    the run itself, "zero-shot" for the weights it started from, "shuffled" for shuffled captions.

    Raises:
        ConfigError: the run was not evaluated.
    """
    path = find_queries(folder, split, kind)
    if path is None:
        missing = _paths(folder, split, kind)[0]
        raise ConfigError(f"{missing} is missing: run notebooks/03_evaluate.ipynb on this run first")
    table = pd.read_csv(path)
    if path.name.startswith(_QUERIES):
        return table
    means = table[list(METRICS)].div(table["queries"], axis=0)
    table = pd.concat([table["identity"], means], axis=1).loc[table.index.repeat(table["queries"])]
    return table.assign(image="").reset_index(drop=True)


def find_queries(folder: str | Path, split: str, kind: str = "") -> Path | None:
    """Path of a run's queries, or of their sums by identity in an exported run; None where there are neither."""
    return next(filter(Path.is_file, _paths(folder, split, kind)), None)


def _paths(folder: str | Path, split: str, kind: str) -> list[Path]:
    name = f"{split}{'-' * bool(kind)}{kind}.csv"
    return [Path(folder) / f"{_QUERIES}{name}", Path(folder) / f"{_IDENTITIES}{name}"]


def run_folders(results: str | Path, points: bool = False) -> list[Path]:
    """Return the folders of the runs under a results folder, in order of their names.

    Points of curves, which have a table of their own (`fmfa.results.curves`), are among them only where `points` is
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
    """Levels to hold rows against, by name and metric: chance, zero-shot and the ceiling, as far as they are known."""
    known: dict[str, dict[str, Level]] = {}
    ceiling: dict[str, Level] = {}
    names = start_names(results)
    for folder in run_folders(results):
        path = folder / f"evaluation-{split}.json"
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        forward = [m for m in record["metrics"] if m["direction"] == TEXT_TO_IMAGE]
        known.setdefault(CHANCE, {m["metric"]: (m["chance"], None, None) for m in forward})
        start = [m for m in record.get("zero_shot", ()) if m["direction"] == TEXT_TO_IMAGE]
        if start and folder in names:
            known.setdefault(names[folder], {m["metric"]: (m["value"], m["low"], m["high"]) for m in start})
        ceiling = {m: (100 * record["ceiling"][m], None, None) for m in METRICS} if record.get("ceiling") else ceiling
    return known | ({CEILING: ceiling} if ceiling else {})


def export_results(results: str | Path, target: str | Path) -> None:
    """Copy what the tables of `notebooks/04_ablation.ipynb` read, without checkpoints and notebooks.

    What `target` holds already stays, so that results may come from several places. Evaluations on other domains
    (`on-DATASET`) are copied too. Queries become sums by identity (see `read_queries`), of each starting weights only
    the first queries are kept, rows before points, and a data folder in the project loses the path of the project.
    `python -m fmfa.results runs/standard data/results/standard` makes the committed tables.
    """
    for run in run_folders(results, points=True):
        folder = Path(target) / run.name
        folder.mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in EXPORTED for path in run.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
        record = read_record(run)
        root = Path(record.get("config", {}).get("root", ""))
        if root.is_relative_to(PROJECT):
            record["config"]["root"] = str(root.relative_to(PROJECT))
            write_json(folder / RECORD, record)
        for path in sorted(run.glob(f"{_QUERIES}*.csv")):
            queries = pd.read_csv(path).dropna(subset=["R@1"]).groupby("identity", sort=False)
            sums = queries[list(METRICS)].sum()
            sums.insert(0, "queries", queries.size())
            sums.to_csv(folder / path.name.replace(_QUERIES, _IDENTITIES, 1), float_format="%.5g")
    _keep_one_start(target)
    for other in sorted(Path(results).glob("on-*")):
        export_results(other, Path(target) / other.name)


def _keep_one_start(results: str | Path) -> None:
    """Delete all but the first exported queries of each starting weights and split, and those of random weights."""
    names, seen = start_names(results), set()
    for folder in sorted(run_folders(results, points=True), key=lambda folder: is_point(folder.name)):
        for path in folder.glob(f"{_IDENTITIES}*{ZERO_SHOT}.csv"):
            start = names.get(folder), path.name
            if folder not in names or start in seen:
                path.unlink()
            seen.add(start)
