"""Figures that explain the two methods: their architectures, and what each loss and each step does."""

from collections.abc import Callable, Mapping, Sequence
from inspect import getsource
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor
from torch.nn import functional as F

from fmfa.analysis.maps import PatchGrid
from fmfa.losses.efa import group_patches, sparsify
from fmfa.losses.matching import asdm_weights
from fmfa.plots.retrieval import picture_places

_PICTURE, _TEXT, _LOSS, _INPUT = "#0072b2", "#d55e00", "#009e73", "#666666"

# Boxes (x, y, width, height, text, colour) from bottom to top, and arrows between them by their positions.
FMFA = (
    [
        (0.0, 0.0, 2.6, 0.7, "picture", _INPUT),
        (3.6, 0.0, 2.6, 0.7, "caption", _INPUT),
        (7.2, 0.0, 2.6, 0.7, "masked caption", _INPUT),
        (0.0, 1.3, 2.6, 0.9, "image tower\n(ViT)", _PICTURE),
        (3.6, 1.3, 2.6, 0.9, "text tower\n(causal)", _TEXT),
        (7.2, 1.3, 2.6, 0.9, "the same\ntext tower", _TEXT),
        (0.0, 2.8, 2.6, 0.9, "class token,\npatch tokens", _PICTURE),
        (3.6, 2.8, 2.6, 0.9, "word tokens,\nend token", _TEXT),
        (7.2, 2.8, 2.6, 0.9, "word tokens", _TEXT),
        (-0.2, 4.6, 3.0, 0.9, "A-SDM and ID\nclass and end token", _LOSS),
        (3.4, 4.6, 3.0, 0.9, "EFA\nwords and patches", _LOSS),
        (7.0, 4.6, 3.0, 0.9, "IRR\nwords query patches", _LOSS),
    ],
    [(0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8), (6, 9), (7, 9), (6, 10), (7, 10), (6, 11), (8, 11)],
)
IVT = (
    [
        (0.0, 0.0, 2.6, 0.7, "picture", _INPUT),
        (5.2, 0.0, 4.6, 0.7, "word, phrase and sentence text (MLA)", _INPUT),
        (0.0, 1.2, 2.6, 0.9, "patches,\nsome dropped (BMM)", _PICTURE),
        (5.2, 1.2, 4.6, 0.9, "word pieces,\nsome dropped (BMM)", _TEXT),
        (0.0, 2.6, 9.8, 0.7, "each layer: self-attention and norms, shared by both", _LOSS),
        (0.0, 3.6, 4.6, 0.7, "MLP for pictures", _PICTURE),
        (5.2, 3.6, 4.6, 0.7, "MLP for texts", _TEXT),
        (2.4, 4.9, 5.0, 0.7, "CMPM over 3 x B pairs", _LOSS),
    ],
    [(0, 2), (1, 3), (2, 4), (3, 4), (4, 5), (4, 6), (5, 7), (6, 7)],
)


def show_source(*functions: Callable) -> None:
    """Display the source of functions in a notebook."""
    display(Markdown("```python\n" + "\n\n".join(map(getsource, functions)) + "```"))


def draw_architecture(parts: tuple[Sequence[tuple], Sequence[tuple[int, int]]]) -> Figure:
    """Draw boxes and arrows: `FMFA` or `IVT`."""
    boxes, arrows = parts
    figure, axis = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    for x, y, width, height, text, colour in boxes:
        style = {"edgecolor": colour, "facecolor": "white", "linewidth": 1.6}
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", **style))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)
    for first, second in arrows:
        (x1, y1, width1, height1), (x2, y2, width2, _) = boxes[first][:4], boxes[second][:4]
        low, high = max(x1, x2) + 0.3, min(x1 + width1, x2 + width2) - 0.3
        start = (low + high) / 2 if low < high else x1 + width1 / 2
        end = min(max(start, x2 + 0.3), x2 + width2 - 0.3)
        style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": _INPUT, "linewidth": 1}
        axis.add_patch(FancyArrowPatch((start, y1 + height1 + 0.05), (end, y2 - 0.05), **style))
    axis.set(xlim=(-0.4, 10.2), ylim=(-0.2, max(y + height for _, y, _, height, *_ in boxes) + 0.2))
    axis.axis("off")
    return figure


