"""What several test modules share: examples drawn alike everywhere, a small SimPEDES, the shipped CLIP."""

import pytest
from hypothesis import HealthCheck, settings

from fmfa.data.annotations import read_dataset
from fmfa.simpedes.generate import generate, recipe
from fmfa.systems import load_system

# never judged by the clock of a busy machine
settings.register_profile("fmfa", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fmfa")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny SimPEDES as a data set."""
    root = generate(tmp_path_factory.mktemp("simpedes"), recipe("tiny"), workers=1, progress=False)
    return read_dataset(root, "SimPEDES")


@pytest.fixture(scope="module")
def shipped():
    """The shipped tiny CLIP."""
    return load_system()
