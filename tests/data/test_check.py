import json
import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from formats import FORMATS, copy_with, dump, people, png_header, write_cuhk, write_icfg, write_rstp
from PIL import Image

from fmfa.data.annotations import Dataset, read_dataset
from fmfa.data.check import check_dataset, main
from fmfa.errors import ImageError
from fmfa.text.bytepair import clip_tokenizer, small_tokenizer
from fmfa.text.wordpiece import wordpiece_tokenizer


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    return write_cuhk(tmp_path_factory.mktemp("cuhk"))


def check(root, **options):
    return check_dataset(read_dataset(root), progress=False, **options)


def row(report, name):
    """Severity, count and detail of one check."""
    rows = report.table[report.table["check"] == name]
    assert len(rows) == 1, report.table
    return tuple(rows[["severity", "count", "detail"]].iloc[0])


def not_ok(report):
    """The checks that found something, counts apart: these differ from the published ones in every test."""
    worse = report.table[report.table["severity"].isin(["fatal", "warning"])]["check"]
    return {name for name in worse if not name.startswith(("counts of", "RSTPReid"))}


def change_record(position, **changes):
    def change(records):
        records[position] = {**records[position], **changes}
        return records

    return change


@pytest.mark.parametrize("name", FORMATS)
def test_whole_data_sets_pass(tmp_path, name):
    FORMATS[name](tmp_path)
    report = check(tmp_path)
    assert not report.fatal
    assert not_ok(report) == set()
    assert "can be used for training" in report.verdict
    assert list(report.table.columns) == ["check", "severity", "count", "detail"]
    assert {"reading"} >= {n for n in report.table["check"] if list(report.table["check"]).count(n) > 1}


def test_missing_pictures_are_counted_by_folder(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, lambda records: records)
    for identity in (1, 2, 3, 4):
        (tmp_path / "imgs" / "cam0" / f"{identity:05d}_0.png").unlink()
    (tmp_path / "imgs" / "cam1" / "00001_1.png").unlink()
    report = check(tmp_path)
    severity, count, detail = row(report, "missing pictures")
    assert (severity, count) == ("fatal", 5)
    assert "cam0: 4 of 10, such as cam0/00001_0.png, cam0/00002_0.png, cam0/00003_0.png;" in detail
    assert detail.endswith("cam1: 1 of 10, such as cam1/00001_1.png")
    assert row(report, "unreadable pictures") == ("ok", 0, "all 15 decode in full")
    assert report.fatal
    assert report.verdict == "CUHK-PEDES cannot be used for training: missing pictures."


def test_missing_folders(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, lambda records: records)
    (tmp_path / "imgs" / "cam1").rename(tmp_path / "imgs" / "away")
    report = check(tmp_path)
    assert row(report, "missing pictures")[1] == 10
    assert row(report, "missing pictures")[2].startswith("cam1: 10 of 10, such as cam1/")
    (tmp_path / "imgs").rename(tmp_path / "images")
    report = check(tmp_path)
    assert row(report, "image folder")[0] == "fatal"
    assert "missing pictures" not in set(report.table["check"])
    given = check_dataset(read_dataset(tmp_path, images=tmp_path / "images"), progress=False)
    assert row(given, "image folder")[0] == "ok"


