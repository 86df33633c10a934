import json
import os
import subprocess

import numpy as np
import pandas as pd
import pytest

from fmfa.data.annotations import Dataset, data_fingerprint
from fmfa.errors import TrainingError
from fmfa.files import write_json
from fmfa.records import (
    MetricsLog,
    device_name,
    git_state,
    package_versions,
    read_metrics,
    read_record,
    row_of,
    run_record,
)


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": np.int64(1), "b": np.float32(0.5), "c": tmp_path})
    assert json.loads(path.read_text()) == {"a": 1, "b": 0.5, "c": str(tmp_path)}
    before = path.read_bytes()
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(ValueError, match="JSON"):
            write_json(path, bad)

    def full(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_record_says_how_the_run_ended(tmp_path):
    with run_record(tmp_path, config={"seed": 3}) as notes:
        assert read_record(tmp_path)["status"] == "running"
        notes["best"] = 12.5
    record = read_record(tmp_path)
    assert (record["status"], record["best"], record["error"]) == ("finished", 12.5, None)
    assert record["started"] <= record["finished"]
    assert record["versions"]["numpy"] == np.__version__


def test_a_run_keeps_its_row_wherever_its_folder_goes(tmp_path):
    folder = tmp_path / "irra-padding-mask-12"
    folder.mkdir()
    with run_record(folder):
        pass
    folder.rename(tmp_path / "copy of it")
    with run_record(tmp_path / "copy of it"):
        pass
    assert row_of(tmp_path / "copy of it") == "irra-padding-mask"
    assert row_of(tmp_path / "fmfa-released-0") == "fmfa-released"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad\nnews"), "failed"),
        (KeyboardInterrupt("x"), "interrupted"),
        (SystemExit(1), "interrupted"),
    ],
)
def test_a_record_keeps_the_error_and_lets_it_through(tmp_path, error, status):
    with pytest.raises(type(error)), run_record(tmp_path):
        raise error
    record = read_record(tmp_path)
    assert record["status"] == status
    assert type(error).__name__ in record["error"]


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError("No space left on device")

    def body():
        with run_record(tmp_path):
            monkeypatch.setattr(os, "replace", full)
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        body()


def test_a_second_start_keeps_the_first_time(tmp_path):
    for _ in range(3):
        with run_record(tmp_path):
            pass
    record = read_record(tmp_path)
    assert len(record["resumed"]) == 2
    assert record["started"] <= record["resumed"][0]


def git(folder, *command):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True)


def test_git_state_follows_the_checkout(tmp_path):
    nowhere = {"commit": None, "dirty": None}
    inside = tmp_path / "inside"
    inside.mkdir()
    assert git_state(tmp_path) == nowhere
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}
    assert git_state(inside) == nowhere  # somebody else's checkout around an installed package
    assert git_state(tmp_path / "absent") == nowhere


