"""Uncertainty of per-query metrics: intervals and paired tests in which the identity is the unit.

Queries of one person succeed and fail together, so neither intervals nor tests may treat them as
independent: identities are what is resampled, and what is permuted. Comparisons of rows add the seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests

# SciPy resamples in batches of this many numbers, so that 5,000 identities do not fill the memory.
BATCH_ELEMENTS = 2**22
RESAMPLES = 2000  # of a bootstrap
LEVEL = 0.95  # of every interval, unless told otherwise


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its confidence interval, in the unit of the values.

    Both ends are NaN with only one identity: one says nothing about others.
    """

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    values: np.ndarray,
    identity: np.ndarray,
    generator: np.random.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean over queries with the 95 % percentile bootstrap interval over identities (cluster bootstrap).

    Identities are drawn with replacement, each with all of its queries; SciPy does the resampling.

    Args:
        values: float [Q], one a query; NaN (a query without an answer) is left out.
        identity: integers [Q].
        generator: source of the resampling.
        resamples: bootstrap samples.

    Raises:
        ValueError: lengths differ, or no value is left.
    """
    sums, counts = sums_by_identity(np.asarray(values, dtype=np.float64)[None], identity)
    estimate = sums.sum() / counts.sum()
    means = resampled_means(sums[0], counts, generator, resamples)
    return Interval(float(estimate), *_quantiles(means, LEVEL))


def hierarchical_interval(
    values: np.ndarray,
    identity: np.ndarray,
    generator: np.random.Generator,
    *,
    scatter: "SeedScatter | None" = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean over seeds and queries with a 95 % interval over both training seeds and identities.

    Identities are resampled as in `bootstrap_interval`, for the mean over seeds. Seeds are not resampled:
    with the three to five that a study can afford, their bootstrap gives intervals that are much too short.
    The seeds' part of the error is instead Student's t with S - 1 degrees of freedom, scaled by the standard
    error of the seeds' means, and added. With one seed the interval is that of
    `bootstrap_interval` and says nothing about other seeds. For the difference of two systems that were
    trained with the same seeds, pass the difference of their values.

    Args:
        values: float [S, Q], the same queries in every row; a query with NaN in any row is left out.
        identity: integers [Q].
        generator: source of the resampling.
        scatter: of all rows of the study, which moderates the seeds' error.
        resamples: bootstrap samples.

    Raises:
        ValueError: shapes do not fit, or no value is left.
    """
    sums, counts = sums_by_identity(np.asarray(values, dtype=np.float64), identity)
    seed_means = sums.sum(axis=1) / counts.sum()
    means = resampled_means(sums.mean(axis=0), counts, generator, resamples)
    if (freedom := len(seed_means) - 1) == 0:
        return _interval_over_seeds(means, float(seed_means[0]), 0.0, 0, LEVEL)
    variance, total = _moderated(seed_means.var(ddof=1), freedom, scatter)
    error = np.sqrt(variance / len(seed_means))
    return _interval_over_seeds(means, float(seed_means.mean()), error, total, LEVEL)


def further_run(values: np.ndarray, scatter: "SeedScatter | None" = None) -> tuple[float, float]:
    """Where the mean over the same queries of one further training of a row would lie (95 % prediction interval).

    Student's t around the mean of the S seeds' means, S - 1 degrees of freedom, with the spread of one run beside that
    of the mean. A single run of another row outside of it differs by more than another seed explains.

    Args:
        values: float [S, Q]; a query with NaN in any row is left out.
        scatter: of all rows of the study, which moderates the seeds' spread.

    Returns:
        Its ends; NaN with one seed.
    """
    means = values[:, ~np.isnan(values).any(axis=0)].mean(axis=1)
    if len(means) < 2:
        return np.nan, np.nan
    variance, freedom = _moderated(means.var(ddof=1), len(means) - 1, scatter)
    reach = stats.t.isf((1 - LEVEL) / 2, freedom) * np.sqrt(variance * (1 + 1 / len(means)))
    return float(means.mean() - reach), float(means.mean() + reach)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values of one family of comparisons, adjusted by Holm's step-down method (statsmodels)."""
    return multipletests(p_values, method="holm")[1] if len(p_values) else np.empty(0)