@pytest.mark.parametrize("enough", [1, 1000])
def test_damaged_pictures_are_named(cuhk, tmp_path, enough, monkeypatch):
    monkeypatch.setattr("fmfa.data.check._WORTH_PROCESSES", enough)
    copy_with(cuhk, tmp_path, lambda records: records)
    folder = tmp_path / "imgs" / "cam0"
    whole = (folder / "00001_0.png").read_bytes()
    (folder / "00001_0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "00002_0.png").write_bytes(b"")
    (folder / "00003_0.png").write_bytes(png_header(60_000, 60_000))
    (folder / "00004_0.png").unlink()
    (folder / "00004_0.png").mkdir()
    report = check(tmp_path)
    assert row(report, "missing pictures")[:2] == ("fatal", 1)  # a folder is no file
    severity, count, detail = row(report, "unreadable pictures")
    assert (severity, count) == ("fatal", 3)
    assert detail.startswith("cam0/00001_0.png: ")
    assert "cam0/00002_0.png: the file is empty" in detail
    assert "cam0/00003_0.png: too large" in detail
    assert str(tmp_path) not in detail


def test_without_decoding_the_report_says_so(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, lambda records: records)
    (tmp_path / "imgs" / "cam0" / "00001_0.png").write_bytes(b"")
    report = check(tmp_path, decode=False)
    assert row(report, "unreadable pictures") == ("note", 0, "20 pictures are there but were not decoded")


def test_links_are_followed(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, lambda records: records)
    imgs = tmp_path / "imgs"
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    (imgs / "cam0" / "00001_0.png").unlink()
    (imgs / "cam0" / "00001_0.png").symlink_to(tmp_path / "other.png")
    (imgs / "cam0" / "00002_0.png").unlink()
    (imgs / "cam0" / "00002_0.png").symlink_to(imgs / "cam0" / "00003_0.png")
    (imgs / "cam1" / "00001_1.png").unlink()
    (imgs / "cam1" / "00001_1.png").symlink_to(imgs / "nowhere.png")
    report = check(tmp_path)
    assert row(report, "missing pictures")[1] == 1
    (imgs / "cam1").rename(tmp_path / "moved")
    (imgs / "cam1").symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "00001_1.png").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "moved" / "00001_1.png")
    report = check(tmp_path)
    assert not report.fatal


def test_an_image_folder_that_is_a_link_is_fine(cuhk, tmp_path):
    dump(tmp_path / cuhk.name, json.loads(cuhk.read_text()))
    (tmp_path / "imgs").symlink_to(cuhk.parent / "imgs")
    assert not_ok(check(tmp_path)) == set()


def test_empty_captions_are_fatal_and_can_be_left_out(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, change_record(3, captions=["", " . ", "a man in red"]))
    report = check(tmp_path)
    severity, count, detail = row(report, "empty captions")
    assert (severity, count) == ("fatal", 2)
    assert "(record 3)" in detail
    left = check_dataset(read_dataset(tmp_path, drop_empty_captions=True), progress=False)
    assert row(left, "empty captions")[0] == "ok"
    assert any("2 empty captions were left out" in detail for detail in left.table["detail"])


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("man " * 18, 0),
        ("man " * 19, 1),
        ("unwordlike " * 12, 1),
        ("é" * 18 + " ", 0),
        ("这名年轻女子", 0),
        ("这名年轻女子穿着一件", 1),
    ],
)
def test_long_captions_by_tokens(cuhk, tmp_path, caption, found):
    tokenizer = clip_tokenizer(20)
    copy_with(cuhk, tmp_path, lambda records: [{**r, "captions": ["a man", caption]} for r in records[:1]])
    severity, count, detail = row(check(tmp_path, tokenizer=tokenizer), "captions longer than the context")
    # The oracle: a longer context gives a longer row.
    needed = int((clip_tokenizer(100)([caption]) != 0).sum())
    assert (needed > 20) == bool(found)
    assert (severity, count) == ("warning" if found else "ok", found)
    assert "the 20 positions that the tokenizer has" in detail
    assert detail.endswith(f"the longest needs {needed}." if found else f"the longest {needed}")


def test_tokens_are_clips_on_simpedes_the_tiny_clips_and_in_training_the_systems(cuhk, tmp_path):
    pieces = "unwordlike " * 30  # CLIP's vocabulary has longer pieces than the small one
    copy_with(cuhk, tmp_path, change_record(2, captions=[pieces, "word " * 70]))
    dataset = read_dataset(tmp_path)
    needed = {"clip": clip_tokenizer(500).length(pieces), "small": small_tokenizer(context_length=500).length(pieces)}
    assert 77 < needed["clip"] < needed["small"]
    name = "captions longer than the context"
    for given, tokenizer, count, longest in (
        (dataset, None, 1, needed["clip"]),
        (replace(dataset, name="SimPEDES-street"), None, 2, needed["small"]),
        (dataset, small_tokenizer(), 2, needed["small"]),
        (dataset, wordpiece_tokenizer("data/wordpiece.txt"), 0, 0),
    ):
        _, found, detail = row(check_dataset(given, tokenizer=tokenizer, decode=False), name)
        assert found == count
        assert f"{longest or ''}" in detail