def test_a_notebook_that_was_only_opened_leaves_the_commit_clean(tmp_path):
    def write(name, cells, **metadata):
        text = json.dumps(
            {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False
        )
        (tmp_path / name).write_text(text, encoding="utf-8")

    def cell(source, kind="code", tags=(), **more):
        return {"cell_type": kind, "metadata": {"tags": list(tags)}, "source": source, **more}

    parameters, body, words = cell("a: int = 1", tags=["parameters"]), cell(["x = 1\n", "x"]), cell("# é", "markdown")
    git(tmp_path, "init", "-q")
    names = ("one.ipynb", " two  é.ipynb")  # git quotes such a name
    for name in names:
        write(name, [parameters, words, body])
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    looked_at = cell("x = 1\nx", execution_count=3, outputs=[{"output_type": "stream", "text": "1"}], id="a1")
    for name in names:
        write(name, [parameters, cell("# other words", "markdown"), looked_at], kernelspec={"name": "python3"})
    assert git_state(tmp_path)["dirty"] is False
    for cells in (
        [parameters, words, cell("x = 2")],
        [parameters, words],
        [words, body, parameters],
        [cell("a: int = 1"), words, body],
        [parameters, words, body, cell("y")],
        [parameters, words, cell("x = 1\nx", "raw")],
    ):
        write(names[1], cells)
        assert git_state(tmp_path)["dirty"] is True, cells
    for content in ("", "null", "[]", "[" * 100_000, '{"cells": 3}', '{"cells": [3]}', "\ud800"):
        (tmp_path / names[1]).write_bytes(content.encode("utf-8", "surrogatepass"))
        assert git_state(tmp_path)["dirty"] is True, content
    (tmp_path / names[1]).unlink()
    assert git_state(tmp_path)["dirty"] is True
    write(names[1], [parameters, body])
    assert git_state(tmp_path)["dirty"] is False
    write("new.ipynb", [body])
    assert git_state(tmp_path)["dirty"] is True


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_versions_and_device_are_named():
    versions = package_versions()
    assert versions["python"].startswith("3.")
    assert versions["torch"]
    assert device_name("cpu").startswith("cpu: ")


@pytest.fixture
def dataset(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 10)
    columns = {"image": ["a.png", "a.png", "b.png", "c.png"], "identity": [1, 1, 2, 3], "split": "train"}
    return Dataset("toy", tmp_path, pd.DataFrame(columns | {"caption": ["w", "x", "y", "z"]}))


def test_the_fingerprint_sees_the_table_and_the_pictures(dataset):
    first = data_fingerprint(dataset)
    assert first == data_fingerprint(Dataset("another name", dataset.images, dataset.table.copy()))
    seen = {first}
    for column, value in (("caption", "other"), ("identity", 7), ("split", "test"), ("image", "b.png")):
        table = dataset.table.copy()
        table.loc[1, column] = value
        seen.add(data_fingerprint(Dataset("toy", dataset.images, table)))
    seen.add(data_fingerprint(Dataset("toy", dataset.images, dataset.table.iloc[::-1])))
    (dataset.images / "b.png").write_bytes(b"changed")
    seen.add(data_fingerprint(dataset))
    (dataset.images / "b.png").unlink()
    seen.add(data_fingerprint(dataset))
    assert len(seen) == 8


def test_the_fingerprint_does_not_join_neighbouring_values(dataset):
    table = dataset.table.copy()
    table["caption"] = ["wx", "", "y", "z"]
    assert data_fingerprint(dataset) != data_fingerprint(Dataset("toy", dataset.images, table))


@pytest.mark.parametrize("content", [b"a\n\xff\n", b"a\nr,val,1,2,R@1\n", b"a\nr,val,1,2,R@1,x\n", b"a\n\0\0\n"])
def test_damaged_metrics_are_one_sentence(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(TrainingError, match=r"metrics\.csv is damaged .*copy in its place"):
        read_metrics(tmp_path)


def test_metrics_are_long_and_cut_back_on_resume(tmp_path):
    log = MetricsLog(tmp_path)
    log.add("train", 1, 10, {"loss": 1 / 3, "R@1, half": 2})
    kept = log.path.read_bytes()
    assert log.flushed_size() == len(kept)
    log.add("val", 1, 10, {"R@1": 50.0})
    with log.path.open("a") as file:
        file.write("run,val,2,2")  # a torn line
    table = read_metrics(tmp_path)
    assert table["metric"].tolist() == ["loss", "R@1, half", "R@1"]
    assert table["value"].tolist() == [1 / 3, 2.0, 50.0]
    assert table["epoch"].dtype == "int64"
    MetricsLog(tmp_path, kept).add("val", 1, 10, {"R@1": 60.0})
    assert read_metrics(tmp_path)["value"].tolist() == [1 / 3, 2.0, 60.0]
    MetricsLog(tmp_path)
    assert read_metrics(tmp_path).empty
    assert read_metrics(tmp_path / "absent").empty
