"""Where notebooks and trainings work; and, where there is a GPU, that it computes what the CPU computes."""

import numpy as np
import pandas as pd
import pytest
import torch

from fmfa.analysis.counterfactual import measure_counterfactual
from fmfa.analysis.grounding import measure_grounding
from fmfa.benchmark import PARTS, gallery_costs, step, training
from fmfa.devices import choose_device, repeatable
from fmfa.errors import ConfigError
from fmfa.records import read_metrics
from fmfa.systems import TINY_IVT_WEIGHTS as TINY_IVT
from fmfa.systems import build_system, load_start, load_system, run_training
from fmfa.training.batches import TableBatches
from fmfa.training.config import TrainConfig

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU; no GPU here")


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto").type == expected
        assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="'cuda', but torch sees no GPU"):
        choose_device("cuda")
    with pytest.raises(ConfigError, match="device is 'gpu'; expected one of auto, cpu, cuda"):
        choose_device("gpu")


def test_what_is_reopened_goes_to_the_device_that_is_asked_for(tiny, tmp_path, monkeypatch):
    config = TrainConfig(method="clip", root=str(tiny.images.parent), epochs=1, batch_size=96, device="cpu")
    run = run_training(config, tmp_path / "clip-0")
    monkeypatch.setattr("fmfa.systems.choose_device", lambda name: torch.device({"auto": "meta"}.get(name, name)))
    for name, expected in (("cpu", "cpu"), ("auto", "meta")):
        for system in (load_system(run, name), load_start(run, tiny, name)):
            assert {p.device.type for p in system.model.parameters()} == {expected}


@NEEDS_GPU
@pytest.mark.parametrize("method", ["clip", "irra", "fmfa", "ivt"])
def test_losses_and_gradients_of_a_gpu_are_those_of_the_cpu(tiny, method):
    config = TrainConfig(method=method, root=str(tiny.images.parent), batch_size=48).resolved()
    found = {}
    for device in ("cpu", "cuda"):
        system = build_system(config, tiny)
        model = system.model.to(choose_device(device)).eval()  # without dropout, which each device draws its own way
        masked = getattr(getattr(model, "objectives", None), "needs_mask", False)
        batch = next(iter(TableBatches(config, tiny, system.tokenizer, masked=masked).read(0, 0)))
        losses = model({name: value.to(device) for name, value in batch.items()}).losses
        sum(losses.values()).backward()
        norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        found[device] = {n: value.item() for n, value in losses.items()}, norms
    for here, there in zip(*found.values(), strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-5)


@NEEDS_GPU
@pytest.mark.parametrize("source", ["", TINY_IVT])
def test_measurements_of_a_gpu_are_those_of_the_cpu(tiny, source):
    found = {}
    for device in ("cpu", "cuda"):
        system = load_system(source, device)
        evaluation = system.evaluate(tiny, "test", progress=False)
        tables = measure_grounding(system, tiny, "test", 60), measure_counterfactual(system, tiny, "test", 40)
        found[device] = evaluation, tables
    (here, tables), (there, others) = found.values()
    for side in ("text_features", "image_features"):
        torch.testing.assert_close(getattr(there, side), getattr(here, side), rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(there.table(), here.table(), rtol=0.02)
    for other, table in zip(others, tables, strict=True):
        numbers = table.select_dtypes("number").columns
        assert np.allclose(other[numbers], table[numbers], atol=0.05, equal_nan=True)


def test_only_a_training_on_a_gpu_is_held_to_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    for device, expected in (("cuda", True), ("cpu", False)):
        with repeatable(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() is expected
            assert torch.utils.deterministic.fill_uninitialized_memory is not expected
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory


@NEEDS_GPU
@pytest.mark.parametrize("method", ["clip", "irra", "fmfa", "ivt"])
def test_a_training_on_a_gpu_comes_out_the_same_twice(tiny, method, tmp_path):
    values = {"method": method, "root": str(tiny.images.parent), "epochs": 2, "batch_size": 48, "device": "cuda"}
    found = []
    for name in ("once", "twice"):
        metrics = read_metrics(run_training(TrainConfig(**values), tmp_path / name))
        found.append(metrics.loc[metrics["metric"] != "seconds", "value"].to_numpy())
    np.testing.assert_array_equal(*found)


def test_the_benchmark_steps_the_papers_network(tmp_path):
    found = {}
    for folder in ("", str(tmp_path)):
        _, model, batches = training("clip", folder)
        batch = next(iter(batches.read(0, 0)))
        found[folder] = sum(p.numel() for p in model.parameters()), tuple(batch["images"].shape)
    assert [size for _, size in found.values()] == [(64, 3, 96, 32), (64, 3, 384, 128)]
    assert found[str(tmp_path)][0] > 140e6 > 10e6 > found[""][0]


@pytest.mark.parametrize("method", ["fmfa", "ivt"])
def test_the_benchmark_takes_whole_steps_and_those_of_the_released_arithmetic(method):
    values = step(method, 1, batch_size=8)
    assert sum(values[part] for part in PARTS) == pytest.approx(values["seconds"])
    assert values["ratio"] == values["seconds"] / values["plain_seconds"] > 0
    assert values["MFLOP"] > 100


def test_the_benchmark_of_a_gallery_tells_elapsed_and_core_time(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr("fmfa.benchmark.open_dataset", lambda _: tiny)
    table = gallery_costs(300, 96, tmp_path).set_index("figure")
    assert {f"exact, {what}" for what in ("elapsed, median", "core time, mean")} < set(table.index)
    assert table.loc["approximate, recall@10", "value"] == 1  # so small a gallery is searched exactly
    assert (table["value"] >= 0).all()
    assert table["pictures"].eq(300).all()
