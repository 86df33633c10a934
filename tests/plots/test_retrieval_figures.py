from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from fmfa.errors import TrainingError
from fmfa.evaluation.evaluate import IMAGE_TO_TEXT, TEXT_TO_IMAGE, Evaluation, gallery_of
from fmfa.plots import retrieval as plots
from fmfa.records import MetricsLog

HOSTILE = (
    "<script>alert(1)</script>",
    "$\\frac$ and $x_1$ for \\$5",
    "word " * 400,
    "a" * 5000,
    "",
    "two\nlines\x00\t\ud800 and 走路的人",
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def evaluation(tmp_path):
    """Ten people with two pictures and two captions each; the features are of chance but for a few people."""
    rng, rows = np.random.default_rng(0), []
    for image in range(20):
        Image.fromarray(rng.integers(0, 255, (24, 8, 3), dtype=np.uint8)).save(tmp_path / f"{image}.png")
        for caption in range(2):
            rows.append({"image": f"{image}.png", "identity": 100 + image // 2, "caption": f"person {image} {caption}"})
    rows = pd.DataFrame(rows)
    text, image = (torch.from_numpy(rng.normal(size=(n, 6))).float() for n in (40, 20))
    text[:12] += 4 * image[:6].repeat_interleave(2, 0)
    return Evaluation(rows, gallery_of(rows), text, image)


def write_run(folder, epochs=2, losses=("id", "asdm", "efa"), validation=True, gradients=True):
    folder.mkdir(parents=True)
    log = MetricsLog(folder)
    if validation:
        log.add("val", 0, 0, {"R@1": 0.11, "mAP": 0.05})
    for epoch in range(1, epochs + 1):
        if gradients:
            values = {f"{loss}/{feature}_tokens": 0.1 * epoch for loss in losses for feature in ("image", "text")}
            log.add("gradient", epoch - 1, 3 * epoch - 3, values | {"id/text_tokens": 0.0})
        values = {f"loss/{loss}": 1.0 / epoch for loss in losses} | {"loss/total": 3.0 / epoch, "learning_rate": 1e-4}
        if "asdm" in losses:
            sides = {f"asdm_weight_{side}{kind}": 2.5 for side in ("text", "image") for kind in ("", "_max")}
            values |= sides | {"asdm_weight_text": 1.5}
        log.add("train", epoch, 3 * epoch, values)
        if validation:
            log.add("val", epoch, 3 * epoch, {"R@1": (20 - epoch) / 100, "mAP": 0.09})
    return folder


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def drawn(figure):
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_training_has_a_panel_for_each_loss_and_validation(tmp_path, epochs):
    figure = drawn(plots.plot_training(write_run(tmp_path / "run", epochs)))
    best = "validation, best 19.0 % after epoch 1"
    assert titles(figure) == [best, "loss: asdm", "loss: id", "loss: efa", "loss: total"]
    recall, asdm = (figure.axes[i].lines[0] for i in (0, 1))
    np.testing.assert_array_equal(recall.get_xydata()[:2], [[0, 11], [1, 19]])
    np.testing.assert_allclose(asdm.get_xydata(), [[e, 1 / e] for e in range(1, epochs + 1)])
    assert recall.get_marker() == ("o" if epochs < 40 else "")  # one epoch alone would be invisible without
    assert {axis.get_xlabel() for axis in figure.axes} == {"epoch"}
    assert figure.axes[0].get_ylabel() == "R@1 (%)"


def test_a_single_loss_is_shown_once_and_no_validation_not_at_all(tmp_path):
    run = write_run(tmp_path / "run", losses=("itc",), validation=False, gradients=False)
    assert titles(drawn(plots.plot_training(run))) == ["loss: itc"]
    assert plots.plot_gradient_norms(run) is None
    assert plots.plot_asdm_weights(run) is None
    with pytest.raises(TrainingError, match=r"nothing holds no metrics of a training run"):
        plots.plot_training(tmp_path / "nothing")
    only_start = MetricsLog(tmp_path)
    only_start.add("val", 0, 0, {"R@1": 0.03})
    assert titles(drawn(plots.plot_training(tmp_path))) == ["validation, best 3.0 % after epoch 0"]


def test_gradient_norms_by_feature(tmp_path):
    figure = drawn(plots.plot_gradient_norms(write_run(tmp_path / "run")))
    assert titles(figure) == ["image tokens", "text tokens"]
    named = [[line.get_label() for line in axis.lines] for axis in figure.axes]
    assert named == [["asdm", "id", "efa"], ["asdm", "efa"]]  # a loss that reaches nothing has no curve
    assert [text.get_text() for text in figure.legends[0].texts] == named[0]
    assert {axis.get_yscale() for axis in figure.axes} == {"log"}
    np.testing.assert_allclose(figure.axes[1].lines[1].get_xydata(), [[0, 0.1], [3, 0.2]])
    colours = [[line.get_color() for line in axis.lines] for axis in figure.axes]
    assert [colours[0][0], colours[0][2]] == colours[1]


def test_asdm_weights(tmp_path):
    figure = drawn(plots.plot_asdm_weights(write_run(tmp_path / "run")))
    assert titles(figure) == ["mean of a batch", "largest of a batch"]
    heights = [[line.get_ydata()[0] for line in axis.lines] for axis in figure.axes]
    assert heights == [[1.5, 2.5], [2.5, 2.5]]  # text, image


def test_pair_similarities_by_epoch(tmp_path):
    run = write_run(tmp_path / "run")
    assert plots.plot_pair_similarities(run) is None
    log = MetricsLog(run)
    for epoch in (1, 2):
        log.add("train", epoch, epoch, {"cosine_matched": 0.1 * epoch, "cosine_unmatched": 0.01})
    matched, unmatched = drawn(plots.plot_pair_similarities(run)).axes[0].lines
    np.testing.assert_allclose(matched.get_xydata(), [[1, 0.1], [2, 0.2]])
    np.testing.assert_allclose(unmatched.get_ydata(), 0.01)


def test_cmc_shows_both_directions_and_their_chance(evaluation):
    (axis,) = drawn(plots.plot_cmc(evaluation)).axes
    for direction, curve, chance in zip((TEXT_TO_IMAGE, IMAGE_TO_TEXT), axis.lines[::2], axis.lines[1::2]):
        summary = evaluation.metrics[direction].summary
        for rank in (1, 5, 10):
            assert curve.get_ydata()[rank - 1] == pytest.approx(100 * summary[f"R@{rank}"])
            assert chance.get_ydata()[rank - 1] == pytest.approx(100 * evaluation.chance[direction][f"R@{rank}"])
        assert curve.get_label().startswith(f"{direction}, n = {len(evaluation.metrics[direction].identity)} queries")
        assert chance.is_dashed()
    assert axis.lines[0].get_xdata().tolist() == list(range(1, 21))
    assert axis.lines[1].get_ydata()[-1] == pytest.approx(100)  # the whole gallery of 20


def test_queries_are_drawn_by_seed(evaluation):
    rank = evaluation.metrics[TEXT_TO_IMAGE].first_rank
    found = plots.pick_queries(evaluation, 3, seed=4)
    assert found == plots.pick_queries(evaluation, 3, seed=4)
    assert found != plots.pick_queries(evaluation, 3, seed=5)
    assert [len(set(queries)) for queries in found.values()] == [3, 3]
    assert plots.pick_queries(evaluation, 99)["hits"] == np.flatnonzero(rank == 1).tolist()
    ranked = SimpleNamespace(metrics={TEXT_TO_IMAGE: SimpleNamespace(first_rank=np.array([1, 2, 10, 11, 1, 20]))})
    every = plots.pick_queries(ranked, 99)
    assert every == {"hits": [0, 4], "misses": [3, 5]}
    assert all(type(query) is int for query in every["hits"])


def test_hits_and_misses_differ_by_more_than_colour(evaluation, tmp_path):
    queries = [0, 30]
    figure = drawn(plots.retrieval_grid(evaluation, tmp_path, queries))
    assert len(figure.axes) == 2 * (10 + 2)
    for line, query in enumerate(queries):
        text, wanted, *places = figure.axes[12 * line : 12 * line + 12]
        assert text.texts[1].get_text() == evaluation.rows["caption"][query]
        assert wanted.get_title() == "wanted"
        for place, match in zip(places, evaluation.top_matches(query, 10).itertuples()):
            mark, colour = ("✓", plots.HIT) if match.hit else ("✗", plots.MISS)
            assert place.get_title().startswith(f"{mark} ")
            assert place.get_title().endswith(f"\nid {match.identity}")
            assert to_hex(place.spines["top"].get_edgecolor()) == colour
            np.testing.assert_array_equal(place.images[0].get_array(), np.asarray(Image.open(tmp_path / match.image)))
    marks = {title[0] for title in titles(figure) if title and title != "wanted"}
    assert marks == {"✓", "✗"}


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_hostile_captions_are_text(evaluation, tmp_path):
    evaluation.rows.loc[: len(HOSTILE) - 1, "caption"] = HOSTILE
    figure = drawn(plots.retrieval_grid(evaluation, tmp_path, range(len(HOSTILE))))
    captions = texts(figure)[1::2]
    assert captions[0] == HOSTILE[0]
    assert captions[1] == HOSTILE[1]
    assert not any(text.get_parse_math() for axis in figure.axes for text in axis.texts[1:])
    assert captions[2].count("\n") == captions[3].count("\n") == 12
    assert captions[2].endswith(" ...")
    assert captions[5].startswith("two lines")
    height = figure.get_window_extent().height / len(HOSTILE)
    assert all(text.get_window_extent().height < height for axis in figure.axes for text in axis.texts)
    for sentence in HOSTILE:
        drawn(plots.hit_grid(pd.DataFrame({"path": [tmp_path / "0.png"], "cosine": [0.5]}), sentence))


def test_grids_cope_with_little(evaluation, tmp_path):
    assert texts(drawn(plots.retrieval_grid(evaluation, tmp_path, []))) == ["no caption to show"]
    few = replace(evaluation, gallery=evaluation.gallery[:4], image_features=evaluation.image_features[:4])
    assert sum(bool(axis.images) for axis in drawn(plots.retrieval_grid(few, tmp_path, [3])).axes) == 1 + 4


def test_hit_grid(tmp_path):
    names = [*(f"{i}.png" for i in range(6)), "$x$_" + "long" * 20 + ".png"]
    for name in names:
        Image.new("RGB", (3000, 10), (200, 10, 10)).save(tmp_path / name)
    hits = pd.DataFrame({"path": [tmp_path / name for name in names], "cosine": np.linspace(0.7, 0.1, 7)})
    figure = drawn(plots.hit_grid(hits, "a $5 bag"))
    assert len(figure.axes) == 10
    assert figure.get_suptitle() == "a $5 bag"
    assert titles(figure)[:2] == ["1: cosine 0.700\n0.png", "2: cosine 0.600\n1.png"]
    assert [bool(axis.images) for axis in figure.axes] == [True] * 7 + [False] * 3
    assert max(figure.axes[0].images[0].get_array().shape) <= 384  # a photograph is not drawn in full


def test_errors_are_shown_with_their_number_and_chance():
    shares = {"wrong": [40.0, 60.0], "chance": [50.0, 70.0], "told_and_wrong": [30.0, 5.0]}
    table = pd.DataFrame({"attribute": ["shoes_colour", "bag"], "errors": 1234, **shares})
    (axis,) = drawn(plots.plot_errors(table)).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["bag", "shoes colour"]
    assert axis.get_xlabel() == "share of n = 1,234 errors (%)"
    assert [[bar.get_width() for bar in bars] for bars in axis.containers] == [[60, 40], [5, 30]]
    assert axis.lines[-1].get_xdata().tolist() == [70, 50]
    none = plots.plot_errors(table.assign(errors=0, wrong=np.nan, chance=np.nan, told_and_wrong=np.nan))
    assert texts(drawn(none)) == ["no errors: every caption finds its person first"]
