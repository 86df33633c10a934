import json

import ir_measures
import numpy as np
import pandas as pd
import pytest
import torch
from formats import write_cuhk
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, Success
from safetensors.torch import save_file

from fmfa.data.annotations import read_dataset
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, gallery_of
from fmfa.evaluation.features import (
    caption_ids,
    is_features,
    read_features,
    read_qrels,
    read_scores,
    scores_only,
    write_trec,
)
from fmfa.metrics import feature_metrics, rank_metrics


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Rows and gallery: ten people, three pictures each, two captions per picture."""
    rows = read_dataset(write_cuhk(tmp_path_factory.mktemp("data"), (2, 0, 10), images_each=3)).split("test")
    return rows, gallery_of(rows)


@pytest.fixture
def arrays(split):
    rows, gallery = split
    draw = np.random.default_rng(0)
    people = draw.normal(size=(20, 6)).astype(np.float32)
    return {
        "query": people[rows["identity"]] + draw.normal(size=(60, 6)).astype(np.float32),
        "gallery": people[gallery["identity"]] + draw.normal(size=(30, 6)).astype(np.float32),
        "query_ids": caption_ids(rows).to_numpy(str),
        "gallery_ids": gallery["image"].to_numpy(str),
    }


def summary(evaluation):
    return evaluation.metrics[TEXT_TO_IMAGE].summary


def expected(arrays, split, prefix=""):
    return feature_metrics(
        arrays[f"query{prefix}"], arrays[f"gallery{prefix}"], split[0]["identity"], split[1]["identity"]
    ).summary


def shuffled(arrays):
    draw = np.random.default_rng(1)
    orders = {side: draw.permutation(len(arrays[f"{side}_ids"])) for side in ("query", "gallery")}
    return {name: array[orders[name.split("_")[0].split(".")[0]]] for name, array in arrays.items()}


def save(folder, arrays, kind):
    path = folder / f"features.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "npy":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    elif kind == "safetensors":
        named = {name: json.dumps(array.tolist()) for name, array in arrays.items() if array.dtype.kind == "U"}
        rest = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in named}
        save_file(rest, path, metadata=named)
    else:
        pytest.importorskip("pyarrow")
        parts = [
            pd.DataFrame({"of": side, "id": arrays[f"{side}_ids"], "embedding": list(arrays[side])})
            for side in ("query", "gallery")
        ]
        pd.concat(parts).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["npz", "npy", "safetensors", "parquet"])
def test_files_of_each_kind_in_any_order_give_the_metrics_of_their_features(tmp_path, split, arrays, kind):
    path = save(tmp_path, shuffled(arrays), kind)
    assert is_features(path)
    evaluation = read_features(path, *split)
    assert summary(evaluation) == expected(arrays, split)
    assert 0.1 < summary(evaluation)["R@1"] < 1


def test_ids_may_be_positions_and_features_of_half_precision(tmp_path, split, arrays):
    arrays |= {"query_ids": np.arange(60), "gallery_ids": np.arange(30, dtype=np.uint16)}
    assert summary(read_features(save(tmp_path, shuffled(arrays), "npz"), *split)) == expected(arrays, split)
    halves = arrays | {side: arrays[side].astype(np.float16) for side in ("query", "gallery")}
    assert summary(read_features(save(tmp_path, halves, "safetensors"), *split)) == expected(halves, split)


@pytest.mark.parametrize("size", [1e300, 1e-300, 2.0**-1040])
def test_features_of_any_length_are_ranked(tmp_path, split, arrays, size):
    huge = arrays | {"query": arrays["query"].astype(np.float64) * size}
    assert summary(read_features(save(tmp_path, huge, "npz"), *split)) == pytest.approx(expected(arrays, split))


def test_branches_are_averaged_with_their_weights(tmp_path, split, arrays):
    draw = np.random.default_rng(2)
    given = {name: array for name, array in arrays.items() if name.endswith("ids")}
    for side, count in (("query", 60), ("gallery", 30)):
        given[f"{side}.bge"] = 100 * arrays[side]
        given[f"{side}.tse"] = draw.normal(size=(count, 4))
    path = save(tmp_path, shuffled(given), "npz")
    unit = {name: torch.nn.functional.normalize(torch.tensor(given[name]).double()) for name in given if "." in name}
    for weights in (None, {"bge": 3.0, "tse": 1.0}):
        share = weights or {"bge": 0.5, "tse": 0.5}
        cosines = sum(w * unit[f"query.{name}"] @ unit[f"gallery.{name}"].T for name, w in share.items())
        truth = rank_metrics(cosines, split[0]["identity"].to_numpy(), split[1]["identity"].to_numpy())
        assert summary(read_features(path, *split, weights)) == truth.summary
    for weights, message in (({"bge": 1.0}, "branches bge, tse"), ({"bge": 1.0, "tse": -1.0}, "above 0")):
        with pytest.raises(ConfigError, match=message):
            read_features(path, *split, weights)


def changed(name, change):
    def apply(arrays):
        arrays[name] = change(arrays[name].copy())

    return apply


def put(value, *place):
    def apply(array):
        array[place] = value
        return array

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("query", put(np.nan, 3, 1)), "query: a number that is not finite in 1 of 60 rows, first in row 3"),
        (changed("gallery", put(np.inf, 3)), "gallery: a number that is not finite in 1 of 30 rows, first in row 3"),
        (changed("gallery", put(0, 7)), "gallery: only zeros in 1 of 30 rows, first in row 7"),
        (changed("query", lambda a: a[:, :5]), "5 numbers per query and 6 per picture"),
        (changed("query", lambda a: a[:-1]), "59 rows for 60 ids"),
        (changed("query", lambda a: a[0]), r"float32 of shape \(6,\), expected numbers \[items"),
        (changed("query", lambda a: a[:, :0]), "shape .60, 0."),
        (changed("query", lambda a: a.astype("U9")), "expected numbers"),
        (changed("query", lambda a: a + 1j), "complex"),
        (changed("query_ids", lambda a: np.append(a[:-1], a[0])), "is there 2 times; expected once"),
        (changed("query_ids", put("who#0", 5)), "1 of 60 ids are unknown in this split, first who#0; the split's are"),
        (changed("query_ids", lambda a: np.arange(60) + 1), "1 of 60 ids are unknown in this split, first 60"),
        (changed("query_ids", lambda a: np.arange(60.0)), "found float64, expected names as text, or positions"),
        (changed("query_ids", lambda a: a[:, None]), "expected one id per row"),
        (lambda arrays: arrays.pop("gallery_ids"), "has no gallery_ids; found gallery, query, query_ids"),
        (lambda arrays: arrays.pop("gallery"), "gallery is missing"),
        (lambda arrays: arrays.update({n: a[:-3] for n, a in arrays.items() if "gallery" in n}),
         "lacks 3 of the split's 30 pictures, without which queries have no positive: "),
        (lambda arrays: arrays.update({n: a[:-1] for n, a in arrays.items() if "query" in n}),
         "lacks 1 of the split's 60 queries"),
        (changed("query", lambda a: a.astype(object)), "pickled objects, which could run code"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_told_in_one_sentence(tmp_path, split, arrays, change, message):
    change(arrays)
    path = save(tmp_path, arrays, "npz")
    with pytest.raises(ConfigError, match=message) as error:
        read_features(path, *split)
    assert "\n" not in str(error.value)


def test_pickled_arrays_of_a_folder_are_refused(tmp_path, split, arrays):
    folder = save(tmp_path, arrays, "npy")
    np.save(folder / "query.npy", np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match="pickled objects, which could run code"):
        read_features(folder, *split)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"PAR1PAR1"])
@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.safetensors"])
def test_damaged_files_are_told(tmp_path, split, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} cannot be read as features"):
        read_features(tmp_path / name, *split)


def test_reranked_items_come_first_and_the_others_keep_their_order(tmp_path, split, arrays):
    rows, gallery = split
    evaluation = read_features(save(tmp_path, arrays, "npz"), *split)
    draw = np.random.default_rng(3)
    first = [evaluation.top_matches(query, 5).index for query in range(60)]
    table = pd.DataFrame(
        [
            (caption_ids(rows)[q], gallery["image"][i], round(draw.normal(), 1))  # with ties
            for q, items in enumerate(first[:50])
            for i in draw.permutation(items)
        ],
        columns=["query", "item", "score"],
    )
    table.to_csv(tmp_path / "scores.csv", index=False)
    scores = read_scores(tmp_path / "scores.csv", *split)
    found = type(evaluation)(**vars(evaluation) | {"reranked": scores})
    similarity = evaluation.similarity(np.arange(60)).double().numpy()
    for q, i, score in scores.itertuples(index=False):
        similarity[q, i] = 1000 + score
    truth = rank_metrics(similarity, rows["identity"].to_numpy(), gallery["identity"].to_numpy())
    np.testing.assert_array_equal(found.metrics[TEXT_TO_IMAGE].first_rank, truth.first_rank)
    assert summary(found) == truth.summary != summary(evaluation)
    for query in (0, 55):
        matches = found.top_matches(query)
        assert matches["hit"].to_numpy().argmax() + 1 == truth.first_rank[query] or not matches["hit"].any()
    assert list(found.table()["direction"].unique()) == [TEXT_TO_IMAGE]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "query,item,score\nQ,I,nan\n", "row 1: found the score 'nan', expected a number"),
        ("a.csv", "query,item,score\nQ,I,x\n", "row 1: found the score 'x'"),
        ("a.csv", "query,item,score\nQ,I,1\nQ,I,2\n", "is there twice"),
        ("a.csv", "query,item,score\nz,I,1\n", "query: 1 of 1 ids are unknown in this split, first z"),
        ("a.csv", "query,item,score\nQ,z,1\n", "item: 1 of 1 ids are unknown in this split, first z"),
        ("a.csv", "query,score\nQ,1\n", "has no column item; found query, score"),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "query,item,score\n", "holds no scores"),
        ("a.run", "", "holds no scores"),
        ("a.run", "Q Q0 I 1 0.5\n", "line 1: expected the 6 columns query q0 item rank score tag"),
        ("a.run", "Q Q0 I 1 0.5 t\nQ Q0 I 1 0.5 t\n", "is there twice"),
    ],
)
def test_scores_that_cannot_be_used_are_told(tmp_path, split, name, text, message):
    rows, gallery = split
    text = text.replace("Q0", "q_").replace("Q", caption_ids(rows)[0]).replace("I", gallery["image"][0])
    (tmp_path / name).write_text(text.replace("q_", "Q0"))
    with pytest.raises(ConfigError, match=message):
        read_scores(tmp_path / name, *split)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), dimension=st.integers(1, 6))
def test_trec_files_go_out_and_in_and_ir_measures_agrees(tmp_path_factory, split, seed, dimension):
    folder, draw = tmp_path_factory.mktemp("trec"), np.random.default_rng(seed)
    arrays = {
        "query": draw.integers(-2, 3, (60, dimension)) + 0.25,  # small whole numbers, for many ties
        "gallery": draw.integers(-2, 3, (30, dimension)) + 0.25,
        "query_ids": np.arange(60),
        "gallery_ids": np.arange(30),
    }
    evaluation = read_features(save(folder, arrays, "npz"), *split)
    write_trec(evaluation, folder / "x", "my system", depth=0)
    ours = evaluation.metrics[TEXT_TO_IMAGE]
    run = ir_measures.read_trec_run(str(folder / "x.run"))
    qrels = ir_measures.read_trec_qrels(str(folder / "x.qrels"))
    theirs = ir_measures.calc_aggregate([AP, Success @ 1, Success @ 5, Success @ 10], qrels, run)
    assert theirs[AP] == pytest.approx(ours.summary["mAP"], abs=1e-6)
    for k in (1, 5, 10):
        assert theirs[Success @ k] == pytest.approx(ours.summary[f"R@{k}"], abs=1e-9)
    again = scores_only(read_scores(folder / "x.run", *split), *split)
    np.testing.assert_array_equal(again.metrics[TEXT_TO_IMAGE].first_rank, ours.first_rank)
    known = read_qrels(folder / "x.qrels")
    without = scores_only(read_scores(folder / "x.run", *known), *known)
    assert summary(without) == pytest.approx(summary(evaluation))


def test_a_cut_run_counts_what_is_missing_as_last(tmp_path, split, arrays):
    evaluation = read_features(save(tmp_path, arrays, "npz"), *split)
    write_trec(evaluation, tmp_path / "x", "x", depth=5)
    found = scores_only(read_scores(tmp_path / "x.run", *split), *split).metrics[TEXT_TO_IMAGE]
    ranks = evaluation.metrics[TEXT_TO_IMAGE].first_rank
    np.testing.assert_array_equal(found.first_rank, np.where(ranks <= 5, ranks, 28))  # the first of three among ties


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("q 0 d 0\n", "it is empty"),
        ("q 0 d 1\nq 0 e 1\nr 0 e 1\n", "e is relevant to queries that do not share all of their pictures"),
        ("q 0 d\n", "line 1: expected the 4 columns"),
    ],
)
def test_judgements_that_tell_no_people_are_refused(tmp_path, text, message):
    (tmp_path / "a.qrels").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_qrels(tmp_path / "a.qrels")
