"""The comparison's tables and figures on small made-up results, and on the committed ones."""

import contextlib
import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from evaluations import evaluate
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from scipy import stats

from fmfa.errors import ConfigError
from fmfa.notebook import declare_parameters, resolve_parameters
from fmfa.plots.comparison import plot_against_retrieval, plot_claims, plot_comparison, plot_known, plot_power
from fmfa.study import claims
from fmfa.study import levels as tables
from fmfa.study.claims import claims_in_short, claims_table, read_claims, rows_paired_table, shuffled_table
from fmfa.study.correlation import agreement, correlation_table, counterfactual_runs, grounding_runs
from fmfa.study.curves import sensitivity_table
from fmfa.study.levels import (
    cross_domain_table,
    published_gains,
    published_table,
    readable,
    run_results,
    seeds_table,
    tuning_table,
)
from fmfa.study.power import COMPONENTS, components_table, gains_table, power_table
from fmfa.study.results import (
    METRICS,
    export_results,
    main,
    read_evaluation,
    read_results,
)
from fmfa.study.selection import epochs_table, selection_table

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "data" / "results" / "standard"
PEOPLE, QUERIES = 40, 4
IDENTITY = np.repeat(np.arange(PEOPLE), QUERIES)


@cache
def committed():
    return read_results(COMMITTED)


def queries(hits):
    """A table of queries with R@1 as given and the rest following from it."""
    images = [f"{place}.png" for place in range(len(hits))]
    columns = {"identity": IDENTITY[: len(hits)], "image": images, "first_rank": 2 - np.asarray(hits)}
    return pd.DataFrame(columns | {name: np.asarray(hits, dtype=float) for name in METRICS})


def draw(share, seed):
    """Hits of one run: persons of their own difficulty, the same in every run, and chance on top."""
    ease = np.random.default_rng(0).random(PEOPLE)[IDENTITY]
    return (np.random.default_rng([seed, int(1000 * share)]).random(len(IDENTITY)) < share * (0.7 + 0.6 * ease)) * 1


def write_run(results, run, hits=None, method="clip", start=None, weights="", **record):
    folder = results / run
    folder.mkdir(parents=True)
    seed = int(run.rpartition("-")[2])
    config = {"method": method, "preset": "paper", "objectives": "", "dataset": "SimPEDES-street"}
    config |= {"weights": weights}
    known = {"config": config, "seed": seed, "status": "finished"}
    (folder / "run.json").write_text(json.dumps(known | record))
    if hits is None:
        return folder
    tables = {"queries-test": queries(hits)}
    level = {"direction": "text to image", "low": 1.0, "high": 99.0, "chance": 2.5, "queries": len(hits)}
    metrics = [level | {"metric": name, "value": 100 * np.mean(hits)} for name in METRICS]
    evaluation = {"dataset": "SimPEDES-street", "metrics": metrics, "ceiling": dict.fromkeys(METRICS, 0.9)}
    if start is not None:
        tables["queries-test-zero-shot"] = queries(start)
        evaluation["zero_shot"] = [level | {"metric": name, "value": 100 * np.mean(start)} for name in METRICS]
    evaluate(folder, tables, **evaluation)
    return folder


@pytest.fixture
def results(tmp_path):
    """A study: IRRA far above CLIP, FMFA like IRRA, A-SDM far below, some runs failed, one row with one seed."""
    shares = {"clip": 0.3, "irra": 0.6, "fmfa": 0.6, "asdm": 0.2}
    start = draw(0.3, 99)
    for row, share in shares.items():
        for seed in range(4):
            best = 0.5 + 0.01 * seed
            write_run(tmp_path / "runs", f"{row}-{seed}", draw(share, seed), start=start, best=best)
    write_run(tmp_path / "runs", "sdm-efa-0", draw(0.6, 0))
    write_run(tmp_path / "runs", "ivt-0", method="ivt", status="failed")
    write_run(tmp_path / "runs", "broken-1", status="running")
    yield tmp_path / "runs"
    plt.close("all")


def test_damaged_metrics_of_one_run_stop_no_table(results):
    (results / "irra-1" / "metrics.csv").write_text("run,split,epoch,step,metric,value\nirra-1,train,x,1,loss,1\n")
    read = read_results(results)
    runs = read.runs.set_index("run")
    assert "metrics.csv is damaged" in runs.loc["irra-1", "left_out"]
    assert (runs["left_out"] != "").sum() == 1
    assert set(read.rows("test").runs["irra"]) == {0, 1, 2, 3}


