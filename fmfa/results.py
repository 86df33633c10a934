"""What an evaluated run leaves behind, and the tables that compare runs."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fmfa.data.annotations import Dataset
from fmfa.errors import ConfigError
from fmfa.evaluation import TEXT_TO_IMAGE, Evaluation
from fmfa.evaluation.statistics import hierarchical_interval, holm, paired_comparison
from fmfa.records import read_record, write_json
from fmfa.simpedes import is_simpedes, read_dataset_record

PUBLISHED = Path(__file__).parents[1] / "data" / "published.csv"
METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")


@dataclass(frozen=True)
class EvaluateParameters:
    """Parameters of `notebooks/03_evaluate.ipynb`, checked."""

    run: str
    dataset: str
    root: str
    scale: str
    data_seed: int
    split: str
    sentence: str
    folder: str
    queries: int
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        if self.split not in ("train", "val", "test"):
            raise ConfigError(f"split is {self.split!r}; expected train, val or test")
        if not 1 <= self.queries <= 20:
            raise ConfigError(f"queries is {self.queries}; expected 1 to 20 pictures a grid")


@dataclass(frozen=True)
class CompareParameters:
    """Parameters of `notebooks/04_ablation.ipynb`, checked."""

    results: str
    baseline: str
    split: str
    seed: int

    def __post_init__(self) -> None:
        """Check that there is a results folder; raises ConfigError."""
        if not Path(self.results).is_dir():
            raise ConfigError(f"{self.results} is no folder; expected one with a folder a run, as `make study` writes")


def result_table(systems: dict[str, Evaluation], dataset: Dataset, split: str) -> pd.DataFrame:
    """Percentages of each system with 95 % intervals over identities, above chance and below the ceiling.

    Args:
        systems: by name, all evaluated on the same split.
        dataset: what they were evaluated on; SimPEDES has a ceiling for val and test.
        split: of the data set.

    Returns:
        One row a system and direction, then chance and, where it is known, the ceiling; columns are the metrics, each
        a string "value [low, high]", and the numbers of queries and gallery items.
    """
    rows = []
    for name, evaluation in systems.items():
        for direction, values in evaluation.table().groupby("direction", sort=False):
            row = {"system": name, "direction": direction}
            row |= {v.metric: f"{v.value:.1f} [{v.low:.1f}, {v.high:.1f}]" for v in values.itertuples()}
            rows.append(row | {"queries": values["queries"].iloc[0], "gallery": values["gallery"].iloc[0]})
    chance = next(iter(systems.values())).chance[TEXT_TO_IMAGE]
    rows.append({"system": "chance", "direction": TEXT_TO_IMAGE} | _percent(chance))
    if is_simpedes(dataset.images.parent):
        known = read_dataset_record(dataset.images.parent)["ceiling"].get(split)
        if known:
            rows.append({"system": "ceiling of the captions", "direction": TEXT_TO_IMAGE} | _percent(known))
    return pd.DataFrame(rows, dtype=object).fillna("")


def _percent(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{100 * values[name]:.1f}" for name in METRICS}


def save_evaluation(
    evaluation: Evaluation, dataset: Dataset, split: str, folder: str | Path, start: Evaluation | None = None
) -> None:
    """Write `evaluation-SPLIT.json` (metrics, intervals, chance, ceiling) and `queries-SPLIT.csv` (one row a query).

    `start` is the evaluation of the weights that training began with, kept as the zero-shot level.
    """
    folder = Path(folder)
    record = {"dataset": dataset.name, "split": split, "metrics": evaluation.table().round(4).to_dict("records")}
    if is_simpedes(dataset.images.parent):
        record["ceiling"] = read_dataset_record(dataset.images.parent)["ceiling"].get(split)
    if start:
        record["zero_shot"] = start.table().round(4).to_dict("records")
    queries = evaluation.per_query()[["identity", "image", "first_rank", *METRICS]]
    queries.to_csv(folder / f"queries-{split}.csv", index=False, float_format="%.6g")
    write_json(folder / f"evaluation-{split}.json", record)


def read_queries(folder: str | Path, split: str) -> pd.DataFrame:
    """Read what `save_evaluation` wrote for each query of a run; ConfigError where the run was not evaluated."""
    path = Path(folder) / f"queries-{split}.csv"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: run notebooks/03_evaluate.ipynb on this run first")
    return pd.read_csv(path)


def run_results(results: str | Path, split: str = "test") -> pd.DataFrame:
    """Collect every run under a results folder: name, method, seed, status, best epoch, seconds and metrics in percent.

    Failed, interrupted and unevaluated runs stay in the table, with their status and empty metrics.
    """
    rows = []
    for path in sorted(Path(results).glob("*/run.json")):
        record = read_record(path.parent)
        config = record.get("config", {})
        row = {"run": path.parent.name, "method": config.get("method"), "preset": config.get("preset"),
               "objectives": config.get("objectives"), "seed": record.get("seed"), "status": record.get("status"),
               "best_epoch": record.get("best_epoch")}  # fmt: skip
        queries = path.parent / f"queries-{split}.csv"
        if queries.is_file():
            row |= (100 * pd.read_csv(queries)[list(METRICS)].mean()).to_dict()
        rows.append(row)
    return pd.DataFrame(rows)


def seeds_table(results: str | Path, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """Return the mean of each row of the study over its seeds, with 95 % intervals over seeds and identities.

    Runs are grouped by name: ROW-SEED. With one seed the interval is over identities alone. Chance, the zero-shot level
    of the starting weights and the ceiling of the captions follow, as far as the evaluations know them.
    """
    groups: dict[str, list[pd.DataFrame]] = {}
    for path in sorted(Path(results).glob(f"*/queries-{split}.csv")):
        groups.setdefault(path.parent.name.rsplit("-", 1)[0], []).append(pd.read_csv(path))
    rows = []
    for name, runs in groups.items():
        row: dict[str, str | int] = {"row": name, "seeds": len(runs), "queries": len(runs[0])}
        for metric in METRICS:
            values = np.stack([run[metric].to_numpy() for run in runs])
            found = hierarchical_interval(values, runs[0]["identity"].to_numpy(), np.random.default_rng(seed))
            row[metric] = f"{100 * found.estimate:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        rows.append(row)
    return pd.DataFrame(rows + _references(results, split), dtype=object).fillna("")


def _references(results: str | Path, split: str) -> list[dict[str, str]]:
    known: dict[str, dict[str, str]] = {}
    for path in sorted(Path(results).glob(f"*/evaluation-{split}.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        forward = [m for m in record["metrics"] if m["direction"] == TEXT_TO_IMAGE]
        known["chance"] = {m["metric"]: f"{m['chance']:.1f}" for m in forward}
        for m in record.get("zero_shot", ()):
            if m["direction"] == TEXT_TO_IMAGE:
                level = f"{m['value']:.1f} [{m['low']:.1f}, {m['high']:.1f}]"
                known.setdefault("zero-shot", {})[m["metric"]] = level
        if record.get("ceiling"):
            known["ceiling of the captions"] = _percent(record["ceiling"])
    return [{"row": name, **values} for name, values in known.items()]


def paired_table(results: str | Path, baseline: str, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """Compare every evaluated run with a baseline run on the same queries.

    Differences in R@1 (points) with 95 % intervals from a bootstrap over identities, and p values of a permutation
    test over identities, Holm-corrected over the table. They speak of these trained networks, not of other seeds.

    Raises:
        ConfigError: the baseline was not evaluated, or a run has other queries.
    """
    base, rows = read_queries(Path(results) / baseline, split), []
    for path in sorted(Path(results).glob(f"*/queries-{split}.csv")):
        if path.parent.name == baseline:
            continue
        run = pd.read_csv(path)
        if not run[["identity", "image"]].equals(base[["identity", "image"]]):
            raise ConfigError(f"{path.parent} was evaluated on other queries than {baseline}")
        values = (q["R@1"].to_numpy() for q in (run, base))
        found = paired_comparison(*values, base["identity"].to_numpy(), np.random.default_rng(seed))
        difference = found.difference
        rows.append(
            {"run": path.parent.name, "minus": baseline, "R@1 difference": 100 * difference.estimate,
             "low": 100 * difference.low, "high": 100 * difference.high, "effect size": found.effect_size,
             "p": found.p_value}
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(**{"p (Holm)": holm(table["p"].tolist())}) if len(table) else table


def plot_comparison(results: str | Path, split: str = "test", seed: int = 0) -> Figure:
    """Show R@1 of every evaluated run with its 95 % interval over identities, between chance and ceiling."""
    found, lines = [], {}
    for path in sorted(Path(results).glob(f"*/evaluation-{split}.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        row = next(m for m in record["metrics"] if (m["direction"], m["metric"]) == (TEXT_TO_IMAGE, "R@1"))
        found.append({"run": path.parent.name, **row})
        lines["chance"] = row["chance"]
        if record.get("ceiling"):
            lines["ceiling of the captions"] = 100 * record["ceiling"]["R@1"]
    if not found:
        raise ConfigError(f"{results} holds no run evaluated on {split}")
    table = pd.DataFrame(found)
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(table) + 1.6), layout="constrained")
    errors = [table["value"] - table["low"], table["high"] - table["value"]]
    axis.errorbar(table["value"], table["run"], xerr=errors, fmt="o", capsize=4, color="C0")
    for (name, value), style in zip(lines.items(), (":", "--"), strict=False):
        axis.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name}, {value:.1f} %")
    axis.set(xlabel=f"R@1 on {split} (%), n = {int(table['queries'].iloc[0]):,} queries", xlim=(0, 100))
    axis.invert_yaxis()
    axis.margins(y=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return figure


def published_table() -> pd.DataFrame:
    """Return R@1 that papers publish on the real data sets, by method and starting weights, with its source."""
    table = pd.read_csv(PUBLISHED)
    table = table[~table["method"].str.startswith("ablation")]
    return table.pivot_table(index=["method", "initialisation"], columns="dataset", values="R1", sort=False)


def export_results(results: str | Path, target: str | Path) -> None:
    """Copy what the tables of `notebooks/04_ablation.ipynb` read, without checkpoints and notebooks.

    `python -m fmfa.results runs/seeds data/results/seeds` makes the committed tables.
    """
    for record in sorted(Path(results).glob("*/run.json")):
        folder = Path(target) / record.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("run.json", "evaluation-*.json", "queries-*.csv"):
            for path in record.parent.glob(pattern):
                shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    export_results(*sys.argv[1:3])