def plot_negatives(similarity: Tensor, temperatures: Sequence[float] = (0.01, 0.02, 0.05, 0.2)) -> Figure:
    """Show how ITC's push on the negatives of a caption is divided among them, for several temperatures.

    The gradient of a row by the cosine of a negative is its probability over the temperature (Wang and Liu, CVPR 2021).

    Args:
        similarity: [B, B] cosines of captions (rows) with pictures of different people; pairs on the diagonal.
        temperatures: one line each.
    """
    others = similarity[~torch.eye(len(similarity), dtype=torch.bool)].view(len(similarity), -1)
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for temperature, marker in zip(temperatures, "^osDvP", strict=False):
        share = (others / temperature).softmax(dim=1).sort(dim=1, descending=True).values.mean(dim=0).cumsum(dim=0)
        label = f"temperature {temperature:g}: {share[0]:.0%} on the hardest"
        axis.plot(range(1, len(share) + 1), share.numpy(), f"{marker}-", markersize=4, markevery=range(10), label=label)
    axis.set(xlabel=f"number of hardest negatives, of {len(others[0])}", xscale="log", ylim=(0, 1.03))
    axis.set_ylabel(f"share of the push on them,\nmean of {len(others)} captions")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick < 2 * len(others[0])]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    figure.legend(loc="outside right upper")
    return figure


