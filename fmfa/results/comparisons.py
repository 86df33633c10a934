"""Tables of paired comparisons: rows with a row, and the controls without which no row counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fmfa.evaluation.rows import RowComparison
from fmfa.evaluation.statistics import holm, holm_levels
from fmfa.results.files import CHANCE, references
from fmfa.results.rows import Rows, read_rows


def rows_paired_table(results: str | Path, baseline_row: str, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """Compare every row of the study with a baseline row over the seeds that both have, on the same queries.

    Returns:
        One line per row, then the starting weights, chance and the ceiling. `R@1` is the row's mean in percent over all
        of its seeds; `R@1 difference`, `low`, `high` are points over seeds and identities (with one seed over
        identities alone); `p` is over seeds and identities too, and empty with one seed; `p (Holm)`, `low (Holm)` and
        `high (Holm)` are corrected over the table's rows (see `corrected_columns`); `p (these networks)` is the
        permutation test over identities, which knows nothing of seeds (see `fmfa.evaluation.rows.compare_rows`). A row
        that shares no seed with the baseline has no difference.

    Raises:
        ConfigError: two runs were evaluated on different queries.
    """
    rows = read_rows(results, split)
    names = [name for name in rows.names if name != baseline_row]
    found = [rows.compare(name, baseline_row, seed=seed) for name in names]
    levels = ({"row": name, "minus": baseline_row, "R@1": 100 * np.nanmean(rows.values(name))} for name in names)
    table = pd.DataFrame([line | difference_columns(one) for line, one in zip(levels, found, strict=True)])
    if len(table):
        table = table.join(corrected_columns(found))
        table = table[[*table.columns.drop("p (these networks)"), "p (these networks)"]]
    table = pd.concat([table, _constants(results, split, rows, baseline_row)], ignore_index=True)
    return table.astype({"seeds": "Int64"}) if "seeds" in table else table


def difference_columns(found: RowComparison | None) -> dict[str, float]:
    """Columns of a comparison in points of R@1; empty numbers where there was nothing to compare."""
    if found is None:
        names = ("R@1 difference", "low", "high", "effect size", "p", "p (these networks)")
        return {"seeds": 0} | dict.fromkeys(names, np.nan)
    difference = found.difference
    return {"seeds": found.seeds, "R@1 difference": 100 * difference.estimate, "low": 100 * difference.low,
            "high": 100 * difference.high, "effect size": found.effect_size, "p": found.p_value,
            "p (these networks)": found.p_networks}  # fmt: skip


def corrected_columns(family: Sequence[RowComparison | None]) -> pd.DataFrame:
    """Holm's correction of a family of comparisons; empty where there is no p value.

    Returns:
        One line per comparison: `p (Holm)`, and `low (Holm)` and `high (Holm)`, the interval in points of R@1 at the
        confidence level of the comparison in Holm's method (`fmfa.evaluation.statistics.holm_levels`), which leaves
        zero out just where `p (Holm)` is at most 0.05.
    """
    table = pd.DataFrame(np.nan, index=range(len(family)), columns=["p (Holm)", "low (Holm)", "high (Holm)"])
    known = [place for place, one in enumerate(family) if one and not np.isnan(one.p_value)]
    p_values = [family[place].p_value for place in known]
    for place, p, level in zip(known, holm(p_values), holm_levels(p_values), strict=True):
        interval = family[place].interval(level)
        table.loc[place] = p, 100 * interval.low, 100 * interval.high
    return table


def _constants(results: str | Path, split: str, rows: Rows, baseline: str) -> pd.DataFrame:
    """Levels without queries of their own: chance, the ceiling, and zero-shot where only its level was kept."""
    base = 100 * np.nanmean(rows.values(baseline)) if baseline in rows.names else np.nan
    known = {name: level["R@1"][0] for name, level in references(results, split).items() if name not in rows.starts}
    return pd.DataFrame(
        [
            {"row": name, "minus": baseline, "R@1": value, "R@1 difference": value - base}
            for name, value in known.items()
        ]
    )


def shuffled_table(results: str | Path, split: str = "test", seed: int = 0) -> pd.DataFrame:
    """R@1 (percent) of every row whose captions were shuffled at evaluation, against chance; empty where none was.

    `at chance` says whether the 95 % interval over seeds and identities holds the chance level.
    """
    rows, lines = read_rows(results, split, "shuffled"), []
    for name in rows.runs:
        chance, mean = references(results, split)[CHANCE]["R@1"][0], rows.mean(name, seed=seed)
        low, high = 100 * mean.low, 100 * mean.high
        lines.append({"row": name, "seeds": len(rows.runs[name]), "R@1": 100 * mean.estimate, "low": low, "high": high,
                      "chance": chance, "at chance": bool(low <= chance <= high)})  # fmt: skip
    return pd.DataFrame(lines)
