"""The figures that explain the methods show the numbers of the package's own functions."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from fmfa.analysis.maps import PatchGrid
from fmfa.losses.efa import group_patches, pooled_similarity, sparsify
from fmfa.losses.matching import asdm_weights
from fmfa.plots import methods

GRID = PatchGrid((96, 32), (8, 8), (8, 8))
PICTURE = np.zeros((96, 32, 3), np.uint8)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("parts", [methods.FMFA, methods.IVT])
def test_every_box_and_arrow_is_drawn(parts):
    axis = methods.draw_architecture(parts).axes[0]
    assert len(axis.patches) == len(parts[0]) + len(parts[1])
    assert [text.get_text() for text in axis.texts] == [box[4] for box in parts[0]]


def test_the_push_of_itc_on_each_negative():
    cosine = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    figure = methods.plot_negatives(cosine.detach(), (0.02, 0.5))
    for line, temperature in zip(figure.axes[0].lines, (0.02, 0.5), strict=True):
        loss = -(cosine / temperature).log_softmax(dim=1).diagonal().sum()
        push = torch.autograd.grad(loss, cosine)[0]
        rows = push[~torch.eye(len(push), dtype=torch.bool)].view(len(push), -1)
        share = (rows / rows.sum(dim=1, keepdim=True)).sort(dim=1, descending=True).values.mean(dim=0).cumsum(dim=0)
        assert line.get_ydata() == pytest.approx(share.numpy(), abs=1e-5)
        assert line.get_label().endswith(f" {share[0]:.0%} on the hardest")


def test_weights_are_drawn_over_the_rank():
    cosine = torch.tensor([[0.5, 0.6, 0.1], [0.0, 0.9, 0.1], [0.4, 0.3, 0.2]])
    line = methods.plot_asdm_by_rank(cosine).axes[0].lines[1]
    assert line.get_xdata().tolist() == [2, 1, 3]
    assert line.get_ydata() == pytest.approx(asdm_weights(cosine, torch.arange(3)).numpy())


def test_the_share_of_entries_left_is_told():
    similarity = torch.tensor([[0.0, 1.0] * 24, [1.0] * 48])
    title = methods.plot_sparsification(PICTURE, ["a", "b"], similarity, GRID).axes[2].get_title()
    assert f"{(sparsify(similarity) > 0).float().mean():.0%}" in title == "after: 75% of the entries left"


def test_pooled_points_are_those_of_the_loss():
    draw = torch.Generator().manual_seed(0)
    text, patches = torch.randn(3, 5, 8, generator=draw), torch.randn(3, 7, 8, generator=draw)
    names = ["own", "first", "second"]
    figure = methods.plot_pooling(dict(zip(names, text)), dict(zip(names, patches)), list("abcde"))
    expected = pooled_similarity(text[:1], group_patches(text, patches), sharpness=1.0)[0]
    assert figure.axes[-1].lines[0].get_ydata() == pytest.approx(expected.numpy(), rel=1e-5)


def test_dropped_words_are_grey_and_counted():
    kept = torch.tensor([1, 48]), torch.tensor([2])
    figure = methods.plot_dropping(kept, PICTURE, GRID, ["$a", "b_"])
    assert [text.get_color() for text in figure.axes[2].texts] == ["0.7", "black"]
    assert figure.axes[1].get_title() == "2 of 48 patches"
    shown = figure.axes[1].images[0].get_array()
    assert (np.asarray(shown) == 0).all(axis=2).sum() == 2 * 64
    figure.canvas.draw()


def test_guesses_and_matrices_have_a_panel_each():
    table = pd.DataFrame({"own": [0.7, 0.3], "other": [0.1, 0.9]}, pd.Index(["red", "blue"], name="token"))
    assert len(methods.plot_guesses({"red": table, "blue": table}).axes) == 2
    assert len(methods.plot_matrices({"p": torch.eye(2), "q": torch.eye(2)}, "pictures", "captions").axes) == 3