def test_copied_captions(cuhk, tmp_path):
    def copy(records):
        records[0]["captions"] = ["the same text", "own"]
        records[1]["captions"] = ["the same text", "own"]  # The same identity: no fault.
        return records

    copy_with(cuhk, tmp_path / "a", copy)
    assert row(check(tmp_path / "a"), "captions copied onto other identities")[0] == "ok"
    copy_with(cuhk, tmp_path / "b", lambda r: change_record(4, captions=[" the same text", "x"])(copy(r)))
    severity, count, detail = row(check(tmp_path / "b"), "captions copied onto other identities")
    assert (severity, count) == ("warning", 3)
    assert "1 different texts" in detail


@pytest.mark.parametrize(
    ("position", "split", "severity"), [(0, "test", "fatal"), (0, "val", "warning"), (-1, "val", "warning")]
)
def test_identities_in_two_splits(cuhk, tmp_path, position, split, severity):
    copy_with(cuhk, tmp_path, change_record(position, split=split))
    report = check(tmp_path)
    assert row(report, "identities in two splits")[:2] == (severity, 1)
    assert report.fatal == (severity == "fatal")
    assert row(report, "images in two splits")[0] == "ok"


def test_an_image_in_train_and_test_is_fatal(cuhk, tmp_path):
    first = json.loads(cuhk.read_text())[0]
    copy_with(cuhk, tmp_path, change_record(-1, file_path=first["file_path"]))
    report = check(tmp_path)
    assert row(report, "images in two splits") == (
        "fatal",
        1,
        "cam0/00001_0.png (train, test). No model may be tested on what it was trained on.",
    )
    assert row(report, "images named by two identities")[:2] == ("fatal", 1)
    assert "cam0/00001_0.png (1, 10)" in row(report, "images named by two identities")[2]


@pytest.mark.parametrize("position", [0, -3, -1], ids=["train", "val", "test"])
def test_a_picture_of_two_people_is_fatal_in_any_split(cuhk, tmp_path, position):
    def list_twice(records):
        return [*records, {**records[position], "id": 77, "captions": ["another person"]}]

    copy_with(cuhk, tmp_path, list_twice)
    report = check(tmp_path, decode=False)  # as training looks at the data
    assert report.fatal
    assert row(report, "images named by two identities")[:2] == ("fatal", 1)
    assert ", 77)" in row(report, "images named by two identities")[2]


@pytest.mark.parametrize("enough", [1, 1000])
def test_copies_of_pictures_are_found_by_their_pixels(cuhk, tmp_path, enough, monkeypatch):
    monkeypatch.setattr("fmfa.data.check._WORTH_PROCESSES", enough)
    copy_with(cuhk, tmp_path, lambda records: records)
    folder = tmp_path / "imgs"
    (folder / "cam1" / "00001_1.png").write_bytes((folder / "cam0" / "00001_0.png").read_bytes())
    Image.open(folder / "cam0" / "00002_0.png").save(folder / "cam1" / "00003_1.png", compress_level=0)
    for name in ("cam0/00007_0.png", "cam0/00008_0.png", "cam1/00009_1.png", "cam0/00010_0.png"):
        (folder / name).write_bytes((folder / "cam0" / "00006_0.png").read_bytes())
    report = check(tmp_path)
    assert not report.fatal
    assert row(report, "identical pictures within a split") == (
        "warning",
        2,
        "cam0/00001_0.png (train, identity 1) = cam1/00001_1.png (train, identity 1); "
        "cam0/00002_0.png (train, identity 2) = cam1/00003_1.png (train, identity 3). "
        "Keep one of each; where the identities differ, one of them is wrong.",
    )
    severity, count, detail = row(report, "identical pictures in two splits")
    assert (severity, count) == ("warning", 1)
    assert detail.startswith(
        "cam0/00006_0.png (train, identity 6) = cam0/00007_0.png (val, identity 7) = "
        "cam0/00008_0.png (val, identity 8) = 2 more."
    )
    assert row(check(tmp_path, decode=False), "identical pictures")[:2] == ("note", 0)


@pytest.mark.parametrize(
    ("identities", "severity", "words"),
    [
        ((3701, 200, 200), "note", "the usual split"),
        ((3901, 100, 100), "note", "the older split"),
        ((3801, 150, 150), "warning", "expected 3701 / 200 / 200 or the older"),
    ],
)
def test_rstpreid_versions_and_published_counts(tmp_path, identities, severity, words):
    write_rstp(tmp_path, identities, pictures=False)
    report = check(tmp_path, decode=False)
    found = row(report, "RSTPReid split version")
    assert found[0] == severity
    assert words in found[2]
    counts = "ok" if severity == "note" else "warning"
    for split, number in zip(("train", "val", "test"), identities):
        assert row(report, f"counts of {split}")[:2] == (counts, number * 10)