def told_table(heading):
    """Lines of the table under a heading of the results page, by their first cell (what is in backticks, if any)."""
    text = (COMMITTED.parent / "README.md").read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    lines = [line for line in text.split("\n#", 1)[0].splitlines() if line.startswith("|")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    return {first.split("`")[1] if "`" in first else first: rest for first, *rest in cells}


def test_the_galleries_of_the_results_page_are_as_measured():
    costs = pd.read_csv(COMMITTED.parent / "gallery.csv").pivot(index="figure", columns="pictures", values="value")
    figures = {
        "exact search": "exact, elapsed, median",
        "the same where a filter leaves 1 %": "1 % by a filter, elapsed, median",
        "approximate search": "approximate, elapsed, median",
        "its recall@10": "approximate, recall@10",
        "memory of searching": "exact, memory since the start",
        "opening": "opening",
        "building from given vectors, core time": "building, core time",
        "its peak memory, mapped files included": "building, peak memory",
    }
    for name, cells in told_table("## Galleries").items():
        told = [float(cell.split()[0].replace(",", "")) for cell in cells]
        assert told == pytest.approx(costs.loc[figures[name], [1_000_000, 10_000_000]].tolist(), rel=0.02), name


def as_told(claims, told):
    for line in claims[claims["seeds"] > 0].to_dict("records"):
        measured = f"{line['R@1 difference']:+.1f} [{line['low']:.1f}, {line['high']:.1f}]"
        assert told[line["claim"]] == [f"{line['row']} - {line['minus']}", measured, line["verdict"]]


@pytest.mark.parametrize(
    ("scale", "heading"), [("wide", "## Many people, seen once"), ("wide-station", "### The same on `station`")]
)
def test_the_results_page_tells_what_many_people_show(scale, heading):
    results, told = read_results(COMMITTED.parent / scale), told_table(heading)
    levels = readable(seeds_table(results)).set_index("row")
    assert {row: told[row] for row in levels.index} == {
        row: list(levels.loc[row, ["seeds", *METRICS]]) for row in levels.index
    }
    for kind in ("claims", "parts", "recipes"):
        as_told(claims_table(results, kind=kind), told)


def test_the_results_page_tells_the_known_answers():
    told, table = told_table("### Known answers"), claims_table(read_results(COMMITTED.parent / "wide"), kind="known")
    for line in table.to_dict("records"):
        here = f"{line['R@1 difference']:+.1f} [{line['low']:.1f}, {line['high']:.1f}]"
        expected = [f"{line['row']} - {line['minus']}", here, f"{line['real data']:+.1f}", line["verdict"]]
        assert told[line["claim"]] == expected


def test_the_tables_of_the_results_page_are_those_of_the_committed_results():
    levels = readable(seeds_table(committed())).set_index("row")
    told = {row: list(levels.loc[row, ["seeds", *METRICS]]) for row in levels.index}
    assert told_table("## Levels") == told
    kinds = ("claims", "parts", "controls", "oracles", "recipes", "forms")
    claims = pd.concat([claims_table(committed(), kind=kind) for kind in kinds])
    told = told_table("## Claims")
    assert set(told) == set(claims.loc[claims["seeds"] > 0, "claim"])
    as_told(claims, told)
    domains = cross_domain_table([committed(), read_results(COMMITTED.parent / "station")])
    told = told_table("## Another domain")
    assert len(told) == len(domains) / 2 == 8
    for line in domains.to_dict("records"):
        there, elsewhere, loss = told[f"{line['tested on'].removeprefix('SimPEDES-')}: {line['row']}"]
        cell = there if line["trained on"] == line["tested on"] else elsewhere
        assert cell == f"{line['R@1']:.1f} [{line['low']:.1f}, {line['high']:.1f}]"
        if cell == elsewhere:
            assert loss == f"{line['drop']:.1f} [{line['drop_low']:.1f}, {line['drop_high']:.1f}]"


def test_runs_and_rows_stand_between_chance_zero_shot_and_ceiling(results):
    runs = run_results(read_results(results)).set_index("run")
    assert runs.loc["ivt-0", "status"] == "failed"
    assert runs.loc["broken-1", "status"] == "running"
    assert np.isnan(runs.loc["ivt-0", "R@1"])
    assert list(runs.index[-3:]) == ["chance", "zero-shot", "ceiling of the captions"]
    assert runs.loc["irra-2", "R@1"] == pytest.approx(100 * draw(0.6, 2).mean())
    rows = seeds_table(read_results(results)).set_index("row")
    assert rows.loc["irra", "seeds"] == 4
    assert rows.loc["sdm-efa", "seeds"] == 1
    assert list(rows["R@1"][-3:]) == ["2.5", f"{100 * draw(0.3, 99).mean():.1f} [1.0, 99.0]", "90.0"]


def test_rows_are_compared_over_the_seeds_that_both_have(results):
    shutil.rmtree(results / "irra-3")
    table = rows_paired_table(read_results(results), "irra").set_index("row")
    mean = np.mean([draw(0.3, s).mean() - draw(0.6, s).mean() for s in range(3)])
    assert table.loc["clip", "R@1 difference"] == pytest.approx(100 * mean)
    assert list(table.loc[["clip", "sdm-efa", "zero-shot"], "seeds"]) == [3, 1, 3]
    assert table.loc["clip", "p (Holm)"] >= table.loc["clip", "p"]
    assert np.isnan(table.loc["sdm-efa", "p"])
    assert table.loc["sdm-efa", "p (these networks)"] > 0
    base = np.mean([draw(0.6, s).mean() for s in range(3)])
    assert table.loc["zero-shot", "R@1 difference"] == pytest.approx(100 * (draw(0.3, 99).mean() - base))
    assert table.loc["ceiling of the captions", "R@1 difference"] == pytest.approx(90 - 100 * base)
    no_baseline = rows_paired_table(read_results(results), "ivt").set_index("row")
    assert no_baseline["R@1 difference"].isna().all()
    assert no_baseline.loc["clip", "R@1"] == pytest.approx(100 * np.mean([draw(0.3, s).mean() for s in range(4)]))


def test_rows_without_a_shared_seed_and_other_queries(results):
    for seed in range(4):
        record = results / f"fmfa-{seed}/run.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"seed": seed + 10}))
        record.parent.rename(results / f"fmfa-{seed + 10}")
    line = rows_paired_table(read_results(results), "irra").set_index("row").loc["fmfa"]
    assert line["seeds"] == 0
    assert np.isnan(line["R@1 difference"])
    write_run(results, "other-0", draw(0.5, 0)[:-1])
    with pytest.raises(ConfigError, match="other-0 was evaluated on other queries"):
        rows_paired_table(read_results(results), "irra")


def test_starting_weights_have_the_name_of_their_network_and_file(tmp_path):
    write_run(tmp_path, "clip-0", draw(0.5, 0), start=draw(0.3, 1))
    write_run(tmp_path, "ivt-0", draw(0.5, 1), method="ivt", start=draw(0.1, 1))
    write_run(tmp_path, "ivt-less-0", draw(0.5, 3), method="ivt", start=draw(0.2, 1), weights="data/less.safetensors")
    write_run(tmp_path, "random-0", draw(0.5, 2), start=draw(0.02, 1), weights="none")
    rows = read_results(tmp_path).rows("test")
    starts = {"zero-shot": 0.3, "zero-shot IVT": 0.1, "zero-shot IVT (less)": 0.2}
    assert rows.names == ["clip", "ivt", "ivt-less", "random", *starts]
    for name, share in starts.items():
        assert rows.values(name).mean() == draw(share, 1).mean()
    assert set(starts) < set(seeds_table(read_results(tmp_path))["row"])
    levels = [line.get_label() for line in plot_comparison(read_results(tmp_path)).axes[0].lines]
    for name in (*starts, "chance", "ceiling of the captions"):
        assert any(label.startswith(f"{name}, ") for label in levels), name
    plt.close("all")


def test_a_run_without_zero_shot_queries_still_shows_the_level(results):
    for path in results.glob("*/evaluation-test.json"):
        evaluate(path.parent, {"queries-test-zero-shot": None})
    line = rows_paired_table(read_results(results), "irra").set_index("row").loc["zero-shot"]
    assert line["R@1"] == pytest.approx(100 * draw(0.3, 99).mean())
    assert np.isnan(line["low"])


def test_claims_get_their_verdicts(results, monkeypatch):
    read = read_results(results)
    assert claims_table(read).set_index("row").loc["fmfa", "verdict"].iloc[0] == "open"  # other rows scatter by points
    monkeypatch.setattr(claims, "MARGIN", 0.3)
    table = pd.concat([claims_table(read, kind=kind) for kind in ("claims", "parts")]).set_index(["row", "minus"])
    assert table.loc[("irra", "clip"), ["verdict", "verdict by mAP"]].tolist() == ["holds", "holds"]
    assert table.loc[("fmfa", "irra"), "verdict"] == "equal within 1 point"  # the same hits
    assert table.loc[("asdm", "irra"), "verdict"] == "does not hold"
    assert table.loc[("fmfa", "asdm"), "verdict"] == "holds"
    assert table.loc[("sdm-efa", "irra"), "verdict"] == "one seed: no verdict"
    assert "the one training of sdm-efa, 61.3 %, lies inside" in table.loc[("sdm-efa", "irra"), "in words"]
    assert table.loc[("ivt", "ivt-base"), "verdict"] == "not run"
    assert table.loc[("fmfa", "irra"), "published"] == "+0.14 to +1.55 (n = 9)"
    known = table["p"].notna()
    assert (table.loc[known, "p (Holm)"] >= table.loc[known, "p"]).all()
    assert table.loc[~known, ["p (Holm)", "low (Holm)", "high (Holm)"]].isna().all(axis=None)


def test_the_verdict_by_map_is_about_map(tmp_path):
    for row, share, precision in (("irra", 0.6, 0.9), ("fmfa", 0.6, 0.5)):
        for seed in range(3):
            write_run(tmp_path, f"{row}-{seed}", draw(share, seed))
            table = pd.read_csv(tmp_path / f"{row}-{seed}" / "queries-test.csv").assign(mAP=precision)
            evaluate(tmp_path / f"{row}-{seed}", {"queries-test": table})
    line = claims_table(read_results(tmp_path)).set_index("claim").loc["FMFA beats IRRA."]
    assert line["verdict"] == "equal within 1 point"
    assert line["verdict by mAP"] == "does not hold"
    assert line["mAP difference"] == pytest.approx(-40)


def test_the_mean_of_rows_is_compared_seed_by_seed(tmp_path):
    shares = {"ivt": 0.6, "ivt-no-bmm": 0.55, "ivt-no-mla": 0.4, "ivt-base": 0.3}
    for row, share in shares.items():
        for seed in range(3 + (row == "ivt")):  # a seed that only one row has is left out
            write_run(tmp_path, f"{row}-{seed}", draw(share, seed), method="ivt")
    rows = read_results(tmp_path).rows("test")
    first, second = rows.pair("ivt, ivt-no-bmm", "ivt-no-mla, ivt-base")
    hits = {row: np.stack([draw(share, seed) for seed in range(3)]) for row, share in shares.items()}
    np.testing.assert_allclose(first, [hits["ivt"], hits["ivt-no-bmm"]])
    np.testing.assert_allclose(second, [hits["ivt-no-mla"], hits["ivt-base"]])
    assert rows.pair("ivt, fmfa", "ivt-base") is None
    table = claims_table(read_results(tmp_path)).set_index("claim")
    assert table.loc["MLA helps.", "seeds"] == 3
    assert table.loc["MLA helps.", "R@1 difference"] == pytest.approx(100 * (first - second).mean())


def test_rows_that_hardly_differ_are_equal_within_a_point(tmp_path):
    generator = np.random.default_rng(0)
    hits = (generator.random(len(IDENTITY)) < 0.5) * 1
    for seed in range(4):
        flipped = hits.copy()
        flipped[seed] ^= seed == 0
        write_run(tmp_path, f"irra-{seed}", flipped)
        write_run(tmp_path, f"fmfa-{seed}", hits)
    line = claims_table(read_results(tmp_path)).set_index("claim").loc["FMFA beats IRRA."]
    assert line["verdict"] == line["verdict by mAP"] == "equal within 1 point"
    assert line["p (equal)"] <= 0.05 < line["p (Holm)"]


@pytest.mark.parametrize("kind", ["claims", "parts", "controls", "oracles", "recipes", "forms"])
def test_corrected_intervals_leave_zero_out_just_where_there_is_a_verdict(kind):
    table = claims_table(committed(), kind=kind)
    several = table[table["seeds"] > 1]
    beyond = (several["low (Holm)"] > 0) | (several["high (Holm)"] < 0)
    decided = several["verdict"].isin(["holds", "does not hold", "as it must be"])
    assert beyond.tolist() == decided.tolist()
    assert (several["low (Holm)"] <= several["low"]).all()
    assert (several["high (Holm)"] >= several["high"]).all()
    one = table[table["seeds"] == 1]
    assert set(one["verdict"]) <= {"one seed: no verdict"}
    assert one["low (Holm)"].isna().all()


def test_rows_against_the_baseline_have_corrected_intervals_too(results):
    table = rows_paired_table(read_results(results), "irra")
    known = table["p"].notna()
    assert ((table["p (Holm)"] <= 0.05) == ((table["low (Holm)"] > 0) | (table["high (Holm)"] < 0)))[known].all()
    assert set(table.loc[known, "row"]) == {"clip", "asdm", "fmfa", "zero-shot"}


def test_the_answer_in_short_counts_every_claim(results, tmp_path):
    text = claims_in_short(read_results(results), claims_table(read_results(results)))
    assert text.startswith(f"SimPEDES-street, {PEOPLE * QUERIES} queries of {PEOPLE} identities, 4 seeds per row.")
    assert "papers 2 hold (IRRA beats plain CLIP fine-tuning; FMFA beats plain CLIP fine-tuning), 1 is open" in text
    assert text.endswith("10 were not run; corrected for the number of claims (Holm, 5 %). By mAP, 1 is open.")
    assert (
        claims_in_short(read_results(tmp_path / "nothing"), claims_table(read_results(tmp_path)))
        == "no run was evaluated."
    )


def test_results_of_another_folder_lie_beside_the_shipped_ones(results):
    for path in [p for p in results.iterdir() if p.name[-1] in "123"]:
        shutil.rmtree(path)
    shipped, own = claims_table(committed()), claims_table(read_results(results))
    assert plot_claims(shipped.assign(seeds=0)) is None
    figure = plot_claims(shipped, own, "mine")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["holds", "does not hold", "open"]
    assert "mine: 1 seed, one draw" in texts
    beside = next(line for line in figure.axes[0].lines if line.get_label() == "mine: 1 seed, one draw")
    drawn = dict(zip(shipped["claim"], beside.get_xdata(), strict=True))
    for line in own.to_dict("records"):
        assert drawn[line["claim"]] == pytest.approx(line["R@1 difference"], nan_ok=True)
    alone = plot_claims(own)
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["one seed: no verdict", "95 % interval"]
    plot_claims(shipped, own.assign(seeds=0), "mine")


# --- tables for readers


def test_a_table_for_readers_has_no_computer_words():
    table = pd.DataFrame(
        {
            "run": ["a", None, np.nan],
            "seed": [0, 1, np.nan],
            "epoch": pd.array([2, pd.NA, 10_000], dtype="Int64"),
            "R@1": [24.65, 5.31, np.nan],
            "p": [0.9, 0.0003, 0.0],
            "rate": [1e-4, 3e-4, 1e-3],
            "mixed": [1e-8, True, 5],
            "chance": [True, False, True],
            "split": pd.Categorical(["val", None, "test"]),
            "gain": [np.inf, -0.04, -1.0],
        }
    )
    assert readable(table).to_numpy().tolist() == [
        ["a", "0", "2", "24.6", "0.900", "0.0001", "1e-08", "yes", "val", "inf"],
        ["", "1", "", "5.3", "0.0003", "0.0003", "yes", "no", "", "-0.04"],
        ["", "", "10,000", "", "0.000", "0.001", "5", "yes", "test", "-1.0"],
    ]
    assert list(readable(table)) == list(table)
    assert set(readable(table).index) == {""}
    config = readable(pd.Series({"eps": 1e-8, "epochs": 5, "beta": 0.9995, "name": "", "none": None}, name="value"))
    assert config.to_numpy().tolist() == [
        ["eps", "1e-08"], ["epochs", "5"], ["beta", "0.9995"], ["name", ""], ["none", ""],
    ]  # fmt: skip
    costs = readable(pd.DataFrame({"value": [0.790464, 12.34567, 912.345678, 3456.7]}), digits=3)
    assert costs["value"].tolist() == ["0.79", "12.3", "912", "3457"]
    named = table.set_index(["run", "seed"])[["R@1"]]
    assert list(readable(named)) == ["run", "seed", "R@1"]
    assert list(readable(table.assign(low=np.nan, p=None, note=""))) == [name for name in table if name != "p"]
    assert readable(pd.DataFrame()).empty
    assert list(readable(table.iloc[:0])) == list(table)


@given(st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(), st.booleans()), max_size=5))
def test_any_value_becomes_text_and_only_nothing_becomes_zero(values):
    for column in (pd.Series(values, dtype=object), pd.to_numeric(pd.Series(values, dtype=object), errors="coerce")):
        text = readable(pd.DataFrame({"value": column, "beside": "x"})).get("value", [""] * len(column))
        for value, cell in zip(column, text, strict=True):
            assert isinstance(cell, str)
            assert cell not in ("nan", "None", "<NA>", "NaN", "True", "-0.0") or value == cell
            if isinstance(value, float | int) and not isinstance(value, bool) and pd.notna(value) and value:
                assert float(cell.replace(",", "")) != 0


