"""Does better grounding go with better retrieval, and do differences here go with those on real data?"""

import numpy as np
import pandas as pd
from scipy import stats

from fmfa.study.claims import read_claims
from fmfa.study.results import METRICS, Results

FEWEST_ROWS = 5
SEED_ON_REAL_DATA = 2.0  # standard deviation of R@1 over trainings, in points: one run each was published
_RUN = ["row", "seed", "system", METRICS[0]]


def grounding_runs(results: Results, split: str = "test") -> pd.DataFrame:
    """Grounding and retrieval of every run that has both, one line per run and map; empty where no run has.

    Columns: row, seed, system (the method; of oracles, "METHOD with true parts"), R@1; map, phrases; `pointing game`,
    its `chance` (the part's area) and their difference `over chance`; `over prior` (the pointing game minus that of
    "where this part usually is"). Shares in percent, differences in points, of all parts whatever their visibility.
    """
    table = results.own("grounding", split)
    table = _beside_retrieval(results, table[(table["part"] == "all") & (table["visibility"] == "all")], split)
    if table.empty:
        return table
    table["pointing game"], table["chance"] = 100 * table["hit"], 100 * table["chance_hit"]
    table["over chance"] = table["pointing game"] - table["chance"]
    table["over prior"] = table["pointing game"] - 100 * table["prior_hit"]
    return table[[*_RUN, "map", "phrases", "pointing game", "chance", "over chance", "over prior"]]


def counterfactual_runs(results: Results, split: str = "test", attribute: str = "all") -> pd.DataFrame:
    """How the similarity answers to one changed attribute, one line per run and kind; empty where no run has it.

    Columns: row, seed, system, R@1 (percent), kind ("picture" or "caption" was changed), pairs, `moves right` (percent
    of pairs whose similarity moves the right way, chance 50), `effect` (mean move in standard deviations of unpaired
    similarities).
    """
    table = results.own("counterfactual", split)
    table = _beside_retrieval(results, table[table["attribute"] == attribute], split)
    if table.empty:
        return table
    return table.assign(**{"moves right": 100 * table["right"]})[[*_RUN, "kind", "pairs", "moves right", "effect"]]


def _beside_retrieval(results: Results, table: pd.DataFrame, split: str) -> pd.DataFrame:
    """The lines of compared runs with their system and R@1 in percent."""
    oracles = {claim["row"] for claim in read_claims("oracles")}
    systems = {
        run.run: run.config.get("method", run.row) + " with true parts" * (run.row in oracles)
        for run in results.compared().itertuples()
    }
    table = table[table["run"].isin(systems)].reset_index(drop=True)
    retrieval = results.means(split)[METRICS[0]]
    return table.assign(system=table["run"].map(systems), **{METRICS[0]: table["run"].map(retrieval)})


def correlation_table(table: pd.DataFrame, group: str, measure: str, seed: int = 0) -> pd.DataFrame:
    """Spearman's correlation of a measure with R@1 over runs, for each value of a column, with a 95 % interval.

    The interval is a percentile bootstrap over rows, each with all of its seeds, because runs of one row are alike. It
    is empty with fewer than five rows.

    Args:
        table: of `grounding_runs` or `counterfactual_runs`.
        group: column that separates the correlations, "map" or "kind".
        measure: column that is correlated with R@1.
        seed: of the bootstrap.

    Returns:
        One line per value of `group`: rows, runs, rho, low, high.
    """
    lines = []
    for name, runs in table.groupby(group, sort=False) if len(table) else ():
        parts = [part[[measure, METRICS[0]]].to_numpy() for _, part in runs.groupby("row")]
        low, high = _over_rows(parts, seed)
        lines.append({group: name, "rows": len(parts), "runs": len(runs), "rho": _spearman(np.concatenate(parts)),
                      "low": low, "high": high})  # fmt: skip
    return pd.DataFrame(lines)


def agreement(table: pd.DataFrame, seed: int = 0) -> str:
    """Say how many differences have the sign that they have on real data, and their rank correlation (Spearman).

    Its 95 % interval is over 2,000 draws of both numbers within their errors: here that of the 95 % interval, on real
    data that of two trainings (`SEED_ON_REAL_DATA`).

    Args:
        table: of `claims_table`, kind "known", without what was not run.
        seed: of the draws.
    """
    pairs = table[["real data", "R@1 difference"]].to_numpy(dtype=float)
    if len(pairs) < FEWEST_ROWS:
        return f"{len(pairs)} of these rows were run; {FEWEST_ROWS} are needed to tell."
    agree = int((pairs[:, 0] * pairs[:, 1] > 0).sum())
    here = (table["high"] - table["low"]).to_numpy(dtype=float) / (2 * stats.norm.ppf(0.975))
    errors = np.stack([np.full(len(pairs), SEED_ON_REAL_DATA * np.sqrt(2)), here], axis=1)
    drawn = np.random.default_rng(seed).normal(pairs, errors, size=(2000, *pairs.shape))
    low, high = np.quantile([_spearman(each) for each in drawn], [0.025, 0.975])
    return (
        f"{agree} of {len(pairs)} differences have the sign that they have on real data; "
        f"their rank correlation is {_spearman(pairs):.2f} [{low:.2f}, {high:.2f}]."
    )


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
