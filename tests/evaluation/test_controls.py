"""Controls: what is corrupted on purpose is corrupted as described, and nothing else is."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import TOKENIZER, write_pairs

from fmfa.data.annotations import Dataset
from fmfa.data.pairs import draw_share, shuffle_pairs
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation, gallery_of, shuffle_captions
from fmfa.evaluation.statistics import bootstrap_interval
from fmfa.losses import matching as losses
from fmfa.study.results import save_evaluation
from fmfa.training.batches import TableBatches, training_table
from fmfa.training.config import TrainConfig


def captions_of(identities):
    count = len(identities)
    return pd.DataFrame(
        {
            "image": [f"{i // 2}.png" for i in range(count)],
            "identity": identities,
            "label": identities,
            "split": "train",
            "caption": [f"caption {i}" for i in range(count)],
            "record": np.arange(count) // 2,
            "spans": [[(0, i)] for i in range(count)],
        }
    )


# --- shuffled pairs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 10**6))
def test_every_caption_goes_to_a_picture_of_another_person(identities, seed):
    table = captions_of(np.array(identities))
    if 2 * table["identity"].value_counts().max() > len(table):
        with pytest.raises(ConfigError, match="belong to one identity"):
            shuffle_pairs(table, np.arange(len(table)), seed)
        return
    shuffled = shuffle_pairs(table, np.arange(len(table)), seed)
    source = shuffled["caption"].str.removeprefix("caption ").astype(int).to_numpy()
    assert sorted(source) == list(range(len(table)))
    assert (table["identity"].to_numpy()[source] != shuffled["identity"]).all()
    assert [spans[0][1] for spans in shuffled["spans"]] == source.tolist()  # what belongs to the caption goes along
    kept = ["image", "identity", "label", "split", "record"]
    pd.testing.assert_frame_equal(shuffled[kept], table[kept])
    assert list(shuffled) == list(table)
    pd.testing.assert_frame_equal(shuffle_pairs(table, np.arange(len(table)), seed), shuffled)


def test_the_permutation_is_random_and_leaves_no_pairing_of_people():
    table = captions_of(np.arange(800) // 8)
    first, second = (shuffle_pairs(table, np.arange(800), seed)["caption"].tolist() for seed in (0, 1))
    assert np.mean([a == b for a, b in zip(first, second)]) < 0.02
    source = np.array([int(caption.split()[1]) for caption in first]) // 8
    partners = [len(set(source[start : start + 8])) for start in range(0, 800, 8)]
    assert np.mean(partners) > 7  # eight captions of about eight other people


def test_only_the_drawn_captions_are_exchanged():
    table, rows = captions_of(np.arange(800) // 8), draw_share(800, 0.2, 3)
    assert len(rows) == 160
    assert (np.diff(rows) > 0).all()
    shuffled = shuffle_pairs(table, rows, 3)
    changed = np.flatnonzero(shuffled["caption"] != table["caption"])
    assert changed.tolist() == rows.tolist()
    assert sorted(shuffled["caption"]) == sorted(table["caption"])
    source = shuffled["caption"].str.removeprefix("caption ").astype(int).to_numpy() // 8
    assert (source[rows] != table["identity"].to_numpy()[rows]).all()
    assert draw_share(800, 0.2, 3).tolist() == rows.tolist() != draw_share(800, 0.2, 4).tolist()


def test_dropped_pairs_are_those_that_would_be_shuffled(tmp_path):
    dataset = write_pairs(tmp_path)
    values, half = {"method": "clip", "dataset": "toy"}, {"wrong_share": 0.5}
    given = {"true": {}, "shuffled": half, "dropped": half}
    configs = {pairs: TrainConfig(**values, pairs=pairs, **share) for pairs, share in given.items()}
    for pairs, told in (("true", half), ("dropped", {})):
        with pytest.raises(ConfigError, match="wrong_share is"):
            TrainConfig(**values, pairs=pairs, **told)
    tables = {pairs: training_table(config, dataset) for pairs, config in configs.items()}
    kept = tables["shuffled"]["caption"] == tables["true"]["caption"]
    assert 0 < kept.sum() < len(kept)
    pd.testing.assert_frame_equal(tables["dropped"], tables["true"][kept].reset_index(drop=True))


def test_a_run_trains_on_the_shuffled_pairs(tmp_path):
    dataset = write_pairs(tmp_path)
    values = {"method": "clip", "dataset": "toy", "image_height": 32, "image_width": 16, "batch_size": 4}
    batches = {
        pairs: TableBatches(TrainConfig(**values, pairs=pairs).resolved(), dataset, TOKENIZER, masked=False)
        for pairs in ("true", "shuffled")
    }
    true, shuffled = (next(iter(batches[pairs].read(0, 0))) for pairs in ("true", "shuffled"))
    for name in ("images", "labels", "rows"):
        assert torch.equal(true[name], shuffled[name])
    identity_of = dict(zip(dataset.table["caption"], dataset.table["identity"]))
    other = [identity_of[caption] for caption in batches["shuffled"].table["caption"]]
    assert (np.array(other) != batches["shuffled"].table["identity"]).all()
    read = batches["shuffled"].table["caption"].iloc[shuffled["rows"].tolist()]
    assert torch.equal(shuffled["caption_ids"], TOKENIZER(read.tolist()))
    assert TrainConfig().pairs == "true"


# --- a loss that hardly ranks


def test_at_temperature_one_hard_negatives_weigh_hardly_more_than_easy_ones():
    text = torch.eye(3, dtype=torch.float64)
    hard, easy = torch.tensor([[0.9, 0.1, 0.4], [-0.9, 0.1, 0.4]], dtype=torch.float64)

    def ratio(tau):
        image = torch.stack([text[0], hard, easy]).requires_grad_()
        cosine = losses.cosine_similarity(text, image)
        gradient = torch.autograd.grad((cosine[0] / tau).softmax(dim=0).log()[0], cosine)[0]
        return (gradient[0, 1] / gradient[0, 2]).item()

    assert ratio(1.0) < np.exp(2)  # cosines differ by 2 at most
    assert ratio(0.02) > 1e30


# --- captions shuffled at evaluation


def perfect_evaluation(people=60, images=3, captions=2):
    """Every picture and caption of a person has the person's own direction."""
    identity = np.repeat(np.arange(people), images * captions)
    rows = pd.DataFrame(
        {
            "image": [f"{i // captions}.png" for i in range(len(identity))],
            "identity": identity,
            "caption": [f"caption {i} of {person}" for i, person in enumerate(identity)],
        }
    )
    direction = torch.eye(people)
    noise = 0.05 * torch.randn(people * images, people, generator=torch.Generator().manual_seed(1))
    pictures = direction.repeat_interleave(images, dim=0) + noise
    return Evaluation(rows, gallery_of(rows), direction[identity], pictures)


