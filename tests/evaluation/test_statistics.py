from itertools import product

import numpy as np
import pytest

from fmfa.evaluation.statistics import (
    bootstrap_interval,
    compare_rows,
    hierarchical_interval,
    holm,
    holm_levels,
    sign_flip_test,
)

# Limits are 4 standard errors of the simulated rate around what theory allows, so a right
# implementation practically never fails, and one that takes queries for independent does.


def compared(first, second, identity, rng, **options):
    """Two systems, float [Q] or [S, Q], compared as rows."""
    return compare_rows(np.atleast_2d(first), np.atleast_2d(second), identity, rng, **options)


def people(rng, identities, queries=8, spread=0.25):
    """Values of queries with mean 0.5; identities differ, and have unequal numbers of queries."""
    counts = rng.integers(queries // 2, queries * 2, identities)
    identity = np.repeat(rng.permutation(10 * identities)[:identities], counts)
    level = np.repeat(rng.uniform(0.5 - spread, 0.5 + spread, identities), counts)
    return level + rng.normal(0, 0.1, len(identity)), identity


def test_bootstrap_covers_the_truth_and_a_query_bootstrap_would_not():
    rng, runs = np.random.default_rng(0), 400
    covered = independent = 0
    for _ in range(runs):
        values, identity = people(rng, 60)
        found = bootstrap_interval(values, identity, rng, resamples=500)
        covered += found.low <= 0.5 <= found.high
        naive = bootstrap_interval(values, np.arange(len(values)), rng, resamples=500)
        independent += naive.low <= 0.5 <= naive.high
    assert 0.89 < covered / runs < 0.985
    assert independent / runs < 0.70


def test_bootstrap_agrees_with_the_closed_form_of_equal_clusters():
    rng = np.random.default_rng(1)
    level = rng.random(500)
    found = bootstrap_interval(np.repeat(level, 4), np.repeat(np.arange(500), 4), rng, resamples=5000)
    half = 1.96 * level.std() / np.sqrt(500)
    assert found.estimate == pytest.approx(level.mean())
    np.testing.assert_allclose([found.low, found.high], level.mean() + np.array([-half, half]), atol=half / 10)


def test_same_generator_same_interval_and_order_of_queries_does_not_matter():
    values, identity = people(np.random.default_rng(2), 30)
    first = bootstrap_interval(values, identity, np.random.default_rng(7))
    order = np.random.default_rng(3).permutation(len(values))
    again = bootstrap_interval(values[order], identity[order], np.random.default_rng(7))
    np.testing.assert_allclose([first.estimate, first.low, first.high], [again.estimate, again.low, again.high])
    assert bootstrap_interval(values, identity, np.random.default_rng(8)) != first


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("seed_spread", [0.01, 0.06])
def test_hierarchical_interval_covers_with_few_seeds(seeds, seed_spread):
    rng, runs = np.random.default_rng(5), 300
    covered = 0
    for _ in range(runs):
        values, identity = people(rng, 60)
        run_level = rng.normal(0, seed_spread, (seeds, 1))
        runs_values = values + run_level + rng.normal(0, 0.1, (seeds, len(values)))
        found = hierarchical_interval(runs_values, identity, rng, resamples=500)
        covered += found.low <= 0.5 <= found.high
    assert 0.89 < covered / runs <= 1.0


def test_hierarchical_interval_of_one_seed_is_that_of_identities():
    values, identity = people(np.random.default_rng(6), 40)
    one = hierarchical_interval(values[None], identity, np.random.default_rng(0))
    assert one == bootstrap_interval(values, identity, np.random.default_rng(0))
    spread = values + np.array([[-0.1], [0.0], [0.1]])
    wide = hierarchical_interval(spread, identity, np.random.default_rng(0))
    assert wide.estimate == pytest.approx(one.estimate)
    assert wide.high - wide.low > 2 * (one.high - one.low)


def test_permutation_test_keeps_its_level_and_query_permutation_would_not():
    rng, runs = np.random.default_rng(8), 300
    rejected = independent = 0
    for _ in range(runs):
        first, identity = people(rng, 40)
        _, position = np.unique(identity, return_inverse=True)
        second = first + rng.normal(0, 0.2, position.max() + 1)[position]  # differ by person, not on average
        rejected += compared(first, second, identity, rng, resamples=80).p_networks <= 0.05
        naive = compared(first, second, np.arange(len(first)), rng, resamples=80)
        independent += naive.p_networks <= 0.05
    assert 0.005 < rejected / runs < 0.11
    assert independent / runs > 0.25


def test_permutation_test_of_few_identities():
    # Four identities that all favour the first system: 2 of the 2^4 sign patterns are as extreme.
    first, identity = np.array([1.0, 1, 2, 1, 1]), np.array([1, 1, 2, 3, 4])
    found = compared(first, np.zeros(5), identity, np.random.default_rng(0))
    assert found.p_networks == pytest.approx(2 / 16, abs=0.02)
    assert (found.identities, found.queries) == (4, 5)
    assert found.difference.estimate == pytest.approx(1.2)
    assert found.effect_size == pytest.approx(1.25 / 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_flip_test_agrees_with_all_sign_patterns(seed):
    sums = np.random.default_rng(seed).normal(0.3, 1, 10)
    patterns = np.array(list(product((-1, 1), repeat=10)))
    exact = np.mean(np.abs(patterns @ sums) >= abs(sums.sum()) - 1e-9)
    assert sign_flip_test(sums, np.random.default_rng(0), 10_000) == pytest.approx(exact, abs=0.025)


def test_permutation_test_finds_a_difference_and_its_sign():
    rng = np.random.default_rng(9)
    values, identity = people(rng, 100)
    worse = values - 0.05 + rng.normal(0, 0.1, len(values))
    found = compared(worse, values, identity, rng)
    assert found.p_networks < 0.001
    assert found.difference.low < -0.05 < found.difference.high < 0
    assert found.effect_size < -0.5
    same = compared(values, values, identity, rng)
    assert (same.p_networks, same.effect_size, same.difference.estimate) == (1, 0, 0)
    seeds = compared(np.stack([worse, values]), values, identity, rng)
    assert seeds.difference.estimate == pytest.approx(found.difference.estimate / 2)


def test_unanswered_queries_are_left_out():
    values, identity = np.array([1.0, np.nan, 0.0, 1.0]), np.array([1, 1, 2, 3])
    assert bootstrap_interval(values, identity, np.random.default_rng(0)).estimate == pytest.approx(2 / 3)
    both = compared(values, np.array([0, 0, np.nan, 0.0]), identity, np.random.default_rng(0))
    assert both.queries == 2
    single = bootstrap_interval(np.array([1.0, 0.0]), np.array([4, 4]), np.random.default_rng(0))
    assert single.estimate == 0.5
    assert np.isnan([single.low, single.high]).all()


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert holm([]).shape == (0,)


def test_bad_input_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="one identity per query"):
        bootstrap_interval(np.ones(3), np.ones(4), rng)
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_interval(np.full(3, np.nan), np.ones(3), rng)
    with pytest.raises(ValueError, match="answered 3 and 4 queries"):
        compared(np.ones(3), np.ones(4), np.ones(3), rng)


def test_levels_of_holm_by_hand():
    # 0.001 <= 0.05 / 4 is rejected, 0.02 > 0.05 / 3 is not: it and all further ones keep that level.
    np.testing.assert_allclose(
        holm_levels([0.5, 0.001, 0.03, 0.02]), 1 - np.array([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    )
    np.testing.assert_allclose(holm_levels([0.01, 0.02]), [1 - 0.05 / 2, 1 - 0.05])
    assert holm_levels([]).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_at_its_level_of_holm_agrees_with_the_test(seed):
    rng = np.random.default_rng(seed)
    p_values = rng.choice([0, 0.01, 0.0125, 0.05 / 3, 0.025, 0.05, *rng.random(9) / 8], rng.integers(1, 13))
    within = np.array(p_values) <= 1 - holm_levels(p_values)
    corrected = holm(p_values)
    clear = ~np.isclose(corrected, 0.05, rtol=1e-9)  # at the very edge rounding decides
    assert (within == (corrected <= 0.05))[clear].all()


def test_a_comparison_has_intervals_at_every_level():
    rng = np.random.default_rng(0)
    first, second = rng.random((4, 60)) + 0.1, rng.random((4, 60))
    found = compare_rows(first, second, np.arange(60) // 3, rng)
    assert found.interval(0.95) == found.difference
    edge = found.interval(1 - found.p_value)
    assert min(abs(edge.low), abs(edge.high)) == pytest.approx(0, abs=1e-9)
    assert found.interval(0.99).low < found.difference.low < found.difference.high < found.interval(0.99).high