def holm_levels(p_values: Sequence[float]) -> np.ndarray:
    """Confidence levels at which the intervals of one family agree with Holm's method at alpha = 5 %.

    Of m comparisons that with the k-th smallest p value is tested at alpha / (m - k + 1), until the first that is not
    rejected; all further ones have that one's level. An interval at 1 minus this leaves zero out just where
    `holm(p_values) <= 0.05`. Each interval has its own level; only the widest, at 1 - alpha / m for all, would
    cover all differences at once with probability 1 - alpha (Bonferroni).
    """
    values = np.asarray(p_values, dtype=np.float64)
    order, steps = np.argsort(values, kind="stable"), np.arange(len(p_values))
    tested = 0.05 / (len(p_values) - steps)
    rejected = np.logical_and.accumulate(values[order] <= tested).sum()
    levels = np.empty(len(p_values))
    levels[order] = 1 - tested[np.minimum(steps, min(rejected, len(steps) - 1))] if len(steps) else []
    return levels


def sums_by_identity(values: np.ndarray, identity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums [S, K] of the values [S, Q] and numbers of queries [K] for each identity that has any value."""
    identity = np.asarray(identity)
    if values.ndim != 2 or values.shape[1:] != identity.shape:
        found = f"values of shape {values.shape} and identities of shape {identity.shape}"
        raise ValueError(f"Found {found}, expected one identity per query.")
    kept = ~np.isnan(values).any(axis=0)
    if not kept.any():
        raise ValueError("No query has a value: there is nothing to average.")
    _, position = np.unique(identity[kept], return_inverse=True)
    sums = np.stack([np.bincount(position, weights=row) for row in values[:, kept]])
    return sums, np.bincount(position).astype(np.float64)


def resampled_means(sums: np.ndarray, counts: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Means over queries [resamples] of bootstrap samples of identities, by SciPy."""
    if len(sums) == 1:
        return np.full(resamples, np.nan)
    result = stats.bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(len(sums)),
        method="percentile",
        rng=generator,
    )
    return result.bootstrap_distribution


def _interval_over_seeds(means: np.ndarray, estimate: float, error: float, freedom: float, level: float) -> Interval:
    """Interval of a mean over seeds: identity-resampled `means` [R], with the seeds' t if they have an error.

    Its ends are quantiles of the mixture of R t distributions, one around each of the means.
    """
    if not error > 0 or np.isnan(means).any():
        return Interval(estimate, *_quantiles(means, level))
    tail = (1 - level) / 2
    reach = error * stats.t.isf(tail, freedom)

    around = means.min() - reach - error, means.max() + reach + error

    def excess(end: float, share: float) -> float:
        return stats.t.cdf((end - means) / error, freedom).mean() - share

    low, high = (float(optimize.brentq(excess, *around, args=(share,))) for share in (tail, 1 - tail))
    return Interval(estimate, low, high)


@dataclass(frozen=True)
class SeedScatter:
    """How much the means of single trainings scatter around their row's mean, over all rows of a study.

    Attributes:
        variance: the rows' typical variance.
        freedom: degrees of freedom that it adds to a comparison's own: few where rows scatter unequally, and at most
            half of `pooled`.
        pooled: those of all rows together, more than which no comparison has.
    """

    variance: float
    freedom: float
    pooled: int


def seed_scatter(rows: Sequence[np.ndarray]) -> SeedScatter | None:
    """Fit a scaled inverse chi-square distribution to the variances of rows by moments of their logarithms.

    Smyth, "Linear models and empirical Bayes methods for assessing differential expression", 2004, Section 6.2: where
    the logarithms vary no more than chi-square draws would, all rows scatter alike, and the variance is the pooled one.
    The degrees of freedom are halved, because a study has a dozen rows where Smyth has thousands: with all of them,
    tests at 5 % reject up to 9 % where rows scatter very unequally, with half of them 3 to 6 %.

    Args:
        rows: of each row the means of its seeds, float [S]; rows with one seed or without any scatter are left out.

    Returns:
        None with fewer than three rows, which do not tell how unequally rows scatter.
    """
    found = [(len(means) - 1, means.var(ddof=1)) for means in rows if len(means) > 1 and np.ptp(means) > 1e-12]
    if len(found) < 3:
        return None
    freedom, variances = np.array(found).T
    pooled = int(freedom.sum())
    centred = np.log(variances) - special.digamma(freedom / 2) + np.log(freedom / 2)
    beyond = centred.var(ddof=1) - special.polygamma(1, freedom / 2).mean()
    if beyond <= 1e-6:
        return SeedScatter(float((freedom * variances).sum() / pooled), pooled / 2, pooled)
    half = optimize.brentq(lambda x: special.polygamma(1, x) - beyond, 1e-8, 1e8)  # trigamma falls from inf to 0
    typical = np.exp(centred.mean() + special.digamma(half) - np.log(half))
    return SeedScatter(float(typical), float(min(half, pooled / 2)), pooled)


