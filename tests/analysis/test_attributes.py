from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from fmfa.analysis.attributes import errors_by_attribute, family_share
from fmfa.data.annotations import read_dataset
from fmfa.data.images import fmfa_evaluation
from fmfa.errors import AnnotationError
from fmfa.evaluation.cost import inference_cost
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, gallery_of
from fmfa.models.clip import ClipRetriever
from fmfa.simpedes.generate import generate, recipe
from fmfa.simpedes.people import ATTRIBUTES
from fmfa.simpedes.truth import Truth
from fmfa.text.bytepair import small_tokenizer

COUNTS = ["errors", "n_wrong", "n_told", "n_told_and_wrong"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("simpedes"), recipe("tiny"), workers=1, progress=False)


@pytest.fixture(scope="module")
def rows(root):
    return read_dataset(root).split("test")


def made_up(rows, noise=1.5, seed=0):
    """Features of a 'model' that knows each person, more or less."""
    gallery, rng = gallery_of(rows), np.random.default_rng(seed)
    people = dict(zip(rows["identity"].unique(), rng.normal(size=(rows["identity"].nunique(), 8))))

    def features(identities):
        exact = np.stack([people[i] for i in identities])
        return torch.from_numpy(exact + noise * rng.normal(size=exact.shape)).float()

    rows = rows.reset_index(drop=True)
    return Evaluation(rows, gallery, features(rows["identity"]), features(gallery["identity"]))


def nearest(evaluation, query):
    """Gallery position of the best picture by the plain definition; the made-up features never tie."""
    text = F.normalize(evaluation.text_features[query].double(), dim=0)
    scores = [float(F.normalize(image.double(), dim=0) @ text) for image in evaluation.image_features]
    return int(np.argmax(scores))


def test_errors_by_brute_force(root, rows):
    evaluation = made_up(rows)
    records = {record["file_path"]: record for record in Truth(root).records("test")}
    expected = {name: Counter(dict.fromkeys(COUNTS, 0)) for name in ATTRIBUTES}
    chance = {name: [] for name in ATTRIBUTES}
    for query, row in evaluation.rows.iterrows():
        found = records[evaluation.gallery["image"][nearest(evaluation, query)]]
        wanted = records[row["image"]]
        if found["id"] == wanted["id"]:
            continue
        caption = next(c for c in wanted["captions"] if c["text"] == row["caption"])
        strangers = [r for r in records.values() if r["id"] != wanted["id"]]
        for name in ATTRIBUTES:
            truth, seen = wanted["attributes"][name], found["attributes"][name]
            phrases = [p for p in caption["phrases"] if name in p["told"] and name not in p["mistakes"]]
            counts = expected[name]
            counts["errors"] += 1
            counts["n_wrong"] += seen != truth
            counts["n_told"] += bool(phrases)
            counts["n_told_and_wrong"] += any(seen not in p["told"][name] for p in phrases)
            chance[name].append(np.mean([r["attributes"][name] != truth for r in strangers]))
    table = errors_by_attribute(evaluation, Truth(root), "test").set_index("attribute")
    assert set(table.index) == set(ATTRIBUTES)
    assert 20 < table["errors"].iloc[0] < len(rows)
    assert 0 < table["n_told_and_wrong"].max() < table["n_told"].max()
    for name, counts in expected.items():
        assert table.loc[name, COUNTS].to_dict() == dict(counts)
        assert table.loc[name, "wrong"] == pytest.approx(100 * counts["n_wrong"] / counts["errors"])
        assert table.loc[name, "told_and_wrong"] == pytest.approx(100 * counts["n_told_and_wrong"] / counts["errors"])
        assert table.loc[name, "chance"] == pytest.approx(100 * np.mean(chance[name]))
        if counts["n_told"]:
            share = 100 * counts["n_told_and_wrong"] / counts["n_told"]
            assert table.loc[name, "wrong_if_told"] == pytest.approx(share)
    assert table["n_told_and_wrong"].is_monotonic_decreasing


