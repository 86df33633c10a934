"""What would have been claimed if epochs and runs had been selected on test: the optimism of picking the best."""

from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.data.annotations import Dataset
from fmfa.records import read_record
from fmfa.study.results import Rows, find_table, read_rows, row_and_seed, run_folders, trained_on
from fmfa.systems import load_system
from fmfa.training.checkpoints import WEIGHTS, epoch_checkpoints

HALVES = 500
ALL = "all rows"


def selection_table(results: str | Path, split: str = "test", seed: int = 0, halves: int = HALVES) -> pd.DataFrame:
    """What picking the best run on test claims, and what the picked run is worth on people it was not picked on.

    The test identities are cut in two at random, `halves` times. On the first half the run with the highest R@1 is
    picked and its R@1 there is what would be claimed; its R@1 on the second half is what it is worth. The candidates
    are the seeds of a row, and in the last line all runs of all rows. With half of the identities the optimism is
    somewhat larger than with all of them.

    Returns:
        One line a row with two runs or more, and "all rows"; in percent and points of R@1:
        `mean of the runs`: what a study with seeds reports;
        `claimed`: R@1 of the best on the half that it was picked on;
        `on other people`: R@1 of the same run on the other half;
        `optimism`: the first minus the second, what picking on test adds out of nothing;
        `lucky run`: `on other people` minus the mean: this run's luck, which another training does not have;
        `chosen on validation`: test R@1 of the run with the best validation R@1 in its `run.json`, an honest number.
    """
    rows, generator = read_rows(results, split), np.random.default_rng(seed)
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
        lines[-1]["chosen on validation"] = _on_validation(rows, runs)
    return pd.DataFrame(lines)


def score_epochs(run: str | Path, dataset: Dataset, split: str, device: str = "cpu") -> pd.DataFrame:
    """Score every epoch that a run kept (`keep_epochs`) on a split of its own data set, for `epochs_table` alone.

    Returns:
        One line per identity: `identity`, `queries` (their number), and for every epoch how many of them found the
        identity first. Empty for a run that has not kept all its epochs, or on another data set than the run's own.

    Raises:
        CheckpointError: the weights of an epoch cannot be read.
    """
    checkpoints, own = epoch_checkpoints(run), trained_on(run) == dataset.name
    table = pd.DataFrame()
    if not (checkpoints and own and len(checkpoints) == read_record(run).get("config", {}).get("epochs")):
        return table
    for epoch, path in checkpoints.items():
        queries = load_system(path / WEIGHTS, device).evaluate(dataset, split).per_query().dropna(subset=["R@1"])
        by_identity = queries.groupby("identity")["R@1"]
        table["queries"], table[str(epoch)] = by_identity.size(), by_identity.sum()
    return table.reset_index()


def epochs_table(results: str | Path, split: str = "test", seed: int = 0, halves: int = HALVES) -> pd.DataFrame:
    """What reporting the best epoch on test claims, as the released codes do, against the epoch of validation.

    Returns:
        One line a row whose runs kept their epochs, in percent and points of R@1, means over those runs:
        `chosen on validation`: test R@1 of the epoch with the best validation R@1;
        `best on test`: the largest test R@1 of all epochs, what would be claimed;
        `added`: the second minus the first;
        `optimism`: as in `selection_table`, with the run's epochs as candidates;
        `best epoch of the best run`: the largest of all, what one published number would be.
        Empty where no run kept its epochs.
    """
    generator, found = np.random.default_rng(seed), {}
    for folder in run_folders(results):
        path, chosen = find_table(folder, split, "epochs"), str(read_record(folder).get("best_epoch"))
        if path and chosen in (table := pd.read_csv(path)):
            found.setdefault(row_and_seed(folder.name)[0], []).append(_epochs(table, chosen, generator, halves))
    lines = []
    for row, runs in found.items():
        table = pd.DataFrame(runs)
        line = {"row": row, "runs": len(runs), "epochs": int(table.pop("epochs").max())} | table.mean().to_dict()
        lines.append(line | {"best epoch of the best run": table["best on test"].max()})
    return pd.DataFrame(lines)


def _epochs(table: pd.DataFrame, chosen: str, generator: np.random.Generator, halves: int) -> dict[str, float]:
    epochs = [name for name in table.columns if name not in ("identity", "queries")]
    test = 100 * table[epochs].sum() / table["queries"].sum()
    people = table.loc[table.index.repeat(table["queries"])]
    picked = _picked(people[epochs].div(people["queries"], axis=0).to_numpy().T, people["identity"], generator, halves)
    return {"epochs": len(epochs), "chosen on validation": test[chosen], "best on test": test.max(),
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


def _on_validation(rows: Rows, runs: list[tuple[str, int]]) -> float:
    """Test R@1 of the run that validation chooses; NaN where a run did not keep its validation R@1."""
    validation = [read_record(rows.folders[run]).get("best") for run in runs]
    if any(value is None for value in validation):
        return np.nan
    row, number = runs[int(np.argmax(validation))]
    return float(100 * rows.runs[row][number]["R@1"].mean())