def _moderated(variance: float, freedom: int, scatter: SeedScatter | None, share: float = 1.0) -> tuple[float, float]:
    """A variance by seeds and its degrees of freedom, moderated by the scatter of further rows (Smyth 2004, Section 4).

    The mean of both variances, weighted by their degrees of freedom, has both; `share` of a further row's applies.
    """
    if scatter is None:
        return variance, float(freedom)
    weight = scatter.freedom / (scatter.freedom + freedom)
    total = min(freedom + scatter.freedom, scatter.pooled)
    return weight * share * scatter.variance + (1 - weight) * variance, max(float(freedom), total)


def _seeds_error(
    seed_means: np.ndarray, weights: np.ndarray, trained: int, scatter: SeedScatter | None
) -> tuple[float, float]:
    """Standard error by seeds of a weighted sum of R rows, and its degrees of freedom, from their seed means [R, S].

    Rows and seeds are a two-way layout: what is left of a mean without its row's and its seed's part is the noise, and
    all rows tell how large it is, (R - 1) (S - 1) times. Of two rows it is that of the paired t test. Where rows
    scatter unequally it is right on average over rows of equal weight, and the `scatter` of further rows moderates it.
    `trained` of the rows have seeds; the others, references, do not scatter.
    """
    rows, seeds = seed_means.shape
    if not (freedom := (rows - 1) * (seeds - 1)):
        return 0.0, 0
    left = seed_means - seed_means.mean(axis=1, keepdims=True) - seed_means.mean(axis=0) + seed_means.mean()
    variance, total = _moderated((left**2).sum() / freedom, freedom, scatter, trained / rows)
    return float(np.sqrt(variance * (weights**2).sum() / seeds)), total


def sign_flip_test(sums: np.ndarray, generator: np.random.Generator, resamples: int) -> float:
    """Two-sided p value of the identities' summed differences [K] when their signs are flipped at random (SciPy)."""

    def flipped(size: tuple[int, ...]) -> np.ndarray:
        return sums * (2 * generator.integers(0, 2, size, np.int8) - 1)

    batch = _batch(2 * len(sums))
    test = stats.monte_carlo_test(sums, flipped, np.sum, vectorized=True, n_resamples=resamples, batch=batch)
    return float(test.pvalue)


