import json
import string
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
from formats import FORMATS, dump, people, write_cuhk, write_icfg, write_icfg_processed, write_rstp
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.data.annotations import canonical_name, read_dataset
from fmfa.errors import AnnotationError, ConfigError, FmfaError
from fmfa.simpedes.generate import generate, recipe

COLUMNS = ["image", "identity", "label", "split", "caption", "record"]


def record(**changes):
    fields = {"id": 1, "file_path": "a.png", "captions": ["a man"], "split": "train", **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def read(tmp_path, records, **options):
    return read_dataset(dump(tmp_path / "reid_raw.json", records), **options)


def expected_rows(file):
    """The rows that a file should give but for labels, by a plain loop."""
    content = json.loads(file.read_text())
    if isinstance(content, dict):
        content = [{**r, "split": s} for s in content if s in ("train", "val", "test") for r in content[s]]
    rows = []
    for position, r in enumerate(content):
        captions = r["captions"] if isinstance(r["captions"], list) else [r["captions"]]
        image = r["file_path"] if "file_path" in r else r["img_path"]
        rows += [(image, r["id"], r["split"], caption, position) for caption in captions]
    return rows


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_of_its_file(tmp_path, name):
    file = FORMATS[name](tmp_path)
    dataset = read_dataset(tmp_path)
    table = dataset.table
    assert list(table.columns[:6]) == COLUMNS
    sound(table)
    held_out = table["held_out"] if "held_out" in table else pd.Series(False, table.index)
    plain = table[COLUMNS].drop(columns="label").assign(split=table["split"].mask(held_out, "train"))
    assert list(plain.itertuples(index=False, name=None)) == expected_rows(file)
    assert held_out.any() == name.startswith("ICFG-PEDES")
    assert dataset.name == name.removesuffix(" processed")
    assert dataset.images == tmp_path / "imgs"
    for column in ("identity", "label", "record"):
        assert table[column].dtype == np.int64
    pd.testing.assert_frame_equal(table, read_dataset(file).table)


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        *((f, "CUHK-PEDES") for f in ("reid_raw.json", "caption_all.json", "CUHK-PEDES.json")),
        *((f, "CUHK-PEDES") for f in ("cuhk_pedes_att.json", "cuhk_pedes_vistxt.json")),
        *((f, "ICFG-PEDES") for f in ("ICFG-PEDES.json", "ICFG_PEDES.json", "ICFG_PEDES_VISTXT.json")),
        *((f, "ICFG-PEDES") for f in ("icfg-pedes.json", "ICFG_PEDES_PROCESS.json")),
        *((f, "RSTPReid") for f in ("data_captions.json", "RSTPReid.json", "rstpreid_vistxt.json")),
        ("annotations.json", "annotations"),
    ],
)
def test_file_names_in_the_wild(tmp_path, file_name, name):
    dump(tmp_path / file_name, [record()])
    assert read_dataset(tmp_path).name == name


def test_simpedes_is_known_by_what_lies_beside(tmp_path):
    generate(tmp_path, recipe("tiny", "station", train=2, val=2, test=2, images=1), workers=1, progress=False)
    for name in ("", "SimPEDES", "simpedes_station"):
        assert read_dataset(tmp_path, name).name == "SimPEDES-station"
    for name in ("SimPEDES-street", "CUHK-PEDES", "My shop"):
        with pytest.raises(AnnotationError, match=rf"of {name}; found reid_raw\.json \(SimPEDES-station\)"):
            read_dataset(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("CUHK-PEDES", ("cuhk", "CUHK_PEDES", "cuhkpedes", " Cuhk Pedes ")),
        ("ICFG-PEDES", ("icfg", "ICFGPEDES", "icfg-pedes")),
        ("RSTPReid", ("rstpreid", "RSTP-Reid", "rstp", "RSTP_ReID")),
        ("SimPEDES-street", ("simpedes_street", "SIMPEDES-STREET", "SimPEDES street")),
        ("SimPEDES-station", ("simpedes-Station",)),
        ("My shop", (" My shop",)),
        ("CUHK03", ("CUHK03",)),
        ("CUHK-SYSU", ("CUHK-SYSU",)),
        ("", ("", " ")),
    ],
)
def test_one_canonical_name(name, spellings):
    for spelling in (name, *spellings):
        assert canonical_name(spelling) == name


