"""Two rows of a study, each trained with several seeds, compared over seeds and identities."""

from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from fmfa.evaluation.statistics import (
    Interval,
    interval_over_seeds,
    paired_effect_size,
    resampled_means,
    sign_flip_test,
    sums_by_identity,
)


@dataclass(frozen=True)
class RowComparison:
    """Paired comparison of two rows of a study, each trained with several seeds, `first` minus `second`.

    Attributes:
        difference: mean over seeds and queries, with its interval over seeds and identities.
        p_value: two-sided, of the hypothesis that further seeds and identities do not differ on average; NaN with one
            seed, which says nothing about others.
        p_networks: two-sided, of the permutation test over identities for the networks that were trained.
        effect_size: Cohen's d of paired data over identities: mean of the identities' mean differences, averaged over
            seeds, in units of their standard deviation; 0 if all are 0, infinite if all are equal and not 0.
        seeds: number of seeds that were compared.
        identities: number of identities that were compared.
        queries: number of queries that were compared.
        means: the difference in bootstrap samples of the identities, averaged over seeds, [R].
        seed_means: the difference of each seed, [S].
    """

    difference: Interval
    p_value: float
    p_networks: float
    effect_size: float
    seeds: int
    identities: int
    queries: int
    means: np.ndarray = field(repr=False, compare=False)
    seed_means: np.ndarray = field(repr=False, compare=False)

    def interval(self, level: float) -> Interval:
        """The difference with its interval over seeds and identities at another confidence level."""
        return interval_over_seeds(self.means, self.seed_means, level)


def compare_rows(
    first: np.ndarray,
    second: np.ndarray,
    identity: np.ndarray,
    generator: np.random.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> RowComparison:
    """Compare two rows of a study over training seeds and identities, on the same queries.

    Two null hypotheses are tested, and they are not the same.

    `p_value`: *the expected difference, over trainings with other seeds and over other identities, is zero.* It comes
    from the sampling distribution of `hierarchical_interval` for the differences (bootstrap over identities plus
    Student's t over seeds): twice its smaller share beyond zero, so that it is below 1 - `level` just where the
    interval leaves zero out. Where seeds differ much it is the t test of the seeds'
    mean differences; where they differ little and are few it is conservative, as tests of the Behrens-Fisher kind
    are. A pure permutation of seeds could not reach 5 % with fewer than six.

    `p_networks`: *for each identity it does not matter which row gave which result*, of the networks that were
    trained: the signs of the identities' differences, averaged over seeds, are flipped. It knows nothing of seeds and
    rejects far too often when it is read as a statement on further trainings.

    Args:
        first: float [S, Q], one row's values, a line a seed; a query with NaN anywhere is left out.
        second: float [S, Q], the other's with the same seeds in the same order. Either may be [1, Q], for a reference
            without seeds such as zero-shot.
        identity: integers [Q].
        generator: source of the bootstrap, then of the permutations.
        resamples: bootstrap samples; five times as many permutations.
        level: confidence level of the difference's interval.

    Raises:
        ValueError: shapes do not fit, or no value is left.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (first, second))
    if first.ndim != 2 or second.ndim != 2 or len({len(first), len(second)} - {1}) > 1:
        raise ValueError(f"Found rows of shapes {first.shape} and {second.shape}; expected [S, Q] with the same seeds.")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"The rows answered {first.shape[1]} and {second.shape[1]} queries, not the same ones.")
    sums, counts = sums_by_identity(first - second, identity)
    seed_means, average = sums.sum(axis=1) / counts.sum(), sums.mean(axis=0)
    means = resampled_means(average, counts, generator, resamples)
    return RowComparison(
        difference=interval_over_seeds(means, seed_means, level),
        p_value=_p_over_seeds(means, seed_means),
        p_networks=sign_flip_test(average, generator, 5 * resamples),
        effect_size=paired_effect_size(average / counts),
        seeds=len(sums),
        identities=len(counts),
        queries=int(counts.sum()),
        means=means,
        seed_means=seed_means,
    )


def _p_over_seeds(means: np.ndarray, seed_means: np.ndarray) -> float:
    """Twice the smaller share beyond zero of `means` plus the seeds' t, whose share is taken in closed form."""
    if len(seed_means) == 1:
        return np.nan
    error = stats.sem(seed_means)
    above = stats.t.cdf(means / error, len(seed_means) - 1) if error > 0 else (np.sign(means) + 1) / 2
    return float(2 * min(above.mean(), 1 - above.mean()))
