"""Hyper-parameter curves and grids of a results folder."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from evaluations import evaluate

from fmfa.evaluation.statistics import further_run
from fmfa.models.objectives import objectives
from fmfa.notebook import resolve_parameters
from fmfa.plots.comparison import plot_grid, plot_sensitivity
from fmfa.study.claims import claims_table
from fmfa.study.curves import grid_table, own_value, sensitivity_table
from fmfa.study.definition import read_study, study_rows
from fmfa.study.levels import run_results
from fmfa.study.results import METRICS, export_results, read_results, read_runs
from fmfa.train import config_parameters
from fmfa.training.config import TrainConfig

DEFINITION = yaml.safe_load((Path(__file__).parents[2] / "study.yml").read_text())
PEOPLE = 30
RANDOM = "stability-random_alpha=1_rate=0.0003-0"  # from random weights


def write_run(results, name, share, validation=(), **config):
    """A run whose first queries are hits: `share` of four queries a person."""
    folder = results / name
    folder.mkdir(parents=True)
    config = TrainConfig(**config).resolved().to_dict()
    (folder / "run.json").write_text(json.dumps({"config": config, "seed": config["seed"], "status": "finished"}))
    hits = (np.arange(4 * PEOPLE) % 4 < 4 * share) * 1.0
    table = pd.DataFrame({"identity": np.repeat(np.arange(PEOPLE), 4), "image": "", "first_rank": 1})
    evaluate(folder, {"queries-test": table.assign(**dict.fromkeys(METRICS, hits))})
    lines = [f"{name},val,{epoch},{epoch},R@1,{value}" for epoch, value in enumerate(validation)]
    (folder / "metrics.csv").write_text("\n".join(["run,split,epoch,step,metric,value", *lines, ""]))
    return folder


@pytest.fixture
def results(tmp_path):
    for seed, share in enumerate((0.5, 0.75, 0.5)):
        write_run(tmp_path, f"fmfa-{seed}", share, method="fmfa", seed=seed)
    write_run(tmp_path, "alpha=0.3-0", 0.25, method="fmfa", objectives="asdm_alpha=0.3")
    write_run(tmp_path, "alpha=10-0", 0.25, method="fmfa", objectives="asdm_alpha=10")
    write_run(tmp_path, "alpha=10-1", 0.75, method="fmfa", objectives="asdm_alpha=10", seed=1)
    write_run(tmp_path, "mask-rate=0.3-0", 0.5, method="irra", mask_rate=0.3)
    grid = {"method": "fmfa", "objectives": "asdm_alpha=3"}
    write_run(tmp_path, "stability_alpha=3_rate=0.0001-0", 0.5, (0.4, 0.6, 0.2), **grid, learning_rate=1e-4)
    write_run(tmp_path, "stability_alpha=3_rate=0.0001-1", 1.0, (0.4, 0.4, 0.4), **grid, learning_rate=1e-4, seed=1)
    return tmp_path


def test_rows_and_points_are_those_of_the_study(results):
    known = study_rows()
    for run in read_runs(results).itertuples():
        row = known[run.row]
        assert (run.curve, run.point) == (row.group if row.point else "", row.point)
    points = read_runs(results).set_index("run")["point"]
    assert points["alpha=0.3-0"] == {"alpha": 0.3}
    assert points["stability_alpha=3_rate=0.0001-1"] == {"alpha": 3, "rate": 0.0001}
    record = json.loads((results / "fmfa-0/run.json").read_text())
    for run, seed, row in (("fmfa-3", 7, "fmfa"), ("mine-12", 12, "mine")):  # the seed is the record's
        (results / run).mkdir()
        (results / run / "run.json").write_text(json.dumps(record | {"seed": seed}))
        line = read_runs(results).set_index("run").loc[run]
        assert (line["row"], line["seed"]) == (row, seed)


def test_every_curve_of_the_study_knows_its_systems_own_value():
    found, rows = {}, study_rows()
    for run in read_study(DEFINITION | {"scale": "standard", "chosen": "all", "seeds": 1}).runs:
        row = rows[run.row]
        if len(row.point) == 1:
            config = TrainConfig(**resolve_parameters(config_parameters(), run.parameters)).resolved()
            own = own_value(config.to_dict(), *row.point.values())
            if not np.isnan(own):  # the tuning's curves have a point at the system's own rate
                found.setdefault(row.group, set()).add(own)
    fmfa = asdict(objectives("fmfa", dataset="SimPEDES-street"))
    names = {"alpha": "asdm_alpha", "sigma": "efa_sigma", "lambda": "efa_lambda", "efa-weight": "efa",
             "asdm-weight": "asdm"}  # fmt: skip
    expected = {curve: {fmfa[name]} for curve, name in names.items()} | {"mask-rate": {0.15}, "bmm-rate": {0.2}}
    assert {curve: own for curve, own in found.items() if not curve.endswith("-rate") or curve in expected} == expected
    assert {curve for curve in found if curve.endswith("-rate")} >= {"clip-rate", "irra-rate", "fmfa-rate", "ivt-rate"}


def test_a_curve_has_its_points_and_its_systems_own_row(results):
    table = sensitivity_table(read_results(results))
    columns = ["curve", "row", "value", "own", "seeds", "estimate"]
    assert table[columns].to_numpy().tolist() == [
        ["alpha", "alpha=0.3", 0.3, False, 1, 25],
        ["alpha", "fmfa", 1, True, 3, pytest.approx(175 / 3)],
        ["alpha", "alpha=10", 10, False, 2, 50],
        ["mask-rate", "mask-rate=0.3", 0.3, False, 1, 50],
    ]
    spread = np.std([50, 75, 50], ddof=1) * 4.302653 * np.sqrt(4 / 3)  # Student's t of two degrees of freedom
    band = table[table["own"]].iloc[0]
    assert [band["further_low"], band["further_high"]] == pytest.approx([175 / 3 - spread, 175 / 3 + spread])
    figure = plot_sensitivity(table)
    assert [axis.get_xlabel() for axis in figure.axes] == ["alpha", "mask-rate"]
    assert figure.axes[0].get_title() == "seeds: 1, own 3; n = 120 queries"
    assert plot_sensitivity(table.iloc[:0]) is None


def test_a_grid_says_what_became_of_each_point(results):
    table = grid_table(read_results(results))
    assert table.to_dict("records") == [
        {"grid": "stability", "alpha": 3, "rate": 1e-4, "seeds": 2, "start": 40, "best": 50, "last": 30, "R@1": 75}
    ]
    axis = plot_grid(table).axes[0]
    assert [text.get_text() for text in axis.texts] == ["-10.0\n(75.0 %)"]
    assert axis.get_title() == "stability: start at 40.0 % on validation"
    assert grid_table(read_results(results / "nowhere")).empty
    assert plot_grid(pd.DataFrame()) is None


def test_points_are_no_rows_unless_there_is_nothing_else(results, tmp_path_factory):
    assert set(read_results(results).rows("test").runs) == {"fmfa"}
    assert (run_results(read_results(results))["status"] == "finished").sum() == 9
    alone = tmp_path_factory.mktemp("alone")
    write_run(alone, "alpha=3-0", 0.5, method="fmfa", objectives="asdm_alpha=3")
    assert set(read_results(alone).rows("test").runs) == {"alpha=3"}


def test_one_seed_is_held_against_where_another_training_would_lie(results):
    alike = [(f"fmfa-{seed}", 0.5) for seed in range(3, 9)]
    for name, share in (*alike, ("fmfa-padding-0", 0.5), ("fmfa-released-0", 0.0)):
        write_run(results, name, share, method="fmfa", seed=int(name[-1]))
    forms = claims_table(read_results(results), kind="forms").set_index("row")
    for name, word in (("fmfa-padding", "inside"), ("fmfa-released", "outside")):
        assert forms.loc[name, "verdict"] == "one seed: no verdict"
        assert f"lies {word} of where one further training of fmfa would lie" in forms.loc[name, "in words"]


def test_results_from_two_places_are_exported_to_one_folder(results, tmp_path_factory):
    target, other = (tmp_path_factory.mktemp(name) for name in ("target", "other"))
    for folder in (results / "fmfa-0", results / "alpha=10-0", write_run(other, "irra-0", 0.5, method="irra"),
                   write_run(other, RANDOM, 0.5, method="fmfa", weights="none")):  # fmt: skip
        evaluate(folder, {"queries-test-zero-shot": pd.read_csv(folder / "queries-test.csv")})
    export_results(results, target)
    export_results(other, target)
    exported = read_results(target)
    assert len(exported.queries("test")) == len(exported.runs) == len(list(results.glob("*-?"))) + 2
    assert list(exported.queries("test", "zero-shot")) == ["fmfa-0"]


def test_a_further_run_lies_where_it_is_said_to_lie():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        means = generator.normal(0.4, 0.02, 6)
        low, high = further_run(np.repeat(means[:5, None], 3, axis=1))
        inside += low <= means[5] <= high
    assert 0.935 < inside / 2000 < 0.965
    assert np.isnan(further_run(np.ones((1, 3)))).all()
