"""Two rows over seeds and identities: false positives, power, and the components of variance."""

from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.power import TTestPower

from fmfa.evaluation.power import Components, power, seeds_needed, smallest_difference, variance_components
from fmfa.evaluation.statistics import SeedScatter, compare_rows, hierarchical_interval, seed_scatter

# Limits of simulated rates are 4 standard errors around what is claimed.
PEOPLE, QUERIES, RUNS = 30, 3, 200
IDENTITY = np.repeat(np.arange(PEOPLE), QUERIES)
SEEDS_MATTER = Components(seed=0.02, identity=0.05, query=0.02, seed_identity=0.02, seed_query=0.1)
SEEDS_DO_NOT = Components(seed=0.0, identity=0.05, query=0.02, seed_identity=0.02, seed_query=0.1)


def differences(rng, components, seeds, mean=0.0, identity=IDENTITY):
    """Paired differences [S, Q] drawn from the model that `Components` describes."""
    people = identity.max() + 1
    person = rng.normal(0, components.identity**0.5, people)
    person = person + rng.normal(0, components.seed_identity**0.5, (seeds, people))
    values = mean + rng.normal(0, components.seed**0.5, (seeds, 1)) + person[:, identity]
    values = values + rng.normal(0, components.query**0.5, len(identity))
    return values + rng.normal(0, components.seed_query**0.5, values.shape)


def rejections(components, seeds, mean=0.0):
    """Shares of simulated studies that call the difference significant: over seeds, and for these networks."""
    rng, nothing = np.random.default_rng(seeds), np.zeros((1, len(IDENTITY)))
    found = [compare_rows(differences(rng, components, seeds, mean), nothing, IDENTITY, rng, resamples=200)
             for _ in range(RUNS)]  # fmt: skip
    return np.mean([[f.p_value <= 0.05, f.p_networks <= 0.05] for f in found], axis=0)


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_with_seed_effects(seeds):
    over_seeds, networks = rejections(SEEDS_MATTER, seeds)
    assert 0.005 < over_seeds < 0.112
    assert networks > 0.2  # what ignoring the seeds would claim


def test_without_seed_effects_the_test_keeps_its_level():
    over_seeds, networks = rejections(SEEDS_DO_NOT, 3)
    assert over_seeds < 0.112
    assert networks < 0.2


@pytest.mark.parametrize("spreads", [(0.14, 0.14, 0.14, 0.14), (0.05, 0.2, 0.2, 0.05), (0.05, 0.05, 0.05, 0.26)])
def test_a_main_effect_keeps_its_level_where_rows_scatter_unequally(spreads):
    rng, found = np.random.default_rng(4), []
    noise = Components(seed=0, identity=0.05, query=0.02, seed_identity=0.02, seed_query=0.1)
    for _ in range(RUNS):
        shared = rng.normal(0, 0.2, (3, 1))  # what a seed does to all rows alike
        rows = [differences(rng, noise, 3) + shared + rng.normal(0, spread, (3, 1)) for spread in spreads]
        found.append(compare_rows(np.stack(rows[:2]), np.stack(rows[2:]), IDENTITY, rng, resamples=200).p_value <= 0.05)
    assert 0.005 < np.mean(found) < 0.112


def test_the_error_of_a_main_effect_is_that_of_the_two_way_layout():
    values = np.random.default_rng(0).normal(0, 1, (4, 5, 1))  # rows, seeds and one query
    found = compare_rows(values[:3], values[3:], np.zeros(1), np.random.default_rng(0))
    table = pd.DataFrame(
        [(row, seed, values[row, seed, 0]) for row in range(4) for seed in range(5)], columns=list("rsy")
    )
    fitted = ols("y ~ C(r) - 1 + C(s)", table).fit()
    tested = fitted.t_test(np.array([1 / 3, 1 / 3, 1 / 3, -1, *[0] * (len(fitted.params) - 4)]))
    assert (found.error, found.freedom) == (pytest.approx(float(tested.sd.squeeze())), fitted.df_resid)
    pair = compare_rows(values[0], values[1], np.zeros(1), np.random.default_rng(0))
    assert pair.error == pytest.approx((values[0] - values[1]).std(ddof=1) / 5**0.5)
    assert pair.freedom == 4


