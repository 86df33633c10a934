"""Does better grounding, or a better answer to a changed attribute, go with better retrieval?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from fmfa.records import read_record
from fmfa.study.claims import read_claims
from fmfa.study.results import METRICS, find_table, read_queries, row_and_seed, run_folders

FEWEST_ROWS = 5


def grounding_runs(results: str | Path, split: str = "test") -> pd.DataFrame:
    """Grounding and retrieval of every run that has both, a line each run and map; empty where no run has.

    Columns: row, seed, system (the method; of oracles, "METHOD with true parts"), map; `pointing game`, its `chance`
    (the part's area) and their difference `over chance`; `over prior` (the pointing game minus that of "where this
    part usually is"); `phrases`; `R@1`. Shares in percent, differences in points, of all parts whatever their
    visibility.
    """
    lines = []
    for line, table in _runs(results, split, "grounding"):
        total = table[(table["part"] == "all") & (table["visibility"] == "all")]
        for found in total.to_dict("records"):
            hit, chance, prior = (100 * found[name] for name in ("hit", "chance_hit", "prior_hit"))
            lines.append(line | {"map": found["map"], "phrases": found["phrases"], "pointing game": hit,
                                 "chance": chance, "over chance": hit - chance, "over prior": hit - prior})  # fmt: skip
    return pd.DataFrame(lines)


def counterfactual_runs(results: str | Path, split: str = "test", attribute: str = "all") -> pd.DataFrame:
    """How the similarity answers to one changed attribute, a line each run and kind; empty where no run has it.

    Columns: row, seed, system, kind ("picture" or "caption" was changed), pairs, `moves right` (percent of pairs whose
    similarity moves the right way, chance 50), `effect` (mean move in standard deviations of unpaired similarities),
    `R@1` in percent.
    """
    lines = []
    for line, table in _runs(results, split, "counterfactual"):
        for found in table[table["attribute"] == attribute].to_dict("records"):
            lines.append(line | {"kind": found["kind"], "pairs": found["pairs"], "moves right": 100 * found["right"],
                                 "effect": found["effect"]})  # fmt: skip
    return pd.DataFrame(lines)


def _runs(results: str | Path, split: str, kind: str) -> Iterator[tuple[dict[str, object], pd.DataFrame]]:
    oracles = {claim["row"] for claim in read_claims("oracles")}
    for folder in run_folders(results):
        path = find_table(folder, split, kind)
        if path:
            row, seed = row_and_seed(folder.name)
            retrieval = 100 * read_queries(folder, split)[METRICS[0]].mean()
            system = read_record(folder).get("config", {}).get("method", row) + " with true parts" * (row in oracles)
            yield {"row": row, "seed": seed, "system": system, METRICS[0]: retrieval}, pd.read_csv(path)


def correlation_table(table: pd.DataFrame, group: str, measure: str, seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of a measure with R@1 over runs, for each value of a column, with a 95 % interval.

    The interval is a percentile bootstrap over rows, each with all of its seeds, because runs of one row are alike. It
    is empty with fewer than five rows.

    Args:
        table: of `grounding_table` or `counterfactual_table`.
        group: column that separates the correlations, "map" or "kind".
        measure: column that is correlated with R@1.
        seed: of the bootstrap.

    Returns:
        One line a value of `group`: rows, runs, rho, low, high.
    """
    lines = []
    for name, runs in table.groupby(group, sort=False) if len(table) else ():
        parts = [part[[measure, METRICS[0]]].to_numpy() for _, part in runs.groupby("row")]
        low, high = _over_rows(parts, seed)
        lines.append({group: name, "rows": len(parts), "runs": len(runs), "rho": _spearman(np.concatenate(parts)),
                      "low": low, "high": high})  # fmt: skip
    return pd.DataFrame(lines)


def _over_rows(parts: list[np.ndarray], seed: int) -> tuple[float, float]:
    if len(parts) < FEWEST_ROWS:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(parts), size=(2000, len(parts)))
    found = [_spearman(np.concatenate([parts[place] for place in places])) for places in drawn]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def _spearman(pairs: np.ndarray) -> float:
    """Spearman's rho of the two columns of [N, 2]; NaN where one of them does not vary."""
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return np.nan
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