def test_controls_and_oracles_get_theirs(results):
    for seed in range(4):
        write_run(results, f"shuffled-pairs-{seed}", draw(0.1, seed))
        write_run(results, f"weak-loss-{seed}", draw(0.31, seed))
    table = claims_table(read_results(results), kind="controls").set_index("row")
    assert list(table.loc[["shuffled-pairs", "weak-loss"], "verdict"]) == ["as it must be", "open"]
    for seed in range(4):
        evaluate(results / f"shuffled-pairs-{seed}", {"queries-test": queries(draw(0.7, seed))})
    table = claims_table(read_results(results), kind="controls").set_index("row")
    assert table.loc["shuffled-pairs", "verdict"] == "not as it must be"
    assert (claims_table(read_results(results), kind="oracles")["verdict"] == "not run").all()
    with pytest.raises(ConfigError, match="claims, parts, controls, oracles, recipes"):
        claims_table(read_results(results), kind="wishes")


@pytest.mark.parametrize("kind", ["claims", "parts", "controls", "oracles", "recipes", "forms", "known"])
def test_the_definitions_of_claims_are_complete(kind):
    claims = read_claims(kind)
    assert len({(claim["row"], claim["minus"]) for claim in claims}) == len(claims)
    for claim in claims:
        assert claim["claim"].endswith(".")
        assert claim.get("expected", "above") in ("above", "below", "not above")
        if "published" in claim:
            assert len(published_gains(*claim["published"])) >= 3
    assert published_gains("FMFA", "nobody").empty