@pytest.mark.parametrize(("freedom", "seeds"), [(3.0, 5), (8.0, 3), (2.0, 2)])
def test_the_scatter_of_rows_is_found_again(freedom, seeds):
    rng = np.random.default_rng(0)
    spreads = np.sqrt(0.25 * freedom / rng.chisquare(freedom, 20_000))
    found = seed_scatter(list(rng.normal(7, 1, (20_000, 1)) + rng.normal(0, 1, (20_000, seeds)) * spreads[:, None]))
    assert found.variance == pytest.approx(0.25, rel=0.05)
    assert found.freedom == pytest.approx(freedom / 2, rel=0.1)
    assert found.pooled == 20_000 * (seeds - 1)


def test_rows_that_scatter_alike_share_one_variance():
    means = [np.array([1.0, 3.0, 2.0]), np.array([5.0, 6.0, 4.0]), np.array([9.0, 7.0, 8.0, 8.0]), np.array([1.0])]
    found = seed_scatter([*means, np.array([4.0, 4.0])])  # one seed, and no scatter, say nothing
    assert (found.freedom, found.pooled) == (3.5, 7)
    assert found.variance == pytest.approx((2 * 1 + 2 * 1 + 3 * (2 / 3)) / 7)
    assert seed_scatter(means[1:3]) is None


def test_the_moderated_error_is_the_mean_of_both_variances():
    values = np.random.default_rng(0).normal(0, 1, (2, 3, 1))
    sides, nothing = (values[0], values[1], np.zeros(1)), np.zeros((1, 1))
    own = (values[0] - values[1]).var(ddof=1) / 2
    for scatter, variance, freedom in (
        (SeedScatter(0.5, 4.0, 30), (4 * 0.5 + 2 * own) / 6, 6),
        (SeedScatter(0.5, 4.0, 5), (4 * 0.5 + 2 * own) / 6, 5),  # no more than all rows have together
    ):
        found = compare_rows(*sides, np.random.default_rng(0), scatter=scatter)
        assert (found.error, found.freedom) == (pytest.approx((2 * variance / 3) ** 0.5), freedom)
    one = compare_rows(values[0], nothing, np.zeros(1), np.random.default_rng(0), scatter=SeedScatter(0.5, 2.0, 30))
    assert one.error == pytest.approx(((0.5 + values[0].var(ddof=1)) / 2 / 3) ** 0.5)  # a reference does not scatter


@pytest.mark.parametrize("freedom", [1.5, 4.0, 1e9])
def test_moderated_comparisons_keep_their_level_and_see_more(freedom):
    rng, rejected, seen = np.random.default_rng(5), [], []
    noise = Components(seed=0, identity=0.01, query=0.02, seed_identity=0.02, seed_query=0.1)
    for _ in range(RUNS // 4):
        spreads = 0.2 * np.sqrt(freedom / rng.chisquare(freedom, 12))
        rows = [differences(rng, noise, 2) + rng.normal(0, spread, (2, 1)) for spread in spreads]
        scatter = seed_scatter([row.mean(axis=1) for row in rows])
        for first, second in zip(rows[::2], rows[1::2]):
            shifted, options = first + 0.6, {"resamples": 100}
            moderated = compare_rows(first, second, IDENTITY, rng, scatter=scatter, **options)
            rejected.append(moderated.p_value <= 0.05)
            seen.append([compare_rows(shifted, second, IDENTITY, rng, scatter=one, **options).p_value <= 0.05
                         for one in (scatter, None)])  # fmt: skip
    assert np.mean(rejected) < 0.07 + 4 * (0.07 * 0.93 / len(rejected)) ** 0.5
    more, alone = np.mean(seen, axis=0)
    assert more > alone


@pytest.mark.parametrize(("components", "seeds"), [(SEEDS_MATTER, 3), (SEEDS_MATTER, 5), (SEEDS_DO_NOT, 4)])
def test_predicted_power_is_the_real_one(components, seeds):
    seen = smallest_difference(components, seeds, PEOPLE, QUERIES)
    assert power(seen, components, seeds, PEOPLE, QUERIES) == pytest.approx(0.8, abs=1e-4)
    over_seeds, _ = rejections(components, seeds, seen)
    assert 0.68 < over_seeds < 0.92


def test_power_over_seeds_alone_is_that_of_the_t_test():
    only_seeds = Components(seed=4.0, identity=0, query=0, seed_identity=0, seed_query=0)
    for seeds, difference in ((3, 5.0), (6, 3.0), (20, 1.0)):
        expected = TTestPower().power(difference / 2, seeds, 0.05)
        assert power(difference, only_seeds, seeds, 100, 8) == pytest.approx(expected, abs=2e-4)
    assert power(0, only_seeds, 5, 100, 8) == pytest.approx(0.05, abs=1e-4)


def test_more_seeds_and_more_people_see_more():
    found = np.array([[smallest_difference(SEEDS_MATTER, s, i, 8) for i in (50, 200, 1000)] for s in (3, 5, 20)])
    assert (np.diff(found, axis=0) < 0).all()
    assert (np.diff(found, axis=1) < 0).all()
    needed = seeds_needed(0.1, SEEDS_MATTER, 1000, 8)
    assert smallest_difference(SEEDS_MATTER, needed, 1000, 8) <= 0.1
    assert smallest_difference(SEEDS_MATTER, needed - 1, 1000, 8) > 0.1
    assert seeds_needed(0.001, SEEDS_MATTER, 100, 8) is None  # too few people, whatever the seeds
    with pytest.raises(ValueError, match="expected 2 or more"):
        power(1, SEEDS_MATTER, 1, 100, 8)


def test_components_are_found_again_with_unequal_numbers_of_queries():
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(60), rng.integers(1, 7, 60))
    true = Components(seed=0.3, identity=0.2, query=0.1, seed_identity=0.15, seed_query=0.4)
    found = np.array([list(vars(variance_components(differences(rng, true, 4, identity=identity), identity)).values())
                      for _ in range(300)])  # fmt: skip
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - list(vars(true).values())) < 4 * error + 0.003).all()