def published_table(train_images):
    """ICFG-PEDES as counted by its authors, without files; 200 identities of train are held out."""
    identity = [i % 3102 for i in range(train_images)] + [4000 + i % 1000 for i in range(19848)]
    held_out = [i < 200 for i in identity]
    split = ["val" if h else "train" if i < 4000 else "test" for i, h in zip(identity, held_out)]
    return pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(len(identity))],
            "identity": identity,
            "split": split,
            "caption": [f"person {i}" for i in range(len(identity))],
            "record": range(len(identity)),
            "held_out": held_out,
        }
    )


@pytest.mark.parametrize(("images", "severity"), [(34674, "ok"), (34670, "warning")])
def test_held_out_identities_count_with_train(tmp_path, images, severity):
    dataset = Dataset("ICFG-PEDES", tmp_path, published_table(images), ("a note",))
    report = check_dataset(dataset, decode=False)
    assert row(report, "counts of train")[:2] == (severity, images)
    assert row(report, "counts of test") == (
        "ok",
        19848,
        "1,000 identities, 19,848 images, 19,848 captions; as published",
    )
    assert row(report, "counts of val")[0] == "note"
    assert "200 identities" in row(report, "counts of val")[2]
    assert row(report, "reading") == ("note", 0, "a note")


def test_missing_splits_are_said(tmp_path):
    dump(tmp_path / "mine.json", people(tmp_path, (0, 0, 2), 1, 1))
    report = check(tmp_path)
    assert row(report, "counts of train")[::2] == ("warning", "there is no train split")
    assert row(report, "counts of test")[::2] == (
        "note",
        "2 identities, 2 images, 2 captions; no published counts to compare with",
    )


def test_the_worst_comes_first(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, change_record(0, split="test", captions=[""]))
    severities = check(tmp_path).table["severity"].tolist()
    assert severities == sorted(severities, key=["fatal", "warning", "note", "ok"].index)
    assert severities[:2] == ["fatal", "fatal"]


def test_a_decoding_process_that_dies_is_an_image_error(cuhk, monkeypatch):
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    from fmfa.data import check as pictures

    def dies(images, chunk):
        raise TerminatedWorkerError("killed")

    monkeypatch.setattr(pictures, "_decode", dies)
    with pytest.raises(ImageError, match="with more memory"):
        check(cuhk)


def test_command_line(cuhk, tmp_path, capsys):
    assert main([str(cuhk)]) == 0
    assert "CUHK-PEDES can be used for training" in capsys.readouterr().out
    copy_with(cuhk, tmp_path, change_record(0, captions=[""]))
    assert main([str(tmp_path), "--name", "my copy"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("fatal")
    assert printed.endswith("my copy cannot be used for training: empty captions.\n")
    assert main([str(tmp_path), "--drop-empty-captions"]) == 0
    assert main([str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], [""], ["  "]])
def test_without_a_folder_the_command_line_tells_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m fmfa.data.check")
    assert "give the folder of the data set" in told


@pytest.mark.parametrize(
    "name", ["picture.png", "data.zip", "nothing", "a" * 300, "a\0b", "loop", "pipe", "folder.json"]
)
def test_a_root_that_is_no_data_set_is_said_in_a_sentence(tmp_path, name, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    (tmp_path / "data.zip").write_bytes(b"PK\3\4" + bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("The data set cannot be checked: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["", "reid_raw.json"])
def test_an_unreadable_root_is_said_in_a_sentence(cuhk, tmp_path, place, capsys):
    copy_with(cuhk, tmp_path / "data", lambda records: records)
    locked = tmp_path / "data" / place
    locked.chmod(0)
    try:
        assert main([str(tmp_path / "data")]) == 2
    finally:
        locked.chmod(0o755)
    assert "ermission denied" in capsys.readouterr().err


def test_a_data_set_is_only_read(cuhk, tmp_path):
    copy_with(cuhk, tmp_path, lambda records: records)
    content = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert main([str(tmp_path)]) == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == content


def test_command_line_from_a_shell(tmp_path):
    write_icfg(tmp_path)
    (tmp_path / "imgs" / "cam0" / "00000_0.jpg").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "fmfa.data.check", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "00000_0.jpg: the file is empty" in done.stdout
    assert done.stderr == ""
