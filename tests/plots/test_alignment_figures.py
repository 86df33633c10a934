"""Figures of alignment and of systems side by side show what they are given."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fmfa.analysis.grounding import draw_phrases, measure_grounding, percent_table, pick_phrases
from fmfa.analysis.maps import PatchGrid
from fmfa.errors import AnnotationError, ConfigError
from fmfa.evaluation.evaluate import Evaluation, gallery_of
from fmfa.plots import alignment as plots_alignment
from fmfa.plots import systems as plots_systems
from fmfa.simpedes.truth import Truth, told_truly


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def grounding(tiny, shipped):
    return measure_grounding(shipped, tiny, "test", phrases=60)


def random_evaluation(tiny, seed):
    rows = tiny.split("test")
    gallery, draw = gallery_of(rows), torch.Generator().manual_seed(seed)
    people = torch.randn(1000, 8, generator=torch.Generator().manual_seed(7))
    sides = [
        people[torch.tensor(t["identity"].tolist())] + torch.randn(len(t), 8, generator=draw) for t in (rows, gallery)
    ]
    return Evaluation(rows, gallery, *sides)


def axis_texts(axis):
    return [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]


def test_grounding_figure_has_each_part_and_bin_with_its_number_of_phrases(grounding):
    parts, bins = plots_alignment.plot_grounding(grounding).axes
    labels = [label.get_text() for label in parts.get_yticklabels()]
    table = grounding[(grounding["map"] == "gradient") & (grounding["visibility"] == "all")]
    assert set(labels) == {f"{r.part} (n = {r.phrases})" for r in table.itertuples()}
    assert labels[0] == "all (n = 60)"
    assert [label.get_text().split(" (")[0] for label in bins.get_yticklabels()] == [
        "all", "under 2 %", "2 to 8 %", "8 % and more",
    ]  # fmt: skip
    drawn = {line.get_label(): line.lines[0].get_xdata() for line in parts.containers}
    assert set(drawn) == {"token-patch", "token-patch sparse", "gradient"}
    assert drawn["gradient"][0] == pytest.approx(100 * table["hit"].iloc[0])


def test_percent_table_has_chance_and_prior_below_the_maps(grounding):
    table = percent_table(grounding).set_index("map")
    total = grounding.iloc[0]
    assert list(table.index) == ["token-patch", "token-patch sparse", "gradient", "chance", "prior place"]
    assert table.loc["chance"].tolist()[:3] == [
        f"{100 * v:.1f}" for v in total[["chance_hit", "chance_hit", "chance_ap"]]
    ]
    assert table.loc["token-patch", "hit (%)"].startswith(f"{100 * total['hit']:.1f} [")


def test_maps_stand_over_their_patches():
    _, axis = plt.subplots()
    grid = PatchGrid((20, 12), (4, 4), (4, 4))
    values = np.zeros(15, np.float32)
    values[7] = 1  # row 2, column 1
    plots_alignment._overlay(axis, np.zeros((40, 24, 3), np.uint8), grid, values)  # the picture is twice as large
    (cross,) = axis.lines
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (11.5, 19.5)  # the middle of pixels 8..15 and 16..23
    assert axis.images[1].get_extent() == [-0.5, 23.5, 39.5, -0.5]
    np.testing.assert_array_equal(np.argwhere(axis.images[1].get_array() == 1), [[2, 1]])


def test_overlapping_patches_stand_around_their_centres():
    _, axis = plt.subplots()
    grid = PatchGrid((16, 16), (8, 8), (4, 4))  # 3 x 3 patches centred at 4, 8 and 12
    plots_alignment._overlay(axis, np.zeros((16, 16, 3), np.uint8), grid, np.eye(9, dtype=np.float32)[0])
    assert (axis.lines[0].get_xdata()[0], axis.lines[0].get_ydata()[0]) == (3.5, 3.5)


def test_phrase_figures_have_a_line_a_map_and_a_line_a_system(tiny, shipped):
    phrases = pick_phrases(tiny, "test", 3)
    figure = plots_alignment.plot_phrase_maps(shipped, tiny, "test", phrases)
    assert [a.get_ylabel() for a in figure.axes[::3]] == ["picture", "token-patch", "token-patch sparse", "gradient"]
    heads = ["".join(axis.get_title().split()) for axis in figure.axes[:3]]
    assert heads == [f"“{r.phrase}”({r.part})".replace(" ", "") for r in phrases.itertuples()]
    figure = plots_alignment.plot_relevance({"one": shipped, "two": shipped}, tiny, "test", phrases)
    assert [a.get_ylabel() for a in figure.axes[::3]] == ["picture", "one", "two"]
    first, second = (axis.images[1].get_array() for axis in figure.axes[3::3])
    np.testing.assert_array_equal(first, second)


def test_phrases_are_picked_by_position_or_one_a_part(tiny):
    everything = draw_phrases(tiny, "test", 10_000)
    chosen = pick_phrases(tiny, "test", 9, positions=[5, 2])
    pd.testing.assert_frame_equal(chosen, everything.iloc[[5, 2]].reset_index(drop=True))
    drawn = pick_phrases(tiny, "test", 5, seed=3)
    assert drawn["part"].nunique() == len(drawn) == 5
    with pytest.raises(ConfigError, match="no phrase at position -1"):
        pick_phrases(tiny, "test", 1, positions=[-1])


def test_disagreements_are_hits_of_some_systems_only(tiny):
    evaluations = {str(seed): random_evaluation(tiny, seed) for seed in (0, 1)}
    ranks = [e.metrics["text to image"].first_rank for e in evaluations.values()]
    chosen = plots_systems.pick_disagreements(evaluations, 10_000)
    assert chosen == [q for q in range(len(ranks[0])) if (ranks[0][q] == 1) != (ranks[1][q] == 1)]
    assert len(plots_systems.pick_disagreements(evaluations, 3)) == 3
    alone = plots_systems.pick_disagreements({"0": evaluations["0"]}, 10_000)
    assert alone == [q for q in range(len(ranks[0])) if ranks[0][q] > 1]


def test_side_by_side_says_what_the_caption_rules_out(tiny):
    evaluation = random_evaluation(tiny, 0)
    query = plots_systems.pick_disagreements({"a": evaluation}, 1)[0]
    figure = plots_systems.plot_side_by_side({"a": evaluation, "b": evaluation}, tiny, "test", query)
    row, matches = evaluation.rows.iloc[query], evaluation.top_matches(query, 10)
    records = {r["file_path"]: r for r in Truth(tiny.images.parent).records("test")}
    told = told_truly(next(c for c in records[row["image"]]["captions"] if c["text"] == row["caption"])["phrases"])
    assert len(figure.axes) == 22
    for axis, match in zip(figure.axes[1:11], matches.itertuples()):
        assert axis.get_title()[-1] == ("✓" if match.hit else "✗")
        wrong = [n for n in told if records[match.image]["attributes"][n] not in told[n]]
        if match.hit:
            assert axis.get_xlabel() == ""
        elif wrong:
            assert axis.get_xlabel().replace("\n", " ").startswith(wrong[0].replace("_", " "))
        else:
            assert "fits" in axis.get_xlabel()


def test_side_by_side_needs_the_truth_of_its_captions(tiny):
    evaluation = random_evaluation(tiny, 0)
    other = replace(evaluation, rows=evaluation.rows.assign(caption="a person"))
    with pytest.raises(AnnotationError, match="the truth of test lacks the caption 'a person' of "):
        plots_systems.plot_side_by_side({"a": other}, tiny, "test", 0)


def test_similarities_are_counted_once_a_pair(tiny):
    evaluation = random_evaluation(tiny, 0)
    axis = plots_systems.plot_similarities({"a": evaluation}).axes[0]
    captions, pictures = len(evaluation.rows), len(evaluation.gallery)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    own = sum((evaluation.gallery["identity"] == i).sum() for i in evaluation.rows["identity"])
    assert labels == [f"matched, n = {own:,}", f"unmatched, n = {captions * pictures - own:,}"]


def test_the_joint_space_shows_all_of_the_families_that_it_draws(tiny):
    evaluation = random_evaluation(tiny, 0)
    axis = plots_systems.plot_joint_space(evaluation, tiny.truth, "test").axes[0]
    assert sum(len(points.get_offsets()) for points in axis.collections) == 6 * 2 * (4 + 8)  # identities x items
    assert axis.get_title().startswith("48 pictures (●) and 96 captions (△) of 6 families")
    again = plots_systems.plot_joint_space(evaluation, tiny.truth, "test").axes[0]
    shown, same = (np.concatenate([points.get_offsets() for points in plane.collections]) for plane in (axis, again))
    assert np.array_equal(shown, same)
    # people of equal features up to noise: a neighbour is of the same family far more often than one of six times
    family = np.repeat(range(6), 24)
    distance = np.linalg.norm(shown[:, None] - shown[None], axis=-1) + 1e9 * np.eye(144)
    assert (family[distance.argmin(axis=1)] == family).mean() > 0.4
