from dataclasses import replace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from fmfa.compare import compare_systems, group_records, main
from fmfa.errors import ConfigError
from fmfa.evaluation.score_record import Cost, Identities, Queries, ScoreRecord, Split, write_record
from fmfa.evaluation.statistics import compare_rows, holm

PEOPLE, EACH = 120, 5
SPLIT = Split("RSTPReid", "test", "RSTPReid", PEOPLE, 200, PEOPLE * EACH, "f" * 64, "p" * 64)


def record(name, share, seed=0, noise=0.1, **changes):
    """A system whose R@1 is about `share`; the same draw decides for all, so that differences are small but real."""
    draw = np.random.default_rng(7)
    luck = draw.random(PEOPLE * EACH) + noise * np.random.default_rng(seed + 100).normal(size=PEOPLE * EACH)
    ranks = np.where(luck < share, 1, 20)
    queries = Queries(
        identity=np.repeat(np.arange(PEOPLE), EACH).tolist(),
        first_rank=ranks.tolist(),
        average_precision=(1 / ranks).tolist(),
        inverse_negative_penalty=(1 / ranks).tolist(),
    )
    return ScoreRecord(name, seed, "validation", SPLIT, Cost(512, 0, 1), queries, {}, **changes)


def compared(*records, **options):
    return compare_systems(group_records({f"{r.system}-{r.seed}": r for r in records}), **options)


def test_systems_that_cannot_be_told_apart_share_a_rank():
    ranking, pairs = compared(record("low", 0.3), record("a", 0.6), record("b", 0.61, 1), record("c", 0.9))
    ranking = ranking.set_index("system")
    assert list(ranking.index) in (["c", "a", "b", "low"], ["c", "b", "a", "low"])
    assert ranking.loc[["c", "a", "b", "low"], "rank"].tolist() == [1, 2, 2, 4]
    assert ranking.loc[["c", "a", "b", "low"], "last rank"].tolist() == [1, 3, 3, 4]
    verdicts = pairs.set_index(["first", "second"])["verdict"]
    assert verdicts["a", "b"] == "cannot be told apart"
    assert verdicts["low", "c"] == "c is better"
    assert ranking.loc["c", "low"] < ranking.loc["c", "R@1"] < ranking.loc["c", "high"]


def test_pairs_are_tested_as_in_the_study_and_corrected_together():
    records = [record(name, share, seed) for name, share in (("a", 0.5), ("b", 0.55), ("c", 0.6)) for seed in (0, 1, 2)]
    _, pairs = compared(*records)
    values = {
        name: np.stack([(np.array(r.queries.first_rank) == 1).astype(float) for r in records if r.system == name])
        for name in "abc"
    }
    identity = np.repeat(np.arange(PEOPLE), EACH)
    direct = [compare_rows(values[a], values[b], identity, np.random.default_rng(0)) for a, b in ("ab", "ac", "bc")]
    np.testing.assert_allclose(pairs["difference"], [100 * one.difference.estimate for one in direct])
    np.testing.assert_allclose(pairs["low"], [100 * one.difference.low for one in direct], atol=1e-9)
    np.testing.assert_allclose(pairs["p"], holm([one.p_value for one in direct]), atol=1e-9)


def test_equivalence_needs_the_90_percent_interval_within_the_margin():
    same = record("a", 0.5), replace(record("b", 0.5))
    assert compared(*same)[1]["verdict"].tolist() == ["equivalent within 1"]
    near = record("a", 0.5, 0, 0.02), record("b", 0.5, 1, 0.02)
    values = [(np.array(r.queries.first_rank) == 1).astype(float)[None] for r in near]
    one = compare_rows(*values, np.repeat(np.arange(PEOPLE), EACH), np.random.default_rng(0))
    inner = one.interval(0.9)
    edge = 100 * max(-inner.low, inner.high)
    wide, narrow = (compared(*near, margin=edge * factor)[1]["verdict"].tolist() for factor in (1.1, 0.9))
    assert wide == [f"equivalent within {1.1 * edge:g}"]
    assert narrow == ["cannot be told apart"]
    assert compared(record("a", 0.5, noise=0), record("b", 0.52, noise=0), margin=20)[1]["verdict"].tolist() == [
        "b is better, equivalent within 20"
    ]