def test_shuffled_captions_against_chance(results):
    assert shuffled_table(read_results(results)).empty
    few = np.arange(len(IDENTITY)) % 40 == 0  # 2.5 %
    evaluate(results / "clip-0", {"queries-test-shuffled": queries(few * 1)})
    evaluate(results / "irra-0", {"queries-test-shuffled": queries(draw(0.5, 5))})
    table = shuffled_table(read_results(results)).set_index("row")
    assert list(table["at chance"]) == [True, False]
    assert (table["chance"] == 2.5).all()


def test_power_of_the_committed_results():
    table = components_table(committed())
    assert {("fmfa", "irra"), ("irra", "clip")} <= set(zip(table["row"], table["minus"], strict=True))
    identities = pd.read_csv(COMMITTED / "identities.csv.xz")
    own = identities[(identities["of"] == "run") & (identities["tested_on"] == identities["trained_on"])]
    sums = own.groupby(["row", "seed"])[["R@1", "queries"]].sum()
    shares = sums["R@1"] / sums["queries"]
    fmfa_minus_irra = [100 * (shares["fmfa", seed] - shares["irra", seed]) for seed in range(5)]
    assert table.set_index(["row", "minus"]).loc[("fmfa", "irra"), "seed means"] == pytest.approx(
        np.std(fmfa_minus_irra, ddof=1), abs=1e-6
    )
    assert (table["seed means low"] < table["seed means"]).all()
    assert (table["seed means"] < table["seed means high"]).all()
    assert (table[list(COMPONENTS)] >= 0).all(axis=None)
    assert not any("," in name for name in [*table["row"], *table["minus"]])  # of means of rows the noise is less
    seen = power_table(table, (2, 5))  # and those of the test set
    assert list(seen.columns) == ["200 identities", "1,000 identities", "5,000 identities"]
    assert (seen.loc[5] < seen.loc[2]).all()
    gains = gains_table(table)
    assert list(gains["published gain"].iloc[[0, -1]].round(2)) == [0.14, 1.55]
    assert set(gains["seeds with 200 identities"]) == {"never"}
    assert int(gains["seeds with 5,000 identities"].iloc[-1]) > 5
    page = (COMMITTED.parent / "README.md").read_text(encoding="utf-8")
    five, ten = power_table(table, (5, 10))["1,000 identities"]
    band = sensitivity_table(committed()).query("own and row == 'fmfa'").iloc[0]
    assert f"would fall, {band['further_low']:.1f} to {band['further_high']:.1f} % for FMFA" in page
    assert f"detect differences of {five:.1f} points, ten seeds {ten:.1f}**" in page
    largest, following = gains["seeds with 1,000 identities"].iloc[[-1, -2]]
    assert f"would need {largest} seeds per row, the next (0.81) {following}, and" in page
    wide = power_table(components_table(read_results(COMMITTED.parent / "wide")), (5, 10))
    few, many = wide.loc[5, ["1,000 identities", "5,000 identities"]]
    ten = wide.loc[10, "1,000 identities"]
    assert f"{few:.1f} points with five seeds and 1,000 test people, {ten:.1f} with ten seeds, and {many:.1f}" in page