def test_a_mistaken_phrase_tells_nothing(root, rows):
    """All phrases of the split that are wrong about an attribute: none of them may count as telling it."""
    captions = [c for r in Truth(root).records("test") for c in r["captions"]]
    lying = {c["text"]: {n for p in c["phrases"] for n in p["mistakes"]} for c in captions}
    chosen = rows[[bool(lying[text]) for text in rows["caption"]]]
    pictures = rows.groupby("identity").head(1)
    both = pd.concat([chosen, pictures]).drop_duplicates(["image", "caption"])
    everything = made_up(both, noise=50)
    # a liar's caption is the only query: its lie is not among the told attributes
    for query in range(len(chosen)):
        one = Evaluation(
            everything.rows.iloc[[query]].reset_index(drop=True),
            everything.gallery,
            everything.text_features[[query]],
            everything.image_features,
        )
        table = errors_by_attribute(one, Truth(root), "test").set_index("attribute")
        if table["errors"].iloc[0]:
            assert (table.loc[sorted(lying[chosen["caption"].iloc[query]]), "n_told"] == 0).all()
            assert table["n_told"].sum() > 0


def test_family_share_by_brute_force(root, rows):
    evaluation = made_up(rows)
    records = {record["file_path"]: record for record in Truth(root).records("test")}
    best = [records[evaluation.gallery["image"][nearest(evaluation, query)]] for query in range(len(rows))]
    wanted = [records[image] for image in evaluation.rows["image"]]
    found = family_share(evaluation, Truth(root), "test")
    person, family = found["found first"]
    assert person == pytest.approx(100 * np.mean([b["id"] == w["id"] for b, w in zip(best, wanted)]))
    assert family == pytest.approx(100 * np.mean([b["family"] == w["family"] for b, w in zip(best, wanted)]))
    assert person < family
    # 24 people in families of two, equally many pictures of each
    assert found["chance"].tolist() == pytest.approx([100 / 24, 100 / 12])
    assert (found["captions"] == len(rows)).all()


def test_a_tie_is_an_error_as_in_the_metrics(root, rows):
    evaluation = made_up(rows)
    blind = Evaluation(evaluation.rows, evaluation.gallery, torch.ones(len(rows), 4), torch.ones(len(rows) // 2, 4))
    assert blind.metrics[TEXT_TO_IMAGE].summary["R@1"] == 0
    table = errors_by_attribute(blind, Truth(root), "test")
    assert (table["errors"] == len(rows)).all()
    assert (table["n_wrong"] > 0).any()


def test_no_errors_have_no_shares(root, rows):
    table = errors_by_attribute(made_up(rows, noise=0), Truth(root), "test")
    assert len(table) == len(ATTRIBUTES)
    assert (table[COUNTS] == 0).all(axis=None)
    assert table[["wrong", "chance", "told_and_wrong", "wrong_if_told"]].isna().all(axis=None)


def test_another_truth_is_refused(root, rows, tmp_path):
    evaluation = made_up(rows)
    with pytest.raises(AnnotationError, match="identity 37 in the evaluation and another or nobody in"):
        errors_by_attribute(evaluation, Truth(root), "val")
    with pytest.raises(AnnotationError, match="holds no ground truth"):
        family_share(evaluation, Truth(tmp_path), "test")
    with pytest.raises(AnnotationError, match=r"the truth of test lacks the caption '.*!' of"):
        errors_by_attribute(made_up(rows.assign(caption=rows["caption"] + "!")), Truth(root), "test")
    swapped = made_up(rows.assign(identity=rows["identity"].to_numpy()[::-1]))
    with pytest.raises(AnnotationError, match="shows identity 60 in the evaluation and another"):
        family_share(swapped, Truth(root), "test")


def test_the_cost_has_the_sizes_of_what_was_measured(root, rows):
    tokenizer, size = small_tokenizer(context_length=64), (32, 16)
    backbone = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": list(size), "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 64, "vocab_size": tokenizer.vocab_size, "width": 32, "heads": 2, "layers": 1},
    }
    model = ClipRetriever(backbone)
    model.classifier = torch.nn.Linear(64, 1000, bias=False)
    model.train()
    images = root / "imgs"
    table = inference_cost(model, tokenizer, fmfa_evaluation(size), rows, images, batch_size=8, repeats=2)
    table = table.set_index("quantity")
    encoders = sum(p.numel() for p in model.clip.parameters())
    assert table.loc["parameters for retrieval", "value"] == pytest.approx(encoders / 1e6)
    assert table.loc["parameters", "value"] == pytest.approx((encoders + 64_000) / 1e6)
    assert "batch of 8, 32 x 16 pixels" in table.loc["encode a picture", "setting"]
    assert f"{torch.get_num_threads()} threads" in table.loc["encode a caption", "setting"]
    assert f"{len(rows) // 2} pictures of 64 numbers" in table.loc["rank the gallery for a query", "setting"]
    assert (table["value"] > 0).all()
    assert table.loc["peak memory", "value"] * 2**20 > 4 * encoders  # bytes of the weights alone
    assert model.training
