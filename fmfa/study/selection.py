"""What would have been claimed if epochs and runs had been selected on test: the optimism of picking the best."""

from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.data.annotations import Dataset
from fmfa.records import read_record
from fmfa.study.results import Results, Rows, trained_on
from fmfa.systems import load_system
from fmfa.training.checkpoints import WEIGHTS, epoch_checkpoints

HALVES = 500
ALL = "all rows"


def selection_table(results: Results, split: str = "test", seed: int = 0, halves: int = HALVES) -> pd.DataFrame:
    """What picking the best run on test claims, and what the picked run is worth on people it was not picked on.

    The test identities are cut in two at random, `halves` times. On the first half the run with the highest R@1 is
    picked and its R@1 there is what would be claimed; its R@1 on the second half is what it is worth. The candidates
    are the seeds of a row, and in the last line all runs of all rows. With half of the identities the optimism is
    somewhat larger than with all of them.

    Returns:
        One line per row with two runs or more, and "all rows"; in percent and points of R@1:
        `mean of the runs`: what a study with seeds reports;
        `claimed`: R@1 of the best on the half that it was picked on;
        `on other people`: R@1 of the same run on the other half;
        `optimism`: the first minus the second, what picking on test adds out of nothing;
        `lucky run`: `on other people` minus the mean: this run's luck, which another training does not have;
        `chosen on validation`: test R@1 of the run with the best validation R@1 in its `run.json`, an honest number.
    """
    rows, generator = results.rows(split), np.random.default_rng(seed)
    candidates = {name: [(name, number) for number in sorted(runs)] for name, runs in rows.runs.items()}
    candidates[ALL] = [run for runs in candidates.values() for run in runs]
    if len(rows.runs) < 2:
        del candidates[ALL]
    lines = []
    for name, runs in candidates.items():
        if len(runs) < 2:
            continue
        values = np.stack([rows.runs[row][number]["R@1"].to_numpy(dtype=np.float64) for row, number in runs])
        lines.append({"row": name, "runs": len(runs)} | _picked(values, rows.identity, generator, halves))
        lines[-1]["chosen on validation"] = _on_validation(results, rows, runs)
    return pd.DataFrame(lines)


def score_epochs(run: str | Path, dataset: Dataset, split: str, device: str = "cpu") -> pd.DataFrame:
    """Score every epoch that a run kept (`keep_epochs`) on a split of its own data set, for `epochs_table` alone.

    Returns:
        One line per epoch and identity: epoch, identity, `queries` (their number), and how many of them found the
        identity first (`R@1`). Empty for a run that has not kept all its epochs, or on another data set than its own.

    Raises:
        CheckpointError: the weights of an epoch cannot be read.
    """
    checkpoints, own = epoch_checkpoints(run), trained_on(run) == dataset.name
    if not (checkpoints and own and len(checkpoints) == read_record(run).get("config", {}).get("epochs")):
        return pd.DataFrame()
    tables = []
    for epoch, path in checkpoints.items():
        queries = load_system(path / WEIGHTS, device).evaluate(dataset, split).per_query().dropna(subset=["R@1"])
        table = queries.groupby("identity")["R@1"].agg(**{"queries": "size", "R@1": "sum"}).reset_index()
        tables.append(table.assign(epoch=epoch))
    return pd.concat(tables, ignore_index=True)[["epoch", "identity", "queries", "R@1"]]


def epochs_table(results: Results, split: str = "test", seed: int = 0, halves: int = HALVES) -> pd.DataFrame:
    """What reporting the best epoch on test claims, as the released codes do, against the epoch of validation.

    Returns:
        One line per row whose runs kept their epochs, in percent and points of R@1, means over those runs:
        `chosen on validation`: test R@1 of the epoch with the best validation R@1;
        `best on test`: the largest test R@1 of all epochs, what would be claimed;
        `added`: the second minus the first;
        `optimism`: as in `selection_table`, with the run's epochs as candidates;
        `best epoch of the best run`: the largest of all, what one published number would be.
        Empty where no run kept its epochs.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list] = {}
    table = results.own("epochs", split)
    for run in results.compared().itertuples():
        part = table[table["run"] == run.run]
        if run.best_epoch in set(part["epoch"]):
            found.setdefault(run.row, []).append(_epochs(part, run.best_epoch, generator, halves))
    lines = []
    for row, runs in found.items():
        table = pd.DataFrame(runs)
        line = {"row": row, "runs": len(runs), "epochs": int(table.pop("epochs").max())} | table.mean().to_dict()
        lines.append(line | {"best epoch of the best run": table["best on test"].max()})
    return pd.DataFrame(lines)


def _epochs(table: pd.DataFrame, chosen: int, generator: np.random.Generator, halves: int) -> dict[str, float]:
    hits = table.pivot(index=["identity", "queries"], columns="epoch", values="R@1").reset_index("queries")
    queries = hits.pop("queries")
    test = 100 * hits.sum() / queries.sum()
    people = hits.div(queries, axis=0).loc[hits.index.repeat(queries)]
    picked = _picked(people.to_numpy().T, people.index, generator, halves)
    return {"epochs": len(test), "chosen on validation": test[chosen], "best on test": test.max(),
            "added": test.max() - test[chosen], "optimism": picked["optimism"]}  # fmt: skip


def _picked(values: np.ndarray, identity: np.ndarray, generator: np.random.Generator, halves: int) -> dict[str, float]:
    people, position = np.unique(identity, return_inverse=True)
    claimed, worth = np.empty(halves), np.empty(halves)
    for draw in range(halves):
        first = (generator.permutation(len(people)) < len(people) // 2)[position]
        shown, hidden = np.nanmean(values[:, first], axis=1), np.nanmean(values[:, ~first], axis=1)
        best = shown.argmax()
        claimed[draw], worth[draw] = shown[best], hidden[best]
    mean = np.nanmean(values)
    return {"mean of the runs": 100 * mean, "claimed": 100 * claimed.mean(), "on other people": 100 * worth.mean(),
            "optimism": 100 * (claimed - worth).mean(), "lucky run": 100 * (worth.mean() - mean)}  # fmt: skip


def _on_validation(results: Results, rows: Rows, runs: list[tuple[str, int]]) -> float:
    """Test R@1 of the run that validation chooses; NaN if a run did not keep its validation R@1."""
    validation = results.compared().set_index(["row", "seed"])["best"].loc[runs]
    if validation.isna().any():
        return np.nan
    row, number = runs[int(np.argmax(validation))]
    return float(100 * rows.runs[row][number]["R@1"].mean())