def test_one_seed_has_no_power_table(results):
    for path in [p for p in results.iterdir() if p.name[-1] in "123"]:
        shutil.rmtree(path)
    table = components_table(read_results(results))
    assert table.empty
    assert plot_power(table) is None
    assert selection_table(read_results(results))["row"].tolist() == ["all rows"]


def test_selecting_on_test_by_hand(tmp_path):
    # Two persons, two runs that each know one of them: whoever is shown picks a run that knows nobody else.
    for seed, hits in enumerate(([1, 1, 0, 0], [0, 0, 1, 1])):
        write_run(tmp_path, f"irra-{seed}", hits, best=0.4 + seed / 10)
    for path in tmp_path.glob("*/queries-test.csv"):
        evaluate(path.parent, {"queries-test": pd.read_csv(path).assign(identity=[0, 0, 1, 1])})
    line = selection_table(read_results(tmp_path), halves=20).iloc[0]
    assert (line["claimed"], line["on other people"], line["optimism"]) == (100, 0, 100)
    assert (line["mean of the runs"], line["lucky run"], line["chosen on validation"]) == (50, -50, 50)


def epochs(*hits):
    """Hits of two persons, who have three queries and one, after each epoch."""
    lines = [(epoch, person, queries, found[epoch - 1]) for person, (queries, found) in enumerate(zip((3, 1), hits))
             for epoch in range(1, len(found) + 1)]  # fmt: skip
    return pd.DataFrame(lines, columns=["epoch", "identity", "queries", "R@1"])


def test_the_best_epoch_on_test_by_hand(tmp_path):
    # Person 0 has three queries, person 1 one. Epoch 1 knows person 0 alone, epoch 2 person 1, epoch 3 a query of each.
    assert epochs_table(read_results(write_run(tmp_path, "irra-0", best_epoch=3).parent)).empty
    write_run(tmp_path, "irra-1", best_epoch=1)
    write_run(tmp_path, "clip-0", best_epoch=1)
    evaluate(tmp_path / "irra-0", {"epochs-test": epochs([3, 0, 1], [0, 1, 1])})
    evaluate(tmp_path / "irra-1", {"epochs-test": epochs([1, 3, 0], [0, 1, 0])})
    table = epochs_table(read_results(tmp_path), halves=40)
    assert table["row"].tolist() == ["irra"]
    line = table.iloc[0]
    assert (line["runs"], line["epochs"]) == (2, 3)
    assert line["chosen on validation"] == (50 + 25) / 2
    assert line["best on test"] == (75 + 100) / 2
    assert line["added"] == (25 + 75) / 2
    assert line["best epoch of the best run"] == 100
    # Run 0: whoever is shown, an epoch with 100 % there is picked, the first of equals, and has 0 on the other person.
    # Run 1: epoch 2 knows both, so nothing is lost.
    assert line["optimism"] == pytest.approx(100 / 2)


