"""How systems do on another data set than they were trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.data.datasets import SIMPEDES
from fmfa.errors import ConfigError
from fmfa.evaluation.rows import compare_rows
from fmfa.evaluation.statistics import hierarchical_interval
from fmfa.results.files import METRICS, find_queries, finished_evaluation, read_queries, row_and_seed, run_folders
from fmfa.results.names import trained_on
from fmfa.results.rows import SAME

_Runs = dict[int, pd.DataFrame]  # queries by training seed


def cross_domain_table(results: str | Path | Sequence[str | Path], split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 of the rows that were evaluated on another data set than they were trained on, there and at home.

    Args:
        results: one or several folders with one folder a run each; evaluations in run folders
            (`queries-SPLIT@DATASET.csv`) and in `on-DATASET/RUN` are found. For both directions between two domains
            give the results of both.
        split: of the data sets.
        seed: of the bootstrap.

    Returns:
        One line a row, training set and test set; numbers in percent and points. `R@1` with `low` and `high` over seeds
        and identities. `drop` is the R@1 of the same row trained on the test set's own domain, minus this one, on the
        same queries over the seeds that both have, with `drop_low` and `drop_high`; empty where that row was not
        run. `own` is the R@1 of the same networks at home, on other queries. Empty where no row was tested elsewhere.

    Raises:
        ConfigError: no evaluated run, or two evaluations of a test set on different queries.
    """
    found: dict[tuple[str, str, str], _Runs] = {}
    for row, number, home, away, queries in _evaluations(results, split):
        found.setdefault((row, home, away), {})[number] = queries
    if not found:
        raise ConfigError(f"{results} holds no run evaluated on {split}: run notebooks/03_evaluate.ipynb first")
    _refuse_other_queries(found)
    travelled = {row for row, home, away in found if home != away}
    return pd.DataFrame([_line(found, *key, seed) for key in sorted(found) if key[0] in travelled])


def _evaluations(
    results: str | Path | Sequence[str | Path], split: str
) -> Iterator[tuple[str, int, str, str, pd.DataFrame]]:
    """Yield row, seed, training set, test set and queries of every evaluation."""
    tops = [Path(top) for top in ([results] if isinstance(results, str | Path) else results)]
    groups = [group for top in tops for group in (top, *sorted(top.glob("on-*")))]
    for folder in (run for group in groups for run in run_folders(group)):
        home = trained_on(folder)
        for path in sorted([*folder.glob(f"evaluation-{split}.json"), *folder.glob(f"evaluation-{split}@*.json")]):
            name = path.stem.removeprefix("evaluation-")
            if find_queries(folder, name):
                away = finished_evaluation(folder, name)["dataset"]
                # evaluations that do not name the domain are from before there were others than the run's own
                away = home if away == SIMPEDES else away
                yield *row_and_seed(folder.name), home, away, read_queries(folder, name)


def _refuse_other_queries(found: dict[tuple[str, str, str], _Runs]) -> None:
    first: dict[str, pd.DataFrame] = {}
    for (row, _, away), runs in found.items():
        for number, queries in runs.items():
            if not queries[SAME].equals(first.setdefault(away, queries)[SAME]):
                raise ConfigError(
                    f"{row}-{number} was evaluated on other queries of {away} than the rest: keep them apart"
                )


def _line(found: dict[tuple[str, str, str], _Runs], row: str, home: str, away: str, seed: int) -> dict:
    here = found[row, home, away]
    identity = next(iter(here.values()))["identity"].to_numpy()
    level = hierarchical_interval(_values(here, sorted(here)), identity, np.random.default_rng(seed))
    line = {"row": row, "trained on": home, "tested on": away, "seeds": len(here), "queries": len(identity),
            "R@1": 100 * level.estimate, "low": 100 * level.low, "high": 100 * level.high}  # fmt: skip
    native = found.get((row, away, away), {}) if home != away else {}
    drop = dict.fromkeys(("drop", "drop_low", "drop_high"), np.nan)
    if shared := sorted(here.keys() & native.keys()):
        generator = np.random.default_rng(seed)
        lost = compare_rows(_values(native, shared), _values(here, shared), identity, generator).difference
        drop = {"drop": 100 * lost.estimate, "drop_low": 100 * lost.low, "drop_high": 100 * lost.high}
    own = found.get((row, home, home), {})
    return line | drop | {"own": 100 * _values(own, sorted(own)).mean() if own else np.nan}


def _values(runs: _Runs, seeds: Sequence[int]) -> np.ndarray:
    return np.stack([runs[seed][METRICS[0]].to_numpy(dtype=np.float64) for seed in seeds])