def test_shuffled_captions_are_at_chance_within_their_interval():
    evaluation = perfect_evaluation()
    assert evaluation.metrics[TEXT_TO_IMAGE].summary["R@1"] == 1
    shuffled = shuffle_captions(evaluation, seed=2)
    metrics, chance = shuffled.metrics[TEXT_TO_IMAGE], evaluation.chance[TEXT_TO_IMAGE]
    found = bootstrap_interval(metrics.recall(1), metrics.identity, np.random.default_rng(0))
    assert found.low <= chance["R@1"] <= found.high
    assert metrics.summary["R@5"] < 0.8 * chance["R@5"]  # three of the first five show one person
    assert shuffled.chance == evaluation.chance


def test_over_many_permutations_shuffled_captions_meet_chance():
    evaluation = perfect_evaluation()
    found = [shuffle_captions(evaluation, s).metrics[TEXT_TO_IMAGE].summary["R@1"] for s in range(40)]
    # captions of other people alone would give this perfect system 0
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(evaluation.chance[TEXT_TO_IMAGE]["R@1"], abs=3 * error)
    assert np.mean(found) > 5 * error


def test_only_captions_and_their_features_move():
    evaluation = perfect_evaluation()
    shuffled, again = (shuffle_captions(evaluation, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(shuffled.rows, again.rows)
    pd.testing.assert_frame_equal(shuffled.rows.drop(columns="caption"), evaluation.rows.drop(columns="caption"))
    assert sorted(shuffled.rows["caption"]) == sorted(evaluation.rows["caption"])
    assert shuffled.image_features is evaluation.image_features
    told = [int(caption.split()[-1]) for caption in shuffled.rows["caption"]]
    assert torch.equal(shuffled.text_features, torch.eye(60)[told])
    assert evaluation.rows["caption"].iloc[0] == "caption 0 of 0"


def test_the_control_is_written_beside_the_evaluation(tmp_path):
    evaluation = perfect_evaluation()
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "config": {"dataset": "toy"}}))
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "toy"}))
    save_evaluation(evaluation, Dataset("toy", tmp_path / "imgs", evaluation.rows), "test", tmp_path)
    plain, control = (pd.read_csv(tmp_path / f"queries-test{kind}.csv") for kind in ("", "-shuffled"))
    assert list(control) == list(plain)
    pd.testing.assert_frame_equal(control[["identity", "image"]], plain[["identity", "image"]])
    assert plain["R@1"].mean() == 1
    assert control["R@1"].mean() < 0.1
