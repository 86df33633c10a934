import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmfa.training.optimizer import ivt_cosine, warmup_cosine

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
