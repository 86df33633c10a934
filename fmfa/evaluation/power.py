"""How small a difference of two rows a design can see: variance components, power, and the seeds that it takes."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

MOST_SEEDS = 10_000
POWER = 0.8


@dataclass(frozen=True)
class Components:
    """Variances of the paired difference of two rows, in squared units of the values.

    A query's difference is the sum of a mean and independent effects with these variances:

    Attributes:
        seed: of the training seed, the same for every query.
        identity: of the person, the same for every seed.
        query: of the query within its person, the same for every seed.
        seed_identity: of the person under one seed.
        seed_query: of the query under one seed; the rest.
        freedom: degrees of freedom that other rows add to the seeds' (`fmfa.evaluation.statistics.SeedScatter`).
    """

    seed: float
    identity: float
    query: float
    seed_identity: float
    seed_query: float
    freedom: float = 0.0


def variance_components(differences: np.ndarray, identity: np.ndarray) -> Components:
    """Estimate the components by equating mean squares with their expectations; negative estimates become 0.

    Args:
        differences: float [S, Q], paired differences with S of 2 or more; a query with NaN anywhere is left out.
        identity: integers [Q]; with one query per identity the query's part counts as the identity's.

    Raises:
        ValueError: fewer than two seeds or two identities.
    """
    differences = np.asarray(differences, dtype=np.float64)
    kept = ~np.isnan(differences).any(axis=0)
    differences, identity = differences[:, kept], np.asarray(identity)[kept]
    _, position, counts = np.unique(identity, return_inverse=True, return_counts=True)
    seeds, queries, people = *differences.shape, len(counts)
    if seeds < 2 or people < 2:
        raise ValueError(f"Found {seeds} seeds and {people} identities, expected 2 or more of each.")
    average = differences.mean(axis=0, keepdims=True)
    rest_within, rest_between = _mean_squares(differences - average, position, counts, seeds - 1)
    kept_within, kept_between = _mean_squares(average, position, counts, 1)
    per_identity = (queries - (counts**2).sum() / queries) / (people - 1)
    seed_identity = max(0.0, rest_between - rest_within) / per_identity
    own = differences.mean(axis=1).var(ddof=1)
    return Components(
        seed=max(0.0, own - seed_identity * (counts**2).sum() / queries**2 - rest_within / queries),
        identity=max(0.0, (kept_between - kept_within) / per_identity - seed_identity / seeds),
        query=max(0.0, kept_within - rest_within / seeds),
        seed_identity=seed_identity,
        seed_query=rest_within,
    )


def _mean_squares(values: np.ndarray, position: np.ndarray, counts: np.ndarray, freedom: int) -> tuple[float, float]:
    """Mean squares within and between identities of values [S, Q], with `freedom` degrees of freedom over S."""
    means = np.stack([np.bincount(position, weights=row) for row in values]) / counts
    between = (counts * (means - values.mean(axis=1, keepdims=True)) ** 2).sum() / (freedom * (len(counts) - 1))
    inside = len(position) - len(counts)
    within = ((values - means[:, position]) ** 2).sum() / (freedom * inside) if inside else 0.0
    return float(within), float(between)


def power(difference: float, components: Components, seeds: int, identities: float, queries: float) -> float:
    """Return the probability that `fmfa.evaluation.statistics.compare_rows` finds a true difference at 5 %.

    The test adds Student's t over seeds and a normal error over identities. Its critical value is taken after Cochran
    and Cox (1957): the mean of the two quantiles, weighted by the two squared errors; and the power is averaged over
    what the seeds' error may turn out to be.

    Args:
        difference: true mean difference, in the unit of the values.
        components: variances of the difference.
        seeds: trainings of each row, 2 or more.
        identities: test identities.
        queries: queries an identity.

    Raises:
        ValueError: fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError(f"Found {seeds} seeds, expected 2 or more: one says nothing about others.")
    shared = components.seed_identity / (seeds * identities) + components.seed_query / (seeds * identities * queries)
    over_seeds = components.seed / seeds + shared
    over_identities = components.identity / identities + components.query / (identities * queries) + shared
    true_error = np.sqrt(over_seeds + over_identities - shared)
    freedom = seeds - 1 + components.freedom
    nodes, weights = np.polynomial.legendre.leggauss(60)
    estimated = over_seeds * stats.chi2.ppf((nodes + 1) / 2, freedom) / freedom
    total = estimated + over_identities
    quantile = (estimated * stats.t.ppf(0.975, freedom) + over_identities * stats.norm.ppf(0.975)) / total
    critical = quantile * np.sqrt(total)
    found = stats.norm.sf((critical - difference) / true_error) + stats.norm.cdf((-critical - difference) / true_error)
    return float((found * weights).sum() / 2)


def smallest_difference(components: Components, seeds: int, identities: float, queries: float) -> float:
    """Smallest true difference that is found at 5 % with a probability of 80 %; arguments as in `power`."""
    high = np.sqrt(components.seed + components.identity + components.query + components.seed_identity)
    high = max(high, np.sqrt(components.seed_query))
    if high == 0:
        return 0.0
    while power(high, components, seeds, identities, queries) < POWER:
        high *= 2
    return float(
        optimize.brentq(lambda value: power(value, components, seeds, identities, queries) - POWER, 0, high, rtol=1e-6)
    )


def seeds_needed(difference: float, components: Components, identities: float, queries: float) -> int | None:
    """Fewest seeds that find a true difference with a probability of 80 %; None where 10,000 do not."""

    def enough(seeds: int) -> bool:
        return power(difference, components, seeds, identities, queries) >= POWER

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
