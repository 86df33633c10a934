"""What would have been claimed if runs had been selected on test: the optimism of picking the best."""

from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.records import read_record
from fmfa.results.rows import Rows, read_rows

HALVES = 500
ALL = "all rows"


def selection_table(results: str | Path, split: str = "test", seed: int = 0, halves: int = HALVES) -> pd.DataFrame:
    """What picking the best run on test claims, and what the picked run is worth on people it was not picked on.

    The test identities are cut in two at random, `halves` times. On the first half the run with the highest R@1 is
    picked and its R@1 there is what would be claimed; its R@1 on the second half is what it is worth. The candidates
    are the seeds of a row, and in the last line all runs of all rows. This measures the choice between *finished
    runs*; the choice of the best epoch on test, which the released codes make, has more candidates and is not
    measured, because runs keep the test of their selected epoch only. With half of the identities the optimism is
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
        lines.append({"row": name, "runs": len(runs)} | _picked(rows, runs, generator, halves))
        lines[-1]["chosen on validation"] = _on_validation(rows, runs)
    return pd.DataFrame(lines)


def _picked(rows: Rows, runs: list[tuple[str, int]], generator: np.random.Generator, halves: int) -> dict[str, float]:
    values = np.stack([rows.runs[row][number]["R@1"].to_numpy(dtype=np.float64) for row, number in runs])
    people, position = np.unique(rows.identity, return_inverse=True)
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
