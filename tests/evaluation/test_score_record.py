import gzip
import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from formats import write_cuhk, write_rstp

from fmfa.data.annotations import read_dataset
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, gallery_of
from fmfa.evaluation.score_record import (
    Cost,
    Queries,
    ScoreRecord,
    canonical_order,
    describe_split,
    queries_of,
    read_record,
    write_record,
)
from fmfa.files import content_checksum


def evaluated(rows, seed=0):
    gallery, draw = gallery_of(rows), torch.Generator().manual_seed(seed)
    people = torch.randn(100_000, 8, generator=draw)
    text = people[rows["identity"].tolist()] + torch.randn(len(rows), 8, generator=draw)
    image = people[gallery["identity"].tolist()] + torch.randn(len(gallery), 8, generator=draw)
    return Evaluation(rows, gallery, text, image)


def recorded(rows, seed=0):
    evaluation = evaluated(rows, seed)
    split = describe_split("CUHK-PEDES", "test", rows, evaluation.gallery)
    return ScoreRecord("mine", seed, "validation", split, Cost(8, 0, 1), queries_of(evaluation))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read_dataset(write_cuhk(tmp_path_factory.mktemp("data"), (2, 0, 9), images_each=3)).split("test")


def test_a_record_comes_back_as_it_was_and_holds_no_picture_and_no_caption(tmp_path, rows):
    record = recorded(rows)
    for name in ("a.record", "b.record"):
        write_record(record, tmp_path / name)
    assert read_record(tmp_path / "a.record") == record
    assert (tmp_path / "a.record").read_bytes() == (tmp_path / "b.record").read_bytes()
    text = gzip.decompress((tmp_path / "a.record").read_bytes()).decode()
    for value in (*rows["image"], *rows["caption"]):
        assert value not in text


def test_sums_by_identity_are_those_of_the_evaluation(rows):
    metrics = evaluated(rows).metrics[TEXT_TO_IMAGE]
    table = recorded(rows).queries.by_identity()
    means = table.drop(columns=["identity", "queries"]).sum() / table["queries"].sum()
    assert means.to_dict() == pytest.approx(metrics.summary, abs=1e-6)
    people, counts = np.unique(rows["identity"], return_counts=True)
    assert table[["identity", "queries"]].to_numpy().T.tolist() == [people.tolist(), counts.tolist()]


def test_the_order_of_the_file_changes_neither_fingerprint_nor_order(rows):
    mixed = rows.sample(frac=1, random_state=1, ignore_index=True)
    keys = ["image", "identity", "caption"]
    one, other = (table[keys].iloc[canonical_order(table)].to_numpy().tolist() for table in (rows, mixed))
    assert one == other
    assert describe_split("a", "test", rows, gallery_of(rows)) == describe_split("a", "test", mixed, gallery_of(mixed))


@pytest.mark.parametrize("column", ["image", "identity", "caption"])
def test_another_picture_identity_or_caption_is_another_split(rows, column):
    other = rows.copy()
    other.loc[other["image"] == other["image"][3], column] = {"image": "x.png", "identity": 99}.get(column, "Else.")
    one, two = (describe_split("a", "test", table, gallery_of(table)) for table in (rows, other))
    assert one.fingerprint != two.fingerprint
    assert (one.pictures == two.pictures) == (column == "caption")


@pytest.mark.parametrize(("people", "version"), [(200, "RSTPReid"), (100, "RSTPReid, older split"), (50, "")])
def test_both_splits_of_rstpreid_have_their_name(tmp_path, people, version):
    rows = read_dataset(write_rstp(tmp_path, (2, 0, people), size=(2, 2))).split("test")
    assert describe_split("RSTPReid", "test", rows, gallery_of(rows)).version == version
    assert describe_split("CUHK-PEDES", "test", rows, gallery_of(rows)).version == ""


def test_a_record_of_cuhk_pedes_size_is_small(tmp_path):
    draw = np.random.default_rng(0)
    count, ranks = 6156, np.minimum(3074, draw.geometric(0.2, 6156))
    queries = Queries(
        identity=np.repeat(np.arange(1000), 7)[:count].tolist(),
        first_rank=ranks.tolist(),
        average_precision=draw.random(count).round(6).tolist(),
        inverse_negative_penalty=(3 / draw.integers(3, 3074, count)).round(6).tolist(),
    )
    split = describe_split("a", "test", *[frame_of(7)] * 2)
    write_record(ScoreRecord("a", 0, "", split, Cost(512, 0, 1), queries), tmp_path / "a.record")
    assert (tmp_path / "a.record").stat().st_size < 60_000
    assert read_record(tmp_path / "a.record").queries == queries


def frame_of(count):
    return pd.DataFrame({"image": list(map(str, range(count))), "identity": range(count), "caption": "a"})


def broken(**changes):
    def write(path, record):
        content = json.loads(json.dumps(asdict(record)))
        for place, value in changes.items():
            *outer, last = place.split("__")
            target = content
            for name in outer:
                target = target[name]
            target[last] = value
        content["checksum"] = content_checksum(content)
        path.write_bytes(gzip.compress(json.dumps(content).encode()))

    return write


def flipped(path, record):
    write_record(replace(record, system="other"), path)
    content = json.loads(gzip.decompress(path.read_bytes())) | {"seed": 7}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, _: None, "No such file"),
        (lambda path, _: path.write_bytes(b"{}"), "no record of a scored system"),
        (lambda path, _: path.write_bytes(gzip.compress(b"[]")), "no record of a scored system"),
        (lambda path, _: path.write_bytes(gzip.compress(b"[" * 100_000)), "no record of a scored system"),
        (lambda path, record: (write_record(record, path), path.write_bytes(path.read_bytes()[:-9])), "no record"),
        (flipped, "not as its checksum says"),
        (broken(format="fmfa record 9"), "format: should be 'fmfa record 1', found 'fmfa record 9'"),
        (broken(system=3), "system: should be a valid string, found 3"),
        (broken(split=3), "no record of a scored system"),
        (broken(queries__identity=[1]), "queries: found columns of 1, 54, 54, 54 values"),
        (broken(queries__first_rank=[0] * 54), "a rank below 1"),
        (broken(queries__average_precision=[2.0] * 54), "outside of 0 to 1"),
        (broken(queries__average_precision=[float("nan")] * 54), "should be a finite number"),
        (broken(cost__rerank_depth=-1), "rerank_depth: should be greater than or equal to 0"),
    ],
)
def test_what_is_no_record_is_told(tmp_path, rows, write, message):
    path = tmp_path / "a.record"
    write(path, recorded(rows))
    with pytest.raises(ConfigError, match=message) as error:
        read_record(path)
    assert "a.record" in str(error.value)


def test_a_record_that_unpacks_to_more_than_any_record_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fmfa.evaluation.score_record.MOST_BYTES", 1000)
    (tmp_path / "a.record").write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(ConfigError, match="more than any record"):
        read_record(tmp_path / "a.record")


def test_the_class_of_a_cost_is_told():
    assert str(Cost(512, 0, 1)) == "dot products"
    assert str(Cost(512, 256, 257)) == "re-ranks 256"
    assert str(Cost(512, 16, 22)) == "re-ranks 16, 22 model calls"
    assert str(Cost(0, 0, 1)) == "not told"