@pytest.mark.parametrize("content", ["", "null", "{}", '{"status": "finished", "best": 0.5, "seed": 0}'])
def test_runs_without_a_readable_record_are_left_out_of_what_needs_it(tmp_path, content):
    for run in ("irra-0", "clip-0"):
        evaluate(write_run(tmp_path, run, draw(0.5, 0), best_epoch=1), {"epochs-test": epochs([3, 0], [0, 1])})
    (tmp_path / "clip-0" / "run.json").write_text(content)
    assert epochs_table(read_results(tmp_path), halves=4)["row"].tolist() == ["irra"]
    assert tuning_table(read_results(tmp_path)).empty
    selection_table(read_results(tmp_path), halves=4)


def test_tables_that_the_disk_does_not_give_are_told(tmp_path):
    folder = write_run(tmp_path, "irra-0", draw(0.6, 0))
    (folder / "queries-test.csv").unlink()
    (folder / "queries-test.csv").symlink_to("/proc/self/mem")
    assert "cannot be read: Input/output error" in run_results(read_results(tmp_path))["status"].iloc[0]
    with pytest.raises(ConfigError, match="irra-0 cannot be read"):
        export_results(tmp_path, tmp_path / "x")


def test_selecting_on_test_among_equal_and_unequal_runs(results):
    table = selection_table(read_results(results)).set_index("row")
    assert set(table.index) == {"clip", "irra", "fmfa", "asdm", "all rows"}
    assert (table["optimism"] > -1).all()
    assert table["optimism"].mean() > 0
    assert table.loc["irra", "chosen on validation"] == pytest.approx(100 * draw(0.6, 3).mean())
    assert np.isnan(table.loc["all rows", "chosen on validation"])  # sdm-efa kept no validation
    for seed in range(4):
        evaluate(results / f"irra-{seed}", {"queries-test": queries(draw(0.6, 0))})
    equal = selection_table(read_results(results)).set_index("row").loc["irra"]
    assert equal["optimism"] == pytest.approx(0, abs=1.5)  # nothing to choose from: halves differ by chance alone


def grounding(folder, hits):
    lines = [{"map": name, "part": part, "visibility": "all", "phrases": 50, "hit": hit, "chance_hit": 0.1,
              "prior_hit": 0.3} for name, hit in hits.items() for part in ("all", "bag")]  # fmt: skip
    evaluate(folder, {"grounding-test": pd.DataFrame(lines)})


def test_grounding_against_retrieval(results):
    assert grounding_runs(read_results(results)).empty
    assert correlation_table(grounding_runs(read_results(results)), "map", "over chance").empty
    rng = np.random.default_rng(0)
    for folder in results.glob("*-[0-3]"):
        if (folder / "queries-test.csv").is_file():
            share = pd.read_csv(folder / "queries-test.csv")["R@1"].mean()
            grounding(folder, {"token-patch": 0.2 + share / 2, "gradient": rng.random()})
    table = grounding_runs(read_results(results))
    assert len(table) == 2 * 17
    line = table[(table["row"] == "irra") & (table["seed"] == 1) & (table["map"] == "token-patch")].iloc[0]
    assert line["over chance"] == pytest.approx(10 + line["R@1"] / 2)
    assert line["over prior"] == pytest.approx(line["over chance"] - 20)
    found = correlation_table(table, "map", "over chance").set_index("map")
    assert found.loc["token-patch", "rho"] == pytest.approx(1)
    one = table[table["map"] == "gradient"]
    assert found.loc["gradient", "rho"] == pytest.approx(stats.spearmanr(one["over chance"], one["R@1"]).statistic)
    assert found.loc["gradient", "low"] < found.loc["gradient", "rho"] < found.loc["gradient", "high"]
    assert list(found["rows"]) == [5, 5]
    few = correlation_table(table[table["row"].isin(["irra", "clip"])], "map", "over chance")
    assert few["low"].isna().all()
    figure = plot_against_retrieval(table, "map", "over chance", "pointing game over chance (points)")
    assert "n = 17 runs" in figure.axes[0].get_ylabel()


def test_known_answers_agree_by_sign_and_rank(results):
    for seed in range(4):
        write_run(results, f"irra-wrong-80-{seed}", draw(0.2, seed))
        write_run(results, f"asdm-no-offset-{seed}", draw(0.95, seed))
    table = claims_table(read_results(results), kind="known").set_index("row")
    ours = table.loc[["irra-wrong-80", "asdm-no-offset"]]
    assert ours["real data"].tolist() == [-34.8, -48.0]
    assert ours["verdict"].tolist() == ["as on real data", "not as on real data"]
    known = pd.DataFrame({"claim": list("abcdef"), "seeds": 2, "real data": [-70.0, -30, -8, -3, 20, 40],
                          "R@1 difference": [-20.0, -40, -5, 3, 9, 30]})  # fmt: skip
    known = known.assign(low=known["R@1 difference"] - 0.5, high=known["R@1 difference"] + 0.5)
    rho = stats.spearmanr(known["real data"], known["R@1 difference"]).statistic
    told = re.fullmatch(r"5 of 6 .* rank correlation is ([\d.]+) \[([\d.]+), ([\d.]+)\]\.", agreement(known))
    value, low, high = map(float, told.groups())
    assert value == pytest.approx(rho, abs=0.005)
    assert low < value <= high < 1
    assert "5 are needed" in agreement(known[:4])
    axis = plot_known(known).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == list("abcdef")
    shown = [line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata()) == len(known)]
    assert shown == [known["real data"].tolist(), known["R@1 difference"].tolist()]
    assert plot_known(known[:0]) is None