def _batch(size: int) -> int:
    return max(1, BATCH_ELEMENTS // size)


def _quantiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_effect_size(differences: np.ndarray) -> float:
    """Cohen's d of paired data: mean of differences [K] in units of their standard deviation; infinite if all
    are equal and not 0, 0 if all are 0."""
    mean = differences.mean()
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    if spread > 0:
        return float(mean / spread)
    return 0.0 if mean == 0 else float(np.copysign(np.inf, mean))


@dataclass(frozen=True)
class RowComparison:
    """Paired comparison of two rows of a study, each trained with several seeds, `first` minus `second`.

    Attributes:
        difference: mean over seeds and queries, with its interval over seeds and identities.
        p_value: two-sided, of the hypothesis that further seeds and identities do not differ on average; NaN with one
            seed, which says nothing about others.
        effect_size: Cohen's d of paired data over identities: mean of the identities' mean differences, averaged over
            seeds, in units of their standard deviation; 0 if all are 0, infinite if all are equal and not 0.
        seeds: number of seeds that were compared.
        identities: number of identities that were compared.
        queries: number of queries that were compared.
        means: the difference in bootstrap samples of the identities, averaged over seeds, [R].
        error: standard error of the difference by seeds; 0 with one seed.
        freedom: its degrees of freedom.
        permute: the permutation test behind `p_networks`.
    """

    difference: Interval
    p_value: float
    effect_size: float
    seeds: int
    identities: int
    queries: int
    means: np.ndarray = field(repr=False, compare=False)
    error: float
    freedom: float
    permute: Callable[[], float] = field(repr=False, compare=False)

    @cached_property
    def p_networks(self) -> float:
        """Two-sided, of the permutation test over identities for the networks that were trained; made on demand."""
        return self.permute()

    def interval(self, level: float) -> Interval:
        """The difference with its interval over seeds and identities at another confidence level."""
        return _interval_over_seeds(self.means, self.difference.estimate, self.error, self.freedom, level)

    def equivalence(self, margin: float) -> float:
        """The larger p value of two one-sided tests that the difference is at least `margin` in size (Schuirmann 1987).

        Below 5 % the 90 % interval lies within -margin and margin. NaN with one identity.
        """
        resamples = len(self.means)
        outside = (_share_above(side, self.error, self.freedom, margin) for side in (self.means, -self.means))
        return (max(outside) * resamples + 1) / (resamples + 1)


def compare_rows(
    first: np.ndarray,
    second: np.ndarray,
    identity: np.ndarray,
    generator: np.random.Generator,
    *,
    scatter: SeedScatter | None = None,
    resamples: int = RESAMPLES,
) -> RowComparison:
    """Compare two rows of a study, or means of rows, over training seeds and identities, on the same queries.

    Two null hypotheses are tested, and they are not the same.

    `p_value`: *the expected difference, over trainings with other seeds and over other identities, is zero.* It comes
    from the sampling distribution of `hierarchical_interval` for the differences (bootstrap over identities plus
    Student's t over seeds): twice its smaller share beyond zero, so that it is below 5 % just where the 95 %
    interval leaves zero out. Where seeds differ much it is the t test of the seeds'
    mean differences; where they differ little and are few it is conservative, as tests of the Behrens-Fisher kind
    are. With several rows on a side, all rows tell the seeds' error (`_seeds_error`), and with `scatter` all rows of
    the study do. A pure permutation of seeds could not reach 5 % with fewer than six.

    `p_networks`: *for each identity it does not matter which row gave which result*, of the networks that were
    trained: the signs of the identities' differences, averaged over seeds, are flipped. It knows nothing of seeds and
    rejects far too often when it is read as a statement on further trainings.

    Args:
        first: float [S, Q], one row's values, one line per seed; a query with NaN anywhere is left out. Or [R, S, Q],
            several rows, of which the mean is taken.
        second: the other's with the same seeds in the same order. Either may be [1, Q], for a reference without seeds
            such as zero-shot.
        identity: integers [Q].
        generator: source of the bootstrap, then of the permutations.
        scatter: of all rows of the study; None takes the seeds' error from these rows alone.
        resamples: bootstrap samples; five times as many permutations.

    Raises:
        ValueError: shapes do not fit, or no value is left.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (first, second)]
    sides = [side[None] if side.ndim == 2 else side for side in sides]
    if {side.ndim for side in sides} != {3} or len(seeds := {side.shape[1] for side in sides} - {1}) > 1:
        shapes = " and ".join(str(np.shape(side)) for side in (first, second))
        raise ValueError(f"Found rows of shapes {shapes}; expected [S, Q] or [R, S, Q] with the same seeds.")
    if sides[0].shape[2] != sides[1].shape[2]:
        raise ValueError(f"The rows answered {sides[0].shape[2]} and {sides[1].shape[2]} queries, not the same ones.")
    weights = np.concatenate([np.full(len(side), sign / len(side)) for side, sign in zip(sides, (1, -1))])
    shape = max(seeds, default=1), sides[0].shape[2]
    rows = np.concatenate([np.broadcast_to(side, (len(side), *shape)) for side in sides])
    differences = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    sums, counts = sums_by_identity(differences, identity)
    average = sums.mean(axis=0)
    means = resampled_means(average, counts, generator, resamples)
    trained = sum(len(side) for side in sides if side.shape[1] > 1)
    seed_means = rows[..., ~np.isnan(differences).any(axis=0)].mean(axis=2)
    error, freedom = _seeds_error(seed_means, weights, trained, scatter)
    estimate = float((sums.sum(axis=1) / counts.sum()).mean())
    above = _share_above(means, error, freedom)
    return RowComparison(
        difference=_interval_over_seeds(means, estimate, error, freedom, LEVEL),
        p_value=float(2 * min(above, 1 - above)) if len(sums) > 1 else np.nan,
        effect_size=paired_effect_size(average / counts),
        seeds=len(sums),
        identities=len(counts),
        queries=int(counts.sum()),
        means=means,
        error=error,
        freedom=freedom,
        permute=partial(sign_flip_test, average, generator, 5 * resamples),
    )


def _share_above(means: np.ndarray, error: float, freedom: float, bound: float = 0.0) -> float:
    """Share above a bound of `means` [R] plus the seeds' t, if they have an error; half of what lies on it counts."""
    beyond = means - bound
    return (stats.t.cdf(beyond / error, freedom) if error > 0 else (np.sign(beyond) + 1) / 2).mean()