@given(st.text() | st.sampled_from(["RSTP_Reid", "simpedes station", "cuhk"]).map(str.upper))
def test_a_canonical_name_is_its_own(text):
    with suppress(ConfigError):
        assert canonical_name(canonical_name(text)) == canonical_name(text)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("RTSPReid", "RSTPReid"), ("IFCG-PEDES", "ICFG-PEDES"), ("CHUK-PEDES", "CUHK-PEDES"), ("SimPEDS-street", "SimP"),
     ("SimPEDES-strete", "SimPEDES-street"), ("SimPEDES-forest", "known are")],
)  # fmt: skip
def test_a_misspelt_name_is_refused(name, meant):
    with pytest.raises(ConfigError, match=meant):
        canonical_name(name)


@pytest.mark.parametrize(
    ("file_name", "fits", "contradicts"),
    [
        ("reid_raw.json", ("", "cuhk", "My shop"), ("RSTPReid", "ICFG-PEDES", "SimPEDES-street", "SimPEDES")),
        ("data_captions.json", ("", "RSTP-Reid"), ("CUHK-PEDES", "SimPEDES-street", "My shop")),
        ("ICFG-PEDES.json", ("", "ICFG"), ("CUHK-PEDES", "SimPEDES-station", "My shop")),
        ("mine.json", ("", "RSTPReid", "CUHK-PEDES", "My shop"), ("SimPEDES-street", "SimPEDES")),
    ],
)
def test_file_and_name_must_agree(tmp_path, file_name, fits, contradicts):
    file = dump(tmp_path / file_name, [record()])
    said = {"reid_raw": "CUHK-PEDES", "data_captions": "RSTPReid"}.get(file.stem, file.stem)
    for root in (tmp_path, file):
        for name in fits:
            assert read_dataset(root, name).name == (canonical_name(name) or said)
        for name in contradicts:
            with pytest.raises(AnnotationError, match=rf"no annotation file of {name}.*; found {file_name}"):
                read_dataset(root, name)


def test_the_user_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    dump(tmp_path / "mine.json", [record()])
    assert read_dataset("~").images == tmp_path / "imgs"


def test_several_files_are_told_apart_by_name(tmp_path):
    dump(tmp_path / "reid_raw.json", [record(captions="from CUHK")])
    dump(tmp_path / "ICFG_PEDES.json", [record(captions="from ICFG")])
    with pytest.raises(AnnotationError, match=r"ICFG_PEDES\.json .*, reid_raw\.json"):
        read_dataset(tmp_path)
    for name, caption in (("icfg", "from ICFG"), ("CUHK-PEDES", "from CUHK")):
        assert read_dataset(tmp_path, name).table["caption"].tolist() == [caption]
    with pytest.raises(AnnotationError, match="ICFG"):
        read_dataset(tmp_path / "ICFG_PEDES.json", "RSTPReid")
    dump(tmp_path / "CUHK-PEDES.json", [record()])
    with pytest.raises(AnnotationError, match="several"):
        read_dataset(tmp_path, "CUHK-PEDES")


def test_the_owners_file_without_splits(tmp_path):
    without = {key: value for key, value in record().items() if key != "split"}
    dump(tmp_path / "caption_all.json", [without])
    with pytest.raises(AnnotationError, match=r"split: missing.*train, val or test.*reid_raw\.json"):
        read_dataset(tmp_path)
    dump(tmp_path / "reid_raw.json", [record(captions="with a split")])
    for name in ("", "CUHK-PEDES", "My shop"):
        assert read_dataset(tmp_path, name).table["caption"].tolist() == ["with a split"]