def test_changed_attributes(results):
    lines = [{"kind": "picture", "attribute": name, "pairs": 9, "right": 0.7, "effect": 0.2} for name in ("all", "bag")]
    evaluate(results / "clip-0", {"counterfactual-test": pd.DataFrame(lines)})
    table = counterfactual_runs(read_results(results))
    assert table[["row", "seed", "kind", "moves right", "pairs"]].values.tolist() == [["clip", 0, "picture", 70.0, 9]]


def test_figures_are_labelled_and_show_every_row(results):
    axis = plot_comparison(read_results(results)).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()][-1] == "sdm-efa (1 seed)"
    assert f"n = {PEOPLE * QUERIES} queries of {PEOPLE} identities" in axis.get_xlabel()
    claims = plot_claims(claims_table(read_results(results))).axes[0]
    assert "IRRA beats plain CLIP fine-tuning." in [label.get_text() for label in claims.get_yticklabels()]
    assert "points" in plot_power(components_table(read_results(results))).axes[0].get_ylabel()
    assert plot_claims(claims_table(read_results(results), kind="oracles")) is None
    with pytest.raises(ConfigError, match="no run was evaluated on val"):
        plot_comparison(read_results(results), "val")


def test_an_exported_folder_gives_the_same_tables(results, tmp_path):
    grounding(results / "irra-0", {"gradient": 0.4})
    (results / "irra-0" / "metrics.csv").write_text("run,split,epoch,step,metric,value\n")
    (results / "irra-0" / "train.html").write_text("large")
    write_run(results, "alpha=0.3-0", draw(0.5, 8), best_epoch=4)  # a point of a curve; the others record none
    target = tmp_path / "exported"
    for _ in range(2):  # a second export replaces the first
        export_results(results, target)
    names = {"identities", "levels", "grounding"}  # nothing was logged, changed, or kept by epoch
    assert {path.name for path in target.iterdir()} == {"runs.csv", *(f"{name}.csv.xz" for name in names)}
    exported = read_results(target)
    assert pd.read_csv(target / "runs.csv", dtype=str)["best_epoch"].dropna().tolist() == ["4"]
    assert len(exported.queries("test", "zero-shot")) == 1
    written, read = pd.read_csv(results / "irra-0/queries-test.csv"), exported.queries("test")["irra-0"]
    assert (read["identity"] == written["identity"]).all()
    for metric in METRICS:
        means = [table.groupby("identity")[metric].mean() for table in (written, read)]
        assert np.allclose(*means, atol=1e-4)
    tables = (run_results, seeds_table, claims_table, grounding_runs)
    live = read_results(results)
    assert len(sensitivity_table(live)) == 2
    for make in (*tables, sensitivity_table, lambda results: rows_paired_table(results, "irra")):
        pd.testing.assert_frame_equal(make(live), make(exported))
    again = tmp_path / "again"
    export_results(target, again)
    for path in filter(Path.is_file, target.rglob("*")):
        assert (again / path.relative_to(target)).read_bytes() == path.read_bytes()


def test_parameters_name_what_is_there(results):
    good = {"results": str(results), "baseline": "ivt", "tuning": "", "away": [], "split": "test", "seed": 0}
    declared = declare_parameters({name: (value, "help") for name, value in good.items()})
    resolve_parameters(declared, good)
    live = read_results(results)
    assert rows_paired_table(live, "ivt")["R@1 difference"].isna().all()  # its only run failed, but is there
    with pytest.raises(ConfigError, match="of the rows asdm, broken, clip"):
        rows_paired_table(live, "irrra")
    for wrong in ({"results": str(results / "nowhere")}, {"away": [str(results), str(results / "nowhere")]}):
        with pytest.raises(ConfigError, match="nowhere is no folder"):
            resolve_parameters(declared, good | wrong)


# --- what did not finish, or is damaged


@pytest.mark.parametrize("name", ["queries-test.csv", "queries-test-zero-shot.csv", "grounding-test.csv",
                                  "evaluation-test.json"])  # fmt: skip
def test_a_run_whose_evaluation_is_not_whole_is_left_out_and_named(tmp_path, name):
    for run, share in (("clip-0", 0.3), ("irra-0", 0.6)):
        grounding(write_run(tmp_path, run, draw(share, 0), start=draw(0.2, 9)), {"gradient": 0.4})
    path = tmp_path / "irra-0" / name
    whole = path.read_bytes()
    third = len(whole) // 3
    damaged = [whole[:0], whole[:third], whole[:-2], whole + whole[-9:], None]
    if name.endswith(".csv"):
        damaged.append(whole[:third] + bytes([whole[third] ^ 1]) + whole[third + 1 :])
    for content in damaged:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        rows = set(seeds_table(read_results(tmp_path))["row"])
        assert "clip" in rows
        assert "irra" not in rows
        assert grounding_runs(read_results(tmp_path))["row"].tolist() == ["clip"]
        status = run_results(read_results(tmp_path)).set_index("run")["status"]
        assert status["clip-0"] == "finished"
        assert status["irra-0"].startswith("finished; left out: ")
        assert str(path.parent) in status["irra-0"]
        for read in (lambda: read_evaluation(path.parent, "test"), lambda: export_results(tmp_path, tmp_path / "x")):
            with pytest.raises(ConfigError, match="irra-0"):
                read()
        path.write_bytes(whole)
    assert "irra" in set(seeds_table(read_results(tmp_path))["row"])


