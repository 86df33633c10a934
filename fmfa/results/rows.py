"""The evaluated runs of a results folder as rows of the study, and comparisons of two rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.errors import ConfigError
from fmfa.evaluation.rows import RowComparison, compare_rows
from fmfa.evaluation.statistics import Interval, hierarchical_interval
from fmfa.results.files import find_queries, read_queries, row_and_seed, run_folders, start_names

SAME = ["identity", "image"]


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