def test_a_name_that_the_folder_lacks(tmp_path):
    dump(tmp_path / "ICFG_PEDES.json", [record()])
    with pytest.raises(AnnotationError, match=r"no annotation file of RSTPReid; found ICFG_PEDES\.json"):
        read_dataset(tmp_path, "RSTPReid")


@pytest.mark.parametrize(("root", "words"), [("none", "no such"), ("", "no annotation file"), ("a\0b", "a")])
def test_no_annotation_file(tmp_path, root, words):
    with pytest.raises(AnnotationError, match=words):
        read_dataset(f"{tmp_path}/{root}")


def test_own_pictures_as_csv_and_json(tmp_path):
    rows = [
        {"image": "b.png", "identity": 7, "split": "train", "caption": 'A "red", long\ncoat', "note": "x"},
        {"image": "b.png", "identity": 7, "split": "train", "caption": "NA", "note": ""},
        {"image": "a.png", "identity": 3, "split": "Test", "caption": "a cap", "note": "y"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    table = read_dataset(tmp_path, "My shop", images=tmp_path).table
    assert table["caption"].tolist() == [row["caption"] for row in rows]
    assert table["note"].tolist() == ["x", "", "y"]
    assert table["split"].tolist() == ["train", "train", "test"]
    (tmp_path / "mine.csv").unlink()
    dataset = read_dataset(dump(tmp_path / "mine.json", rows), "My shop", images=tmp_path)
    pd.testing.assert_frame_equal(table, dataset.table)
    assert (dataset.name, dataset.images) == ("My shop", tmp_path)


def test_a_table_survives_being_written_and_read_again(tmp_path):
    write_cuhk(tmp_path / "a", pictures=False)
    first = read_dataset(tmp_path / "a").table[COLUMNS]
    first.to_csv(tmp_path / "again.csv", index=False)
    again = read_dataset(tmp_path / "again.csv")
    keep = ["image", "identity", "label", "split", "caption"]
    pd.testing.assert_frame_equal(first[keep], again.table[keep])


@pytest.mark.parametrize("form", [int, str, float, "{:05d}".format])
def test_identities_in_any_spelling_and_with_gaps(tmp_path, form):
    ids = [40, 0, 7, 7, 1000, 3]
    splits = ["train", "train", "val", "test", "train", "test"]
    records = [record(id=form(i), split=s, file_path=f"{k}.png") for k, (i, s) in enumerate(zip(ids, splits))]
    table = read(tmp_path, records).table
    assert table["identity"].tolist() == ids
    assert table["label"].tolist() == [1, 0, -1, -1, 2, -1]


def test_captions_of_an_image_are_brought_together_in_file_order(tmp_path):
    order = ["b", "a", "b", "c", "a", "b"]
    records = [record(file_path=f"{name}.png", captions=f"{name}{i}") for i, name in enumerate(order)]
    dataset = read(tmp_path, records)
    assert dataset.table["caption"].tolist() == ["b0", "b2", "b5", "a1", "a4", "c3"]
    assert dataset.table["record"].tolist() == [0, 2, 5, 1, 4, 3]
    assert any("not adjacent" in note for note in dataset.notes)


def test_one_image_spelt_in_three_ways_is_one_image(tmp_path):
    records = [record(file_path=path) for path in ("a/b.png", "./a//b.png", "a\\b.png")]
    assert set(read(tmp_path, records).table["image"]) == {"a/b.png"}


def test_extra_fields_are_carried_along(tmp_path):
    records = [
        record(captions=["one", "two words"], camera="a"),
        record(captions=["three"], att={"top": "red"}),
    ]
    table = read(tmp_path, records).table
    assert table["camera"].fillna("").tolist() == ["a", "a", ""]
    assert table["att"].tolist()[2] == {"top": "red"}


def test_a_record_without_captions_keeps_an_empty_row_unless_dropped(tmp_path):
    records = [record(captions=[]), record(file_path="b.png", captions=["", " ", "a man"])]
    assert read(tmp_path, records).table["caption"].tolist() == ["", "", " ", "a man"]
    dropped = read(tmp_path, records, drop_empty_captions=True)
    assert dropped.table["caption"].tolist() == ["a man"]
    assert "3 empty captions were left out, and with them 1 images." in dropped.notes
    with pytest.raises(AnnotationError, match="no caption is left"):
        read(tmp_path, [record(captions="")], drop_empty_captions=True)


def test_query_and_gallery_are_left_out_and_said(tmp_path):
    file = write_icfg_processed(tmp_path, pictures=False)
    content = json.loads(file.read_text())
    content["gallery"].append(record(file_path="new.png"))
    dataset = read_dataset(dump(file, content))
    assert "new.png" not in set(dataset.table["image"])
    assert any("'gallery'" in note and "was left out" in note for note in dataset.notes)
    del content["test"]
    with pytest.raises(AnnotationError, match="no test"):
        read_dataset(dump(file, content))


def test_validation_identities_are_held_out_by_seed(tmp_path):
    write_icfg(tmp_path, (40, 5), pictures=False)
    people = {r["id"] for r in json.loads((tmp_path / "ICFG-PEDES.json").read_text()) if r["split"] == "train"}
    dataset = read_dataset(tmp_path, seed=3)
    table = dataset.table
    assert table["held_out"].equals(table["split"] == "val")
    sets = {split: set(rows["identity"]) for split, rows in table.groupby("split")}
    assert (len(sets["train"]), len(sets["val"]), len(sets["test"])) == (32, 8, 5)
    assert not sets["train"] & sets["val"]
    assert sets["train"] | sets["val"] == people
    assert sorted(set(table["label"])) == list(range(-1, 32))
    assert any("8 of 40 training identities" in note and "seed 3" in note for note in dataset.notes)
    same = read_dataset(tmp_path, seed=3).table
    other = read_dataset(tmp_path, seed=4).table
    pd.testing.assert_frame_equal(table, same)
    assert set(other["identity"][other["held_out"]]) != sets["val"]


def test_how_many_are_held_out_by_default(tmp_path):
    for train, expected in ((1, 0), (3, 1), (100, 20), (1500, 200)):
        folder = tmp_path / str(train)
        write_icfg(folder, (train, 1), images_each=1, pictures=False)
        table = read_dataset(folder).table
        assert table["identity"][table["split"] == "val"].nunique() == expected


def test_nothing_is_held_out_when_there_is_validation(tmp_path):
    write_rstp(tmp_path, pictures=False)
    dataset = read_dataset(tmp_path)
    assert "held_out" not in dataset.table
    assert dataset.split("val")["identity"].nunique() == 2
    assert dataset.notes == ()


def test_split_is_renumbered_and_refuses_other_names(tmp_path):
    write_cuhk(tmp_path, pictures=False)
    dataset = read_dataset(tmp_path)
    test = dataset.split("test")
    assert test.index.tolist() == list(range(8))
    assert set(test["split"]) == {"test"}
    with pytest.raises(AnnotationError, match=r"no split 'query'; it has train, val, test"):
        dataset.split("query")


def test_eighty_thousand_captions(tmp_path):
    records = people(tmp_path, (11003, 1000, 1000), 3, 2, pictures=False)
    table = read(tmp_path, records).table
    assert len(table) == 13003 * 3 * 2
    assert table["label"].max() == 11002


BAD = {
    "path up": (record(file_path="../a.png"), "leaves the image folder"),
    "path up inside": (record(file_path="a/../../b.png"), "leaves the image folder"),
    "absolute path": (record(file_path="/etc/passwd"), "leaves the image folder"),
    "drive": (record(file_path="C:\\a.png"), "leaves the image folder"),
    "empty path": (record(file_path=""), "names no file"),
    "nul in path": (record(file_path="a\0.png"), "names no file"),
    "path is a number": (record(file_path=3), "image: should be a valid string, found 3"),
    "no path": (record(file_path=...), "image: missing.* as file_path, img_path or image"),
    "null path": (record(file_path=None), "should be a valid string"),
    "no id": (record(id=...), "identity: missing"),
    "null id": (record(id=None), "should be a valid integer"),
    "nan id": (record(id=float("nan")), "should be a finite number"),
    "true id": (record(id=True), "should be a whole number"),
    "half id": (record(id=1.5), "should be a valid integer"),
    "negative id": (record(id=-1), "greater than or equal to 0"),
    "list id": (record(id=[1]), "should be a valid integer"),
    "named id": (record(id="Ann"), "should be a valid integer.*found 'Ann'"),
    "huge id": (record(id=2**63), "less than"),
    "no split": (record(split=...), "split: missing"),
    "unknown split": (record(split="trian"), "'train', 'val' or 'test', found 'trian'; did you mean train"),
    "split number": (record(split=0), "'train', 'val' or 'test'"),
    "no captions": (record(captions=...), "caption: missing.*a list of them"),
    "null captions": (record(captions=None), "should be a valid list"),
    "caption object": (record(captions={"a": 1}), "should be a valid list"),
    "caption in list": (record(captions=["a", 3]), "caption.1: should be a valid string"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(tmp_path, case):
    bad, words = BAD[case]
    with pytest.raises(AnnotationError, match=words) as caught:
        read(tmp_path, [record(), record(), bad, record()])
    assert "reid_raw.json" in str(caught.value)
    assert "record 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('[{"id": 1, "file_pa', "not JSON"),
        ("3", "expected a list of records"),
        ("[]", "no records"),
        ('{"train": []}', "no records"),
        ('{"train": 3}', "expected a list .* not under 'train'"),
        ('{"image": {"0": "a"}}', "expected a list .* not under 'image'"),
        ('{"image": []}', "unknown split name 'image'"),
        ('{"train": [{"split": "test"}]}', "says split 'test'"),
        ('{"train": [3]}', "not under 'train'"),
        ('[{}, "text"]', "expected a list of records"),
        ("[" * 100_000, "not JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "not JSON"),
        (json.dumps([record(captions="a man in \ud800 red")]), "not JSON in UTF-8 .*hex escape at line 1"),
        (json.dumps([record(file_path="\udfff")]), "not JSON"),
        (json.dumps([record(**{"\ud800": 1})]), "not JSON"),
        (json.dumps([record(att={"coat": ["red \ude00\ud83d"]})]), "not JSON"),
        (json.dumps([{"name": "x"}]), "record 0: image: missing"),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "reid_raw.json").write_text(text)
    with pytest.raises(AnnotationError, match=words) as caught:
        read_dataset(tmp_path)
    assert "reid_raw.json" in str(caught.value)


def test_names_that_are_not_utf8_are_refused(tmp_path):
    file = dump(tmp_path / "mine.json", [record()])
    with pytest.raises(ConfigError, match=r"name of the data set is 'caf\\udce9', which is not valid Unicode"):
        read_dataset(file, b"caf\xe9".decode(errors="surrogateescape"))


def test_whole_surrogate_pairs_are_characters(tmp_path):
    text = json.dumps([record(captions="a \U0001f600 man", att={"said": r"\ud800"})])
    assert r"\ud83d\ude00" in text
    (tmp_path / "reid_raw.json").write_text(text)
    assert read_dataset(tmp_path).table["caption"].tolist() == ["a \U0001f600 man"]


@pytest.mark.parametrize("depth", [30, 1000, 100_000])
@pytest.mark.parametrize("field", ["file_path", "id", "captions", "split", "att", "record"])
@pytest.mark.parametrize("layout", ["[{}]", '{{"train": [{}]}}', '{{"train": [], "test": [], "query": [{}]}}'])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a": [', "]}")])
def test_nesting_of_any_depth_is_read_or_refused(tmp_path, depth, field, layout, brackets):
    text = layout.format(json.dumps(record(**{field: "DEEP"})))
    (tmp_path / "reid_raw.json").write_text(text.replace('"DEEP"', f"{brackets[0] * depth}1{brackets[1] * depth}"))
    with suppress(AnnotationError):
        read_dataset(tmp_path)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "reid_raw.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="not JSON in UTF-8"):
        read_dataset(tmp_path)


def test_a_byte_order_mark_is_no_harm(tmp_path):
    (tmp_path / "reid_raw.json").write_text(json.dumps([record()]), encoding="utf-8-sig")
    assert len(read_dataset(tmp_path).table) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no records"),
        ("image,identity,split,caption\n", "no records"),
        ("image,identity,split,caption\na.png,1,train,a man, tall\n", "record 0: not as many cells"),
        ("image,identity,split,caption\na.png,1,train\n", "record 0: not as many cells"),
        ('image,identity,split,caption\na.png,1,train,"a man', "not CSV"),
        ("image,identity,split,caption\na.png,,train,a man\n", "identity"),
    ],
)
def test_bad_csv(tmp_path, text, words):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(AnnotationError, match=words):
        read_dataset(tmp_path)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud800", "../x", "a.png", "train", "1"])
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2))
fields = [
    "id",
    "identity",
    "file_path",
    "img_path",
    "captions",
    "caption",
    "split",
    "label",
    "record",
    "held_out",
    "processed_tokens",
    "image",
]
nearly = st.fixed_dictionaries(
    {
        "id": st.integers(0, 5) | values,
        "file_path": st.sampled_from(["a.png", "b/c.png"]) | values,
        "captions": st.lists(st.text(max_size=5), max_size=2) | st.text(max_size=5) | values,
        "split": st.sampled_from(["train", "val", "test"]) | values,
    },
    optional={"processed_tokens": values, "label": values, "held_out": values, "img_path": values},
)
records = st.lists(
    nearly | st.dictionaries(st.sampled_from(fields) | st.text(max_size=3), values, max_size=5) | values,
    max_size=4,
)
contents = (
    records
    | st.dictionaries(st.sampled_from(["train", "val", "test", "query", "gallery", "x"]), records | values, max_size=4)
    | values
)
good = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(0, 5) | st.integers(0, 5).map(str),
            "file_path": st.text(string.ascii_letters, min_size=1, max_size=2),
            "captions": st.lists(st.text(max_size=5), max_size=2) | st.text(max_size=5),
            "split": st.sampled_from(["train", "val", "test"]),
        },
        optional={
            "extra": scalars.filter(lambda v: v != "\ud800"),
        },
    ),
    min_size=1,
    max_size=8,
)


