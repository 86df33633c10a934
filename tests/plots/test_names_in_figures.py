"""Names and captions are drawn as they are: a dollar starts no formula, in any figure."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from test_alignment_figures import random_evaluation
from test_retrieval_figures import write_run

from fmfa.analysis.grounding import pick_phrases
from fmfa.evaluation.statistics import Interval
from fmfa.plots import alignment as plots_alignment
from fmfa.plots import comparison as figures
from fmfa.plots import data as plots
from fmfa.plots import retrieval as plots_retrieval
from fmfa.plots import systems as plots_systems
from fmfa.records import MetricsLog
from fmfa.study.curves import OWN

NAME = "$\\frac{$"  # as a formula it is an error


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def shows_name(figure):
    figure.canvas.draw()
    shown = [text for text in figure.findobj(Text) if NAME in text.get_text()]
    return bool(shown) and not any(text.get_parse_math() for text in shown)


def test_of_systems_and_captions(tiny, shipped):
    evaluation = random_evaluation(tiny, 0)
    named = {NAME: evaluation, NAME * 2: evaluation}
    assert shows_name(plots_systems.plot_side_by_side(named, tiny, "test", 0))
    assert shows_name(plots_systems.plot_similarities(named))
    assert shows_name(plots_alignment.plot_relevance({NAME: shipped}, tiny, "test", pick_phrases(tiny, "test", 1)))
    captions = replace(tiny, table=tiny.table.assign(caption=NAME))
    assert shows_name(plots.contact_sheet(captions, "test"))
    evaluation.rows["caption"] = NAME
    assert shows_name(plots_retrieval.retrieval_grid(evaluation, tiny.images, [0]))


def test_of_files_and_folders(tiny, tmp_path):
    picture = tiny.images / tiny.table["image"][0]
    (tmp_path / f"{NAME}.png").write_bytes(picture.read_bytes())
    hits = pd.DataFrame({"path": [tmp_path / f"{NAME}.png"], "cosine": [0.5]})
    assert shows_name(plots_retrieval.hit_grid(hits, NAME))
    run = write_run(tmp_path / NAME)
    MetricsLog(run).add("train", 1, 1, {"cosine_matched": 0.1, "cosine_unmatched": 0.01})
    assert shows_name(plots_retrieval.plot_pair_similarities(run))


def test_of_rows_claims_and_data_sets(monkeypatch):
    interval = {"low": [1.0], "high": [3.0], "seeds": [2], "queries": [9]}
    assert shows_name(
        figures.plot_domains(pd.DataFrame({"row": NAME, "tested on": NAME, "trained on": NAME, "R@1": 2.0} | interval))
    )
    claims = pd.DataFrame({"claim": NAME, "verdict": figures.VERDICTS[0], "R@1 difference": 2.0} | interval)
    assert shows_name(figures.plot_claims(claims.assign(**{"low (Holm)": 0.5, "high (Holm)": 3.5})))
    point = {"curve": NAME, "value": 1.0, "estimate": 2.0, OWN: True, "further_low": np.nan, "further_high": np.nan}
    assert shows_name(figures.plot_sensitivity(pd.DataFrame(point | interval)))
    grid = pd.DataFrame({"grid": [NAME], "a": [1], "b": [2], "start": [1.0], "last": [2.0], "R@1": [3.0]})
    assert shows_name(figures.plot_grid(grid))
    rows = SimpleNamespace(
        runs={NAME: ["run"]},
        identity=np.arange(3),
        mean=lambda name, seed: Interval(0.2, 0.1, 0.3),
        values=lambda name: np.ones((1, 3)),
    )
    monkeypatch.setattr(figures, "references", lambda results, split: {NAME: {"R@1": (3.0, None, None)}})
    assert shows_name(figures.plot_comparison(SimpleNamespace(rows=lambda split: rows)))