def test_seeds_that_cannot_be_paired_are_averaged():
    ranking, pairs = compared(record("a", 0.5), *(record("b", 0.8, seed) for seed in range(3)))
    assert ranking.set_index("system")["seeds"].to_dict() == {"b": 3, "a": 1}
    assert pairs["verdict"].tolist() == ["b is better"]


def test_records_that_were_kept_per_identity_compare_with_those_per_query():
    full = record("a", 0.5)
    table = full.queries.by_identity()
    sums = {name: table[name].tolist() for name in table.columns.drop(["identity", "queries"])}
    kept = replace(full, system="b", queries=Identities(table["identity"].tolist(), table["queries"].tolist(), sums))
    assert compared(full, kept)[1]["difference"].tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "RSTPReid, older split", "images": 500, "fingerprint": "0", "pictures": "0"},
         r"RSTPReid test \(200 pictures, 600 captions\) and RSTPReid, older split test \(500 pictures"),
        ({"fingerprint": "0"}, "the same pictures with other captions"),
        ({"fingerprint": "0", "pictures": "0"}, "with other pictures or identities; scores on them do not compare"),
    ],
)  # fmt: skip
def test_records_of_different_splits_are_refused(changes, message):
    other = replace(record("b", 0.5), split=replace(SPLIT, **changes))
    with pytest.raises(ConfigError, match=message):
        group_records({"b.record": other, "a.record": record("a", 0.5)})


@pytest.mark.parametrize("place", [0, 7])
def test_a_record_whose_queries_are_not_those_of_its_split_is_refused(place):
    """A record from elsewhere may say anything."""
    odd = record("b", 0.5)
    odd.queries.identity[place] = 10_000
    cut = replace(odd, system="c", queries=replace(odd.queries, **{
        name: getattr(odd.queries, name)[:-1] for name in vars(odd.queries) if not name.startswith("_")}))  # fmt: skip
    for wrong in (odd, cut):
        with pytest.raises(ConfigError, match="queries are not those of its split"):
            group_records({"a": record("a", 0.5), "b": wrong})


def test_one_system_or_a_record_given_twice_is_refused():
    with pytest.raises(ConfigError, match="records of a alone"):
        group_records({"x": record("a", 0.5)})
    with pytest.raises(ConfigError, match="y: a with seed 0 is there twice"):
        group_records({"x": record("a", 0.5), "y": record("a", 0.6)})


def test_the_command_writes_table_figure_csv_and_latex(tmp_path, capsys):
    for name, share in (("a_1", 0.5), ("b & c", 0.9)):
        write_record(record(name, share), tmp_path / f"{name[0]}.record")
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "latex", "figure.png", "pairs")}
    options = [part for name, path in files.items() for part in (f"--{name.split('.')[0]}", str(path))]
    assert main([str(tmp_path / "a.record"), str(tmp_path / "b.record"), *options]) == 0
    out = capsys.readouterr().out
    assert "b & c is better" in out
    assert "dot products" in out
    assert pd.read_csv(files["csv"])["system"].tolist() == ["b & c", "a_1"]
    assert pd.read_csv(files["pairs"])["verdict"].tolist() == ["b & c is better"]
    assert r"b \& c" in files["latex"].read_text()
    assert r"a\_1" in files["latex"].read_text()
    assert matplotlib.image.imread(files["figure.png"]).std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.record", "no.record"], "no.record is no record of a scored system"),
        (["a.record"], "records of a alone"),
        (["a.record", "b.record", "--margin", "0"], "--margin is 0.0; expected points between 0 and 100"),
        (["a.record", "b.record", "--csv", "no/such/x.csv"], "cannot be written"),
        (["a.record", "b.record", "--figure", "x.xyz"], "x.xyz: expected"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_record(record(name, 0.5), f"{name}.record")
    assert main(options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