def sound(table):
    """What must hold of every table that the reader returns."""
    train = table["split"] == "train"
    known = sorted(set(table["identity"][train]))
    assert table["label"].tolist() == [known.index(i) if t else -1 for i, t in zip(table["identity"], train)]
    seen = table["image"][table["image"] != table["image"].shift()]
    assert seen.is_unique
    assert set(table["split"]) <= {"train", "val", "test"}
    assert table.index.tolist() == list(range(len(table)))


@given(content=contents, cut=st.integers(0, 40) | st.none(), form=st.sampled_from([".json", ".csv"]))
@settings(max_examples=400, deadline=None)
def test_malformed_files_are_read_or_refused(tmp_path_factory, content, cut, form):
    file = tmp_path_factory.getbasetemp() / f"reid_raw{form}"
    file.write_text(json.dumps(content)[:cut])
    with suppress(FmfaError):
        sound(read_dataset(file).table)


@given(content=good)
@settings(max_examples=80, deadline=None)
def test_well_formed_files_are_read_whole(tmp_path_factory, content):
    file = dump(tmp_path_factory.getbasetemp() / "well.json", content)
    table = read_dataset(file).table
    sound(table)
    captions = [r["captions"] if isinstance(r["captions"], list) else [r["captions"]] for r in content]
    assert sorted(table["caption"]) == sorted(text for texts in captions for text in texts or [""])
    assert set(table["record"]) == set(range(len(content)))


@given(data=st.binary(max_size=60), form=st.sampled_from([".json", ".csv"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_or_read(tmp_path_factory, data, form):
    file = tmp_path_factory.getbasetemp() / f"bytes{form}"
    file.write_bytes(b"image,identity,split,caption\n" * (form == ".csv") + data)
    with suppress(FmfaError):
        sound(read_dataset(file).table)
