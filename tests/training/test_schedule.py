import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_training import toy_config

from fmfa.training.optimizer import ivt_cosine, learning_rate, warmup_cosine, warmup_linear

TABLES = json.loads((Path(__file__).parents[1] / "fixtures" / "schedules.json").read_text())


def test_warmup_cosine_has_the_released_sequence():
    table = TABLES["cosine_60"]
    rates = [table["base"] * warmup_cosine(epoch, epochs=60) for epoch in range(60)]
    np.testing.assert_allclose(rates, table["rates"], rtol=1e-9)


@pytest.mark.parametrize(("group", "factor"), [("weight_group", 1), ("bias_group", 2)])
def test_ivt_cosine_has_the_released_sequence_in_both_groups(group, factor):
    table = TABLES["ivt"]
    rates = [ivt_cosine(epoch, base=factor * table["base_lr"]) for epoch in range(121)]
    np.testing.assert_allclose(rates, table[group], rtol=1e-9)


def test_the_ivt_bias_group_is_not_twice_the_weight_group():
    weights, biases = ivt_cosine(3, base=0.005), ivt_cosine(3, base=0.01)
    assert biases < 2 * weights
    assert ivt_cosine(500, base=0.005) == 1e-5


@given(epochs=st.integers(1, 200), warmup=st.integers(0, 20), start=st.floats(0.001, 1))
def test_warmup_cosine_rises_then_falls_within_its_bounds(epochs, warmup, start):
    factors = [warmup_cosine(e, epochs=epochs, warmup_epochs=warmup, warmup_factor=start) for e in range(epochs + 3)]
    assert all(-1e-12 <= f <= 1 + 1e-12 for f in factors)
    assert np.all(np.diff(factors[: warmup + 1]) >= -1e-12)
    assert np.all(np.diff(factors[warmup:]) <= 1e-12)
    if warmup < epochs:
        assert factors[warmup] == pytest.approx(1)
        assert factors[epochs] == pytest.approx(0)


def test_the_linear_schedule_by_hand():
    times = [0, 0.1, 0.2, 0.6, 0.95]
    factors = [warmup_linear(time, epochs=1, warmup_epochs=0.2, warmup_factor=0.1) for time in times]
    assert factors == pytest.approx([0.1, 0.55, 1, 0.5, 0.0625])
    assert warmup_linear(0, epochs=2, warmup_epochs=0, warmup_factor=0.1) == 1
    assert warmup_linear(0.5, epochs=1, warmup_epochs=2, warmup_factor=0.2) == pytest.approx(0.4)  # never gets there


def test_linear_changes_within_an_epoch_and_the_others_between_epochs():
    times = [0, 0.25, 0.5, 0.75, 1, 1.25]
    for schedule in ("linear", "warmup_cosine", "ivt", "ivt_from_1", "constant"):
        config = toy_config(schedule=schedule, epochs=2, warmup_epochs=1, learning_rate=0.01).resolved()
        rates = [learning_rate(config, time, 2.0) for time in times]
        if schedule == "linear":
            assert rates == pytest.approx([0.02 * factor for factor in (0.1, 0.325, 0.55, 0.775, 1, 0.75)])
        else:
            assert len(set(rates[:4])) == len(set(rates[4:])) == 1, schedule
