"""Evaluations on another data set than a run's own: names of their files, and the cross-domain table."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from evaluations import evaluate

from fmfa.data.annotations import Dataset, read_dataset
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, shuffle_captions
from fmfa.evaluation.score_record import read_record
from fmfa.files import write_json
from fmfa.plots.comparison import plot_domains
from fmfa.score import main as score
from fmfa.simpedes.generate import generate, recipe
from fmfa.study.levels import cross_domain_table, result_table, seeds_table
from fmfa.study.results import export_results, read_results, results_split, save_evaluation, trained_on
from fmfa.systems import load_system

STREET, STATION = "SimPEDES-street", "SimPEDES-station"


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    counts = {"train": 2, "val": 2, "test": 8}
    return {
        domain: read_dataset(
            generate(tmp_path_factory.mktemp(domain), recipe("tiny", domain, **counts), workers=1, progress=False),
            "SimPEDES",
        )
        for domain in ("street", "station")
    }


def run(folder, dataset):
    folder.mkdir(parents=True)
    seed = int(folder.name[-1])
    write_json(folder / "run.json", {"config": {"dataset": dataset}, "seed": seed, "status": "finished"})
    return folder


# --- names


def test_files_of_another_data_set_get_its_name(domains, tmp_path):
    street, station = domains["street"], domains["station"]
    own = Dataset("my photos/2", tmp_path / "own" / "imgs", street.table)
    assert [d.name for d in (street, station, own)] == [STREET, STATION, "my photos/2"]
    folder = run(tmp_path / "fmfa-0", STREET)
    assert trained_on(folder) == STREET
    assert results_split(folder, street, "test") == "test"
    assert results_split(folder, station, "test") == f"test@{STATION}"
    assert results_split(folder, own, "val") == "val@my_photos_2"
    assert results_split(run(tmp_path / "old-0", "SimPEDES"), street, "test") == "test"
    real = run(tmp_path / "rstp-0", "RSTPReid")
    assert results_split(real, Dataset("RSTPReid", tmp_path / "imgs", street.table), "test") == "test"
    assert results_split(real, Dataset("CUHK-PEDES", tmp_path / "imgs", street.table), "test") == "test@CUHK-PEDES"


def test_a_folder_without_a_record_keeps_plain_names(domains, tmp_path):
    assert results_split(tmp_path, domains["station"], "test") == "test"


# --- a real evaluation


def test_a_cross_domain_evaluation_leaves_the_own_one_alone(domains, tmp_path):
    system, folder = load_system(), run(tmp_path / "zero-0", STREET)
    found = {name: system.evaluate(data, "test", progress=False) for name, data in domains.items()}
    save_evaluation(found["street"], domains["street"], "test", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    save_evaluation(found["station"], domains["station"], "test", folder, start=found["station"])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before
    new = {path.name for path in folder.iterdir()} - before.keys()
    assert {f"queries-test@{STATION}.csv", f"evaluation-test@{STATION}.json"} <= new
    assert f"queries-test@{STATION}-zero-shot.csv" in new
    assert all(f"-test@{STATION}" in name for name in new)
    assert json.loads((folder / f"evaluation-test@{STATION}.json").read_text())["dataset"] == STATION
    assert seeds_table(read_results(tmp_path))["queries"].iloc[0] == len(found["street"].rows)
    table = cross_domain_table([read_results(tmp_path)]).set_index("tested on")
    for name, label in (("street", STREET), ("station", STATION)):
        expected = 100 * found[name].metrics[TEXT_TO_IMAGE].summary["R@1"]
        assert table.loc[label, "R@1"] == pytest.approx(expected, abs=1e-3)
        assert table.loc[label, "own"] == pytest.approx(table.loc[STREET, "R@1"])
        assert table.loc[label, "trained on"] == STREET
    assert table["drop"].isna().all()


def test_runs_and_exported_results_become_the_records_of_their_evaluations(domains, tmp_path, capsys):
    data, system = domains["street"], load_system()
    evaluation = system.evaluate(data, "test", progress=False)
    for seed in range(2):
        folder = run(tmp_path / "runs" / f"zero-{seed}", STREET)
        save_evaluation(shuffle_captions(evaluation, seed) if seed else evaluation, data, "test", folder)
    export_results(tmp_path / "runs", tmp_path / "kept")
    own = read_record(tmp_path / "runs" / "zero-0" / "queries-test.record")
    assert (own.system, own.selected, own.cost.dimension) == ("zero", "validation", evaluation.text_features.shape[1])
    for source in ("runs", "kept"):
        options = ["--root", str(data.images.parent), "--to", str(tmp_path / f"records of {source}")]
        assert score([str(tmp_path / source), *options]) == 0
        record = read_record(tmp_path / f"records of {source}" / "zero-0.record")
        assert (record.system, record.seed, record.split) == (own.system, own.seed, own.split)
        found, expected = record.queries.by_identity(), own.queries.by_identity()
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, atol=1e-4)
    other = tmp_path / "other"
    generate(other, recipe("tiny", train=2, val=2, test=7), workers=1, progress=False)
    assert score([str(tmp_path / "kept"), "--root", str(other), "--to", str(tmp_path)]) == 2
    assert (
        "was evaluated on other queries than SimPEDES-street test has here; give the scale" in capsys.readouterr().err
    )


def test_a_split_of_one_person_has_levels_without_intervals(domains, tmp_path):
    table = domains["street"].table
    one = replace(domains["street"], table=table[table["identity"] == table["identity"].iloc[-1]])
    evaluation, folder = load_system().evaluate(one, "test", progress=False), run(tmp_path / "zero-0", STREET)
    save_evaluation(evaluation, one, "test", folder, start=evaluation)
    first = json.loads((folder / "evaluation-test.json").read_text())["metrics"][0]
    assert (first["value"], first["low"], first["high"]) == (100, None, None)
    assert result_table({"it": evaluation}, one, "test")["R@1"].tolist()[:2] == ["100.0", "100.0"]
    assert seeds_table(read_results(tmp_path)).set_index("row").loc["zero-shot", "R@1"] == "100.0"


# --- the table, from made-up queries


def evaluated(folder, hits, tested, name="test", identities=10):
    """Write an evaluation in which each of 20 queries is a hit or not."""
    table = pd.DataFrame({"identity": np.arange(20) % identities, "image": [f"{tested}/{i}.png" for i in range(20)],
                          "first_rank": 1, "R@1": np.array(hits, float)})  # fmt: skip
    table = table.assign(**dict.fromkeys(("R@5", "R@10", "mAP", "mINP"), 1.0))
    evaluate(folder, {f"queries-{name}": table}, name, dataset=tested)


def first(count):
    return np.arange(20) < count


def study(tmp_path):
    """Two seeds of one row in both domains; the street runs are also tested on station."""
    street, station = tmp_path / "street", tmp_path / "station"
    for seed, (own, native, away) in enumerate([(16, 14, 8), (12, 12, 10)]):
        source = run(street / f"fmfa-{seed}", STREET)
        evaluated(source, first(own), STREET)
        evaluated(run(station / f"fmfa-{seed}", STATION), first(native), STATION)
        evaluated(source, first(away), STATION, f"test@{STATION}")
    evaluated(run(street / "irra-0", STREET), first(10), STREET)
    evaluated(street / "irra-0", first(5), STATION, f"test@{STATION}")
    return street, station


def test_levels_and_drops_by_hand(tmp_path):
    table = cross_domain_table(list(map(read_results, study(tmp_path)))).set_index(["row", "trained on", "tested on"])
    assert len(table) == 5
    away = table.loc[("fmfa", STREET, STATION)]
    assert away["R@1"] == pytest.approx(100 * (8 + 10) / 40)
    assert away["drop"] == pytest.approx(100 * (14 + 12 - 8 - 10) / 40)
    assert away["drop_low"] <= away["drop"] <= away["drop_high"]
    assert away["own"] == pytest.approx(100 * (16 + 12) / 40)
    assert (away["seeds"], away["queries"]) == (2, 20)
    assert table.loc[("fmfa", STATION, STATION), "R@1"] == pytest.approx(100 * (14 + 12) / 40)
    assert table.loc[("irra", STREET, STATION), "R@1"] == pytest.approx(25)
    assert np.isnan(table.loc[("irra", STREET, STATION), "drop"])
    assert np.isnan(table.loc[("fmfa", STREET, STREET), "drop"])


def test_an_export_keeps_the_evaluations_on_the_other_domain(tmp_path):
    folders = study(tmp_path)
    kept = [tmp_path / "exported" / folder.name for folder in folders]
    for folder, target in zip(folders, kept, strict=True):
        export_results(folder, target)
    live, exported = (cross_domain_table(list(map(read_results, tops))) for tops in (folders, kept))
    pd.testing.assert_frame_equal(live, exported, rtol=1e-4)


def test_the_drop_uses_the_seeds_that_both_have(tmp_path):
    street, station = study(tmp_path)
    for path in (station / "fmfa-1").iterdir():
        path.unlink()
    table = cross_domain_table([read_results(street), read_results(station)])
    away = table.set_index(["row", "trained on", "tested on"]).loc[("fmfa", STREET, STATION)]
    assert away["drop"] == pytest.approx(100 * (14 - 8) / 20)
    assert away["R@1"] == pytest.approx(100 * (8 + 10) / 40)


def test_earlier_evaluations_without_a_domain_are_the_runs_own(tmp_path):
    evaluated(run(tmp_path / "clip-0", STREET), first(7), "SimPEDES")
    assert cross_domain_table([read_results(tmp_path)]).empty  # as of any row that was tested at home alone
    evaluated(tmp_path / "clip-0", first(5), STATION, f"test@{STATION}")
    assert cross_domain_table([read_results(tmp_path)])["tested on"].tolist() == [STATION, STREET]
    assert plot_domains(cross_domain_table([read_results(tmp_path)]).iloc[:0]) is None


def test_the_figure_has_a_panel_a_test_set(tmp_path):
    table = cross_domain_table(list(map(read_results, study(tmp_path))))
    axes = plot_domains(table).axes
    assert [axis.get_xlabel() for axis in axes] == [f"R@1 on {name} (%), n = 20 queries" for name in (STATION, STREET)]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["fmfa (2 seeds)", "irra (1 seed)"]
    drawn = {
        (axis.get_xlabel().split()[2], bars.get_label(), round(float(place), 6)): float(value)
        for axis in axes
        for bars in axis.containers
        for value, place in zip(*bars.lines[0].get_data(), strict=True)
    }
    for line in table.to_dict("records"):
        place = ["fmfa", "irra"].index(line["row"]) + (0.1 if line["trained on"] == STREET else -0.1)
        assert drawn.pop((line["tested on"], line["trained on"], place)) == pytest.approx(line["R@1"])
    assert not drawn


def test_other_queries_or_none_are_refused(tmp_path):
    street, station = study(tmp_path)
    evaluated(station / "fmfa-0", first(14), STATION, identities=5)
    with pytest.raises(ConfigError, match="fmfa-0 was evaluated on other queries than"):
        cross_domain_table([read_results(street), read_results(station)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no run was evaluated on test"):
        cross_domain_table([read_results(tmp_path / "empty")])
    assert len(read_results(street).queries("test")["irra-0"]) == 20
