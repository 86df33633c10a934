"""What differences the study can see: variance components of its comparisons, and the seeds and identities it takes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from fmfa.evaluation.power import Components, seeds_needed, smallest_difference, variance_components
from fmfa.study.claims import read_claims
from fmfa.study.levels import published_gains
from fmfa.study.results import Results

GAIN = ("FMFA", "IRRA (re-run by the FMFA authors)")
SEEDS = (2, 3, 5, 10, 20)
IDENTITIES = (200, 1000, 5000)
COMPONENTS = ("seed", "identity", "query", "seed x identity", "seed x query")


def components_table(results: Results, split: str = "test") -> pd.DataFrame:
    """Variance components of the paired differences that the claims speak of, as standard deviations in points of R@1.

    Returns:
        One line per pair of single rows in the claims, their parts and the recipes of `data/claims.yml` that
        share two seeds or more: row, minus, seeds, identities, queries, then the components (see
        `fmfa.evaluation.power.Components`), `freedom` that the other rows add to the seeds', and `seed means` with its
        95 % interval by chi-square: the spread of whole seeds, known only roughly from a few. Empty without pairs.
    """
    rows, lines = results.rows(split), []
    compared = [claim for kind in ("claims", "parts", "recipes") for claim in read_claims(kind)]
    scatter = rows.scatter()
    pairs = {(claim["row"], claim["minus"]) for claim in compared}
    for row, minus in sorted(pair for pair in pairs if set(pair) <= set(rows.runs)):
        sides = rows.pair(row, minus)
        if sides is None or sides[0].shape[1] < 2:
            continue
        differences = sides[0][0] - sides[1][0]
        found = variance_components(differences, rows.identity)
        freedom, spread = len(differences) - 1, np.nanmean(differences, axis=1).std(ddof=1)
        low, high = np.sqrt(freedom / stats.chi2.ppf([0.975, 0.025], freedom)) * spread
        deviations = {name: np.sqrt(getattr(found, name.replace(" x ", "_"))) for name in COMPONENTS}
        deviations |= {"seed means": spread, "seed means low": low, "seed means high": high}
        sizes = {"identities": len(np.unique(rows.identity)), "queries": len(rows.identity)}
        lines.append(
            {"row": row, "minus": minus, "seeds": len(differences)}
            | sizes
            | {k: 100 * v for k, v in deviations.items()}
            | {"freedom": scatter.freedom if scatter else 0.0}
        )
    return pd.DataFrame(lines).round(9)  # what is 0 but for rounding is 0


def pooled_components(table: pd.DataFrame) -> tuple[Components, float]:
    """Mean variances of the pairs of `components_table`, in points squared, and the queries an identity."""
    variances = (table[list(COMPONENTS)] ** 2).mean().rename(lambda name: name.replace(" x ", "_"))
    components = Components(**variances, freedom=float(table["freedom"].iloc[0]))
    return components, float((table["queries"] / table["identities"]).mean())


def power_table(table: pd.DataFrame, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    """Smallest difference of two rows (points of R@1) that a design sees with 80 % power at 5 %.

    Args:
        table: of `components_table`; its pairs are pooled, its queries an identity are kept.
        seeds: trainings of each row, one line each. Columns are numbers of test identities, also the table's own.
    """
    components, queries = pooled_components(table)
    columns = sorted({*IDENTITIES, int(table["identities"].iloc[0])})
    found = [[smallest_difference(components, s, people, queries) for people in columns] for s in seeds]
    names = [f"{people:,} identities" for people in columns]
    return pd.DataFrame(found, index=pd.Index(seeds, name="seeds"), columns=names)


def gains_table(table: pd.DataFrame) -> pd.DataFrame:
    """Seeds of each row that FMFA's published gains over IRRA would need, by number of test identities.

    Args:
        table: of `components_table`.

    Returns:
        One line per published gain (points of R@1 on real data, not measured here), the smallest first. "never" where
        10,000 seeds do not suffice, because too few identities remain the limit.
    """
    components, queries = pooled_components(table)
    columns = sorted({*IDENTITIES, int(table["identities"].iloc[0])})
    gains = gains_of_fmfa().reset_index(name="published gain")
    for people in columns:
        needed = [seeds_needed(gain, components, people, queries) for gain in gains["published gain"]]
        gains[f"seeds with {people:,} identities"] = ["never" if found is None else str(found) for found in needed]
    return gains


def gains_of_fmfa() -> pd.Series:
    """FMFA's published gains over IRRA as its authors ran it (points of R@1 on real data), the smallest first."""
    return published_gains(*GAIN).sort_values()
