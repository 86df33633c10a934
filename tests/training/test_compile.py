import os
import shutil

import numpy as np
import pytest
import torch
from toy_training import ToyModel, toy_fit

from fmfa.errors import ConfigError
from fmfa.records import read_metrics
from fmfa.training.config import TrainConfig
from fmfa.training.fit import build_accelerator

NEEDS_COMPILER = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on a CPU; none here"
)


@NEEDS_COMPILER
def test_a_compiled_training_ends_with_the_same_weights_up_to_rounding(tmp_path, monkeypatch):
    plain_compile, compiled_models = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: compiled_models.append(model) or plain_compile(model))
    changes = {"epochs": 1, "log_gradients_every": 3}
    found = [toy_fit(tmp_path / str(c), ToyModel(dropout=0.0), compile=c, **changes) for c in (False, True)]
    assert len(compiled_models) == 1
    for (name, plain), compiled in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6, msg=name)
    tables = [read_metrics(tmp_path / str(c)).query("metric != 'seconds'") for c in (False, True)]
    np.testing.assert_allclose(tables[1]["value"], tables[0]["value"], rtol=1e-4, atol=1e-6)
    assert (tables[1].query("split == 'gradient'")["value"] > 0).any()


def test_a_machine_without_a_compiler_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile is true, but there is no C\+\+ compiler"):
        build_accelerator(TrainConfig(device="cpu", compile=True), tmp_path)