def plot_asdm_by_rank(similarity: Tensor) -> Figure:
    """Show A-SDM's weight of every row of a batch by the rank of its own pair, for two strengths alpha.

    Args:
        similarity: [B, B] cosines of captions (rows) with pictures of different people; pairs on the diagonal.
    """
    rank = 1 + (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for alpha, marker in ((1.0, "o"), (10.0, "s")):
        weight = asdm_weights(similarity, torch.arange(len(similarity)), alpha=alpha)
        axis.plot(rank.numpy(), weight.numpy(), marker, markersize=5, alpha=0.6, label=f"A-SDM, alpha = {alpha:g}")
    axis.axhline(1, color="black", linewidth=1, linestyle=":", label="SDM")
    axis.set(xlabel="rank of the caption's own picture in the batch", ylabel="weight of the row", xscale="log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= 2 * int(rank.max())]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    figure.legend(loc="outside right upper")
    return figure


def plot_matrices(matrices: Mapping[str, Tensor], columns: str, rows: str) -> Figure:
    """Show matrices [B, C] of probabilities side by side, by title, with names of their columns and rows."""
    size = (3.8 * len(matrices), 3.2)
    figure, axes = plt.subplots(1, len(matrices), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, values) in zip(axes[0], matrices.items(), strict=True):
        style = {"xticklabels": False, "yticklabels": False, "square": True, "cbar": axis is axes[0, -1]}
        sns.heatmap(values.numpy(), ax=axis, vmin=0, vmax=1, cmap="viridis", **style)
        axis.set(title=title, xlabel=columns, ylabel=rows if axis is axes[0, 0] else "")
    return figure


def plot_sparsification(picture: np.ndarray, tokens: Sequence[str], similarity: Tensor, grid: PatchGrid) -> Figure:
    """Show the token-patch matrix of one pair before and after EFA's sparsification, with the picture beside it.

    Args:
        picture: uint8 [H, W, 3].
        tokens: the L words.
        similarity: [L, N] dot products of tokens and patches.
        grid: the model's patches.
    """
    size, weight = (11, 0.15 * len(tokens) + 1.2), sparsify(similarity)
    figure, axes = plt.subplots(1, 3, figsize=size, width_ratios=(1, 4, 4), layout="constrained")
    rows, columns = grid.shape
    axes[0].imshow(picture, extent=(0, columns, rows, 0), aspect="auto")
    axes[0].set(xticks=range(columns + 1), yticks=range(rows + 1), title="patches")
    axes[0].tick_params(labelbottom=False, labelleft=False)
    axes[0].grid(color="white", linewidth=0.7)
    left = float((weight > 0).float().mean())
    for axis, values, title, names in (
        (axes[1], similarity, "before: dot products", list(tokens)),
        (axes[2], weight.masked_fill(weight == 0, torch.nan), f"after: {left:.0%} of the entries left", False),
    ):
        sns.heatmap(values.numpy(), ax=axis, cmap="viridis", xticklabels=columns, yticklabels=names, cbar=False)
        axis.set(xlabel="patch, row by row from the head down", title=title)
        axis.tick_params(axis="y", labelsize=7, rotation=0)
    return figure


def plot_pooling(tokens: Mapping[str, Tensor], patches: Mapping[str, Tensor], words: Sequence[str]) -> Figure:
    """Show EFA's hard coding and pooling step by step, for the caption of one pair and the pictures of several.

    Args:
        tokens: [L, D] of each pair's own caption, by the pair's name; the first is the caption that is compared.
        patches: [N, D] of each pair's picture, class token left out.
        words: of the first caption.
    """
    joint = [group_patches(text[None], patches[name][None])[0] for name, text in tokens.items()]
    own = F.normalize(next(iter(tokens.values())), dim=1)
    cosines = [(own @ F.normalize(rows, dim=1).T).numpy() for rows in joint]
    low, high = min(map(np.min, cosines)), max(map(np.max, cosines))
    size = (3.0 * len(tokens) + 2.6, 0.15 * len(words) + 1.6)
    ratios = [3] * len(tokens) + [2.4]
    figure, axes = plt.subplots(1, len(ratios), figsize=size, width_ratios=ratios, layout="constrained")
    for axis, name, values in zip(axes, tokens, cosines, strict=False):
        style = {"xticklabels": False, "yticklabels": list(words) if axis is axes[0] else False, "cbar": False}
        sns.heatmap(values, ax=axis, cmap="viridis", vmin=low, vmax=high, **style)
        best = values.argmax(axis=1) + 0.5, np.arange(len(words)) + 0.5
        axis.plot(*best, "s", color="none", markeredgecolor="white", markersize=5)
        axis.set(title=name, xlabel="joint embeddings")
    axes[0].tick_params(axis="y", labelsize=7, rotation=0)
    pooled = [np.logaddexp.reduce(values.max(axis=1)) for values in cosines]
    axes[-1].plot(pooled, "o", markersize=8)
    axes[-1].set(title="pooled similarity S", xlim=(-0.5, len(tokens) - 0.5))
    axes[-1].set_xticks(range(len(tokens)), list(tokens), rotation=20, ha="right")
    return figure


def plot_guesses(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Show the five likeliest words in the place of masked ones: a panel per word, a colour per picture.

    Args:
        tables: of `fmfa.analysis.heads.guess_word`, by the word that was masked.
    """
    size = (4.2 * len(tables), 3.2)
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, layout="constrained")
    for axis, (word, table) in zip(axes[0], tables.items(), strict=True):
        long = table.head(5).reset_index().melt("token", var_name="with", value_name="probability")
        sns.barplot(long, x="probability", y="token", hue="with", ax=axis, legend=axis is axes[0, -1])
        axis.set(title=f"masked: “{word}”", xlim=(0, 1), ylabel="")
    sns.move_legend(axes[0, -1], "lower right", fontsize=8)
    return figure


def plot_dropping(positions: Sequence[Tensor], picture: np.ndarray, grid: PatchGrid, words: Sequence[str]) -> Figure:
    """Show what bidirectional mask modelling leaves of a picture and of a caption.

    Args:
        positions: positions that stay, counted from 1, of the patches and of the words.
        picture: uint8 [H, W, 3].
        grid: the model's patches.
        words: the caption's pieces, in order.
    """
    figure, (axes,) = picture_places(1, [1, 1, 5], (9, 3.0))
    shown = np.isin(1 + np.arange(np.prod(grid.shape)), positions[0].numpy()).reshape(grid.shape)
    height, width = (side // parts for side, parts in zip(picture.shape, grid.shape, strict=False))
    seen = np.where(np.kron(shown, np.ones((height, width), bool))[..., None], picture, 255)
    titles = "picture", f"{len(positions[0])} of {shown.size} patches"
    for axis, values, title in zip(axes, (picture, seen), titles, strict=False):
        axis.imshow(values)
        axis.set_title(title, fontsize=9)
    _write_words(axes[2], words, set(positions[1].tolist()))
    return figure


def _write_words(axis: Axes, words: Sequence[str], positions: set[int]) -> None:
    x, y = 0.0, 0.9
    for place, word in enumerate(words, start=1):
        width = 0.017 * len(word) + 0.02
        if x + width > 1:
            x, y = 0.0, y - 0.12
        style: dict[str, Any] = {"color": "black"} if place in positions else {"color": "0.7", "style": "italic"}
        axis.text(x, y, word, fontsize=10, transform=axis.transAxes, family="monospace", parse_math=False, **style)
        x += width
    axis.set_title(f"{len(positions)} of {len(words)} word pieces (grey: dropped)", fontsize=9)