def test_an_evaluation_stopped_between_two_files_is_the_old_one_or_none(tmp_path, monkeypatch):
    write_run(tmp_path / "runs", "irra-0", draw(0.6, 0), start=draw(0.2, 9))
    old, new, replace = draw(0.6, 0).mean(), draw(0.1, 1).mean(), os.replace
    found = []
    for allowed in range(5):
        left = iter(range(allowed))

        def stop(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        again = shutil.copytree(tmp_path / "runs", tmp_path / f"again-{allowed}")
        monkeypatch.setattr(os, "replace", stop)
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(again / "irra-0", {"queries-test": queries(draw(0.1, 1)), "grounding-test": queries(draw(0.1, 1))})
        monkeypatch.setattr(os, "replace", replace)
        run = run_results(read_results(again)).iloc[0]
        found.append("did not finish" if "did not finish" in run["status"] else run["R@1"])
    assert found == [pytest.approx(100 * old), *3 * ["did not finish"], pytest.approx(100 * new)]


def test_no_flipped_bit_in_the_record_of_an_evaluation_is_taken(tmp_path):
    folder = write_run(tmp_path, "irra-0", draw(0.6, 0), start=draw(0.2, 9))
    path, known = folder / "evaluation-test.json", read_evaluation(folder, "test")
    whole, still_json = path.read_bytes(), 0
    for place in range(0, 8 * len(whole), 11):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            still_json += json.loads(damaged) != known
        with contextlib.suppress(ConfigError):
            assert read_evaluation(folder, "test") == known
    assert still_json > 100


def test_a_file_that_no_evaluation_lists_is_not_read(tmp_path):
    folder = write_run(tmp_path, "irra-0", draw(0.6, 0))
    queries(draw(0.5, 1)).to_csv(folder / "queries-test-shuffled.csv", index=False)
    assert shuffled_table(read_results(tmp_path)).empty
    (folder / "evaluation-test.json").unlink()
    assert "evaluation-test.json is missing" in read_results(tmp_path).runs["left_out"].iloc[0]
    assert read_evaluation(folder, "val") == {}


def test_a_damaged_file_of_exported_results_is_told(results, tmp_path):
    target = tmp_path / "exported"
    export_results(results, target)
    for path in target.iterdir():
        whole = path.read_bytes()
        for content in (b"", whole[:20], whole[: len(whole) // 2] if path.suffix == ".xz" else b"\xff" + whole):
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=f"{path.name} is damaged"):
                read_results(target)
            path.write_bytes(whole)
    assert len(read_results(target).runs) == 19


def test_the_command_says_what_it_copied_or_why_not(results, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "RUNS" in capsys.readouterr().err.upper()
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    wrong = {"/nope": "holds no run", str(tmp_path / "none"): "holds no run", str(tmp_path / "file"): "holds no run"}
    for runs, words in wrong.items():
        assert main([runs, str(tmp_path / "x")]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert words in told.err
        assert runs in told.err
        assert not (tmp_path / "x").exists()
    assert main([str(results), str(results)]) == 2
    assert main([str(results), str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main([str(results), str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}: 19 runs copied\n"


def entry(**changes):
    return {"claim": "A helps.", "row": "a", "minus": "b", **changes}


@pytest.mark.parametrize("content", [
    "", "claims", "[]", "claims:", "claims: {}", "claims: []", "claims: [null]", "claims: [[a]]", "claims: [{row: a}]",
    "oracles: [{claim: A., row: a, minus: b}]", "claims: [&x [*x]]", "claims: " + 2000 * "[", "claims: [1, 2]]", "\x00",
    "claims: [{claim: A., row: a, minus: b, [1]: c}]", "? [a]\n: b", "claims: [{claim: A., row: [a], minus: b}]",
    'claims: [{claim: "\\ud800", row: a, minus: b}]', "!!python/object/apply:os.system [ls]", "%YAML 9.9\n---\na: b",
    *(yaml.dump({"claims": [entry(**change)]}) for change in (
        {"expected": "beyond"}, {"published": "FMFA"}, {"published": ["FMFA"]}, {"published": [["FMFA"], "IRRA"]},
        {"paper": ""}, {"row": ""}, {"extra": "x"}, {"minus": "a\nb"}, {"expected": ["above"]})),
])  # fmt: skip
def test_a_damaged_file_of_claims_is_told_in_one_sentence(tmp_path, monkeypatch, content):
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims.yml")
    with pytest.raises(ConfigError, match=r"claims\.yml"):  # it is not there
        claims_table(read_results(tmp_path))
    (tmp_path / "claims.yml").write_text(content)
    with pytest.raises(ConfigError, match=r"claims\.yml"):
        claims_table(read_results(tmp_path))


@given(st.data())
def test_any_change_of_claims_and_published_numbers_is_read_or_told(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    nothing = read_results(folder)
    for module, name in ((claims, "CLAIMS"), (tables, "PUBLISHED")):
        content = getattr(module, name).read_bytes()
        start, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
        bits = [b"\n", b"- ", b": ", b"{", b"]", b'"', b",", b"null", b"\t", b"&a ", b"*a", b"|", b"!!int x", b"\xff"]
        inserted = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from(bits)))
        changed = folder / getattr(module, name).name
        changed.write_bytes(content[:start] + inserted + content[start + length :])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, changed)
            for make in (claims_table, lambda _: published_table(), components_table):
                with contextlib.suppress(ConfigError):  # and no other error
                    make(nothing)


@pytest.mark.parametrize("content", [
    "", "R1", "dataset,method,initialisation\na,b,c\n", "dataset,method,initialisation,R1\na,b,c,much\n",
    "dataset,method,initialisation,R1\na,b,c,101\n", "dataset,method,initialisation,R1\na,b,c,nan\n",
    "dataset,method,initialisation,R1\na,b,c,1\na,b,c,2\n", "dataset,method,initialisation,R1\na,,c,1\n",
    "dataset,method,initialisation,R1\na\n", 'dataset,method,initialisation,R1\n"a,b,c,1\n', "\x00\x00",
])  # fmt: skip
def test_damaged_published_numbers_are_told_in_one_sentence(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tables, "PUBLISHED", tmp_path / "published.csv")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"published\.csv"):
            published_table()
        (tmp_path / "published.csv").write_text(content)