def test_components_of_a_case_by_hand():
    # Seeds at +1 and -1 and nothing else: all variance is the seeds', (1 - -1)^2 / 2.
    values = np.array([[1.0] * 6, [-1.0] * 6])
    assert variance_components(values, np.array([0, 0, 1, 1, 2, 2])) == Components(2, 0, 0, 0, 0)
    # Persons at -1, 0 and 1 under both seeds; a query that was not answered changes nothing.
    values = np.array([[-1.0, -1, 0, 0, 1, 1, np.nan]] * 2)
    assert variance_components(values, np.array([0, 0, 1, 1, 2, 2, 2])) == Components(0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="1 seeds and 2 identities"):
        variance_components(np.ones((1, 2)), np.array([0, 1]))


def test_a_comparison_of_rows_is_the_interval_and_the_test_of_its_parts():
    rng = np.random.default_rng(1)
    first, second = (differences(rng, SEEDS_MATTER, 3, mean) for mean in (0.3, 0.0))
    found = compare_rows(first, second, IDENTITY, np.random.default_rng(7))
    expected = hierarchical_interval(first - second, IDENTITY, np.random.default_rng(7))
    assert astuple(found.difference) == pytest.approx(astuple(expected))
    networks = compare_rows(first.mean(0)[None], second.mean(0)[None], IDENTITY, np.random.default_rng(7))
    assert found.effect_size == pytest.approx(networks.effect_size)
    assert found.p_networks == pytest.approx(networks.p_networks, abs=0.01)
    assert (found.seeds, found.identities, found.queries) == (3, PEOPLE, PEOPLE * QUERIES)
    turned = compare_rows(second, first, IDENTITY, np.random.default_rng(7))
    assert turned.difference.estimate == -found.difference.estimate
    assert turned.p_value == pytest.approx(found.p_value, abs=1e-9)
    low, high = found.difference.low, found.difference.high
    at_the_end = compare_rows(first - (low if low > 0 else high), second, IDENTITY, np.random.default_rng(7))
    assert at_the_end.p_value == pytest.approx(0.05, abs=0.02)


def test_rows_that_are_equal_and_rows_with_one_seed():
    values = differences(np.random.default_rng(2), SEEDS_MATTER, 3)
    same = compare_rows(values, values, IDENTITY, np.random.default_rng(0))
    assert (same.p_value, same.p_networks, same.difference.estimate, same.effect_size) == (1, 1, 0, 0)
    one = compare_rows(values[:1] + 1, values[:1], IDENTITY, np.random.default_rng(0))
    assert np.isnan(one.p_value)
    assert one.p_networks < 0.001
    reference = compare_rows(values[:1], values, IDENTITY, np.random.default_rng(0))
    assert reference.seeds == 3


def test_rows_of_different_shapes_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="with the same seeds"):
        compare_rows(np.ones((2, 4)), np.ones((3, 4)), np.arange(4), rng)
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(2, 4\); expected"):
        compare_rows(np.ones(4), np.ones((2, 4)), np.arange(4), rng)
    with pytest.raises(ValueError, match="answered 4 and 5 queries"):
        compare_rows(np.ones((2, 4)), np.ones((2, 5)), np.arange(4), rng)
