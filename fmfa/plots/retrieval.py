"""Figures of training and of retrieval: curves, ranks, pictures found, and errors by attribute."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from fmfa.data.images import load_image, resolve_image
from fmfa.errors import TrainingError
from fmfa.evaluation.evaluate import IMAGE_TO_TEXT, TEXT_TO_IMAGE, Evaluation
from fmfa.metrics import RankMetrics
from fmfa.records import read_metrics

LOSSES = ("itc", "cmpm", "sdm", "asdm", "id", "irr", "efa")  # in this order and colour wherever they appear
HIT, MISS = "#029e73", "#d55e00"  # green and red of the colour-blind palette
SHOWN = 10  # pictures of a ranking
_RANKS = 20  # of the curve
_THUMBNAIL = 384  # pixels; a gallery may hold photographs of many megapixels


def plot_training(run_folder: str | Path) -> Figure:
    """Show each loss (weighted, mean over an epoch's steps) and the validation R@1 of a training run by epoch.

    Raises:
        TrainingError: the folder holds no metrics.
    """
    table = read_metrics(run_folder)
    epochs = table[table["split"] == "train"].pivot_table(index="epoch", columns="metric", values="value")
    names = _in_order([c.removeprefix("loss/") for c in epochs.columns if c.startswith("loss/")])
    if names[1:] == ["total"]:  # a single loss is the total
        names = names[:1]
    recall = table[(table["split"] == "val") & (table["metric"] == "R@1")]
    recall = recall.assign(value=100 * recall["value"])  # logged as a fraction
    curves = [(f"loss: {n}", "weighted loss", epochs.index, epochs[f"loss/{n}"]) for n in names]
    if len(recall):
        curves.insert(0, ("validation", "R@1 (%)", recall["epoch"], recall["value"]))
    if not curves:
        raise TrainingError(f"{run_folder} holds no metrics of a training run; expected a metrics.csv with losses")
    last = max(1, *(curve[2].max() for curve in curves))
    figure, panels = _panels(len(curves))
    for axis, (title, label, x, y) in zip(panels, curves, strict=True):
        axis.plot(x, y, color="C1" if title == "validation" else "C0", **_marked(len(x)))
        axis.set(title=title, xlabel="epoch", ylabel=label, xlim=(-0.05 * last, 1.05 * last))
        axis.locator_params(axis="x", integer=True)
    if len(recall):
        best = recall.loc[recall["value"].idxmax()]
        panels[0].set_title(f"validation, best {best['value']:.1f} % after epoch {best['epoch']}")
        panels[0].set_ylim(0, max(1.1 * best["value"], 1))
    return figure


def plot_gradient_norms(run_folder: str | Path) -> Figure | None:
    """Show how strongly each loss pulls at the features that the losses share, over the steps of a run.

    A loss that does not reach a feature has no curve. None where the run logged no gradients.
    """
    table = read_metrics(run_folder)
    table = table[(table["split"] == "gradient") & (table["value"] > 0)]
    if table.empty:
        return None
    table[["loss", "feature"]] = table["metric"].str.split("/", n=1, expand=True)
    features, order = sorted(table["feature"].unique()), _in_order(table["loss"].unique())
    figure, panels = _panels(len(features), sharey=True)
    for axis, feature in zip(panels, features, strict=True):
        shown = table[table["feature"] == feature]
        for name in order:
            curve = shown[shown["loss"] == name]
            if len(curve):
                axis.plot(curve["step"], curve["value"], label=name, **_style(name), **_marked(len(curve)))
        axis.set(title=feature.replace("_", " "), xlabel="step", yscale="log")
    panels[0].set_ylabel("L2 norm of the gradient")
    named = {line.get_label(): line for axis in panels for line in axis.get_lines()}
    figure.legend([named[name] for name in order], order, title="loss", fontsize=8, loc="outside right upper")
    return figure


def plot_asdm_weights(run_folder: str | Path) -> Figure | None:
    """Show A-SDM's weights by epoch: mean over a batch's rows, and its largest; None where the run has none."""
    table = read_metrics(run_folder)
    table = table[(table["split"] == "train") & table["metric"].str.startswith("asdm_weight_")]
    if table.empty:
        return None
    figure, panels = _panels(2)
    for axis, suffix, title in zip(panels, ("", "_max"), ("mean of a batch", "largest of a batch"), strict=True):
        curves = {f"{name} as query": f"asdm_weight_{name}{suffix}" for name in ("text", "image")}
        _by_epoch(axis, table, curves, "A-SDM weight (1 = plain SDM)")
        axis.set_title(title)
    return figure


def plot_pair_similarities(run_folder: str | Path) -> Figure | None:
    """Show the mean cosine of matched and unmatched training pairs by epoch; None where the run did not log it."""
    table = read_metrics(run_folder)
    table = table[(table["split"] == "train") & table["metric"].str.startswith("cosine_")]
    if table.empty:
        return None
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    curves = {f"{name} pairs": f"cosine_{name}" for name in ("matched", "unmatched")}
    _by_epoch(axis, table, curves, "cosine, mean over training batches")
    axis.set_title(Path(run_folder).name, parse_math=False)
    return figure


def _by_epoch(axis: Axes, table: pd.DataFrame, curves: Mapping[str, str], label: str) -> None:
    """Two curves by epoch, `curves` from their names in the legend to those in the column `metric`."""
    for place, (name, metric) in enumerate(curves.items()):
        curve = table[table["metric"] == metric]
        axis.plot(curve["epoch"], curve["value"], color=f"C{place}", label=name, **_marked(len(curve), "os"[place]))
    axis.set(xlabel="epoch", ylabel=label)
    axis.locator_params(axis="x", integer=True)
    axis.legend(fontsize=8)


def plot_cmc(evaluation: Evaluation) -> Figure:
    """Show the share of queries hit within each rank, both directions, with 95 % intervals and chance (dashed)."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    ranks = np.arange(1, _RANKS + 1)
    for direction, colour, marker, start in ((TEXT_TO_IMAGE, "C0", "o", 0), (IMAGE_TO_TEXT, "C1", "s", 5)):
        metrics = evaluation.metrics[direction]
        queries = len(metrics.relevant) - metrics.unanswerable
        label = f"{direction}, n = {queries:,} queries, {metrics.gallery_size:,} in the gallery"
        axis.plot(ranks, 100 * metrics.cmc(_RANKS), color=colour, marker=marker, markersize=4, label=label)
        # of two equal curves both colours show
        dashes: dict[str, Any] = {"linestyle": (start, (5, 5)), "color": colour}
        axis.plot(ranks, 100 * _chance_cmc(metrics), label=f"chance, {direction}", **dashes)
        for rank in (1, 5, 10):
            interval = evaluation.intervals[direction][f"R@{rank}"]
            axis.vlines(rank, 100 * interval.low, 100 * interval.high, color=colour, linewidth=5, alpha=0.35)
    axis.set(xlabel="rank k", ylabel="R@k (%), bars: 95 % intervals", ylim=(0, 102))
    axis.set_xticks([k for k in ranks if k == 1 or k % 5 == 0])
    axis.legend(fontsize=8, handlelength=3.5)
    return figure


def pick_queries(evaluation: Evaluation, count: int, seed: int = 0) -> dict[str, list[int]]:
    """Draw captions at random: `hits`, right at rank 1, and `misses`, first right beyond rank 10.

    Returns:
        Row positions in `evaluation.rows`, ascending; fewer than `count` if there are no more.
    """
    rank, rng = evaluation.metrics[TEXT_TO_IMAGE].first_rank, np.random.default_rng(seed)
    queries = {"hits": np.flatnonzero(rank == 1), "misses": np.flatnonzero(rank > 10)}
    return {k: sorted(rng.choice(rows, min(count, len(rows)), replace=False).tolist()) for k, rows in queries.items()}


def retrieval_grid(evaluation: Evaluation, images: str | Path, queries: Sequence[int]) -> Figure:
    """Show for each caption the picture it was written for and the ten best, hits and misses framed and marked.

    Args:
        evaluation: of a split.
        images: folder that the column `image` is relative to.
        queries: row positions of the captions; without any, the figure says so.
    """
    if not len(queries):
        return _notice("no caption to show")
    figure, lines = picture_places(len(queries), [2.6] + [1] * (SHOWN + 1), (3 + 1.05 * SHOWN, 2.6 * len(queries)))
    for (text, target, *places), query in zip(lines, queries, strict=True):
        row, rank = evaluation.rows.iloc[query], evaluation.metrics[TEXT_TO_IMAGE].first_rank[query]
        _write(text, f"identity {row['identity']}, first hit at rank {rank}", row["caption"])
        framed(target, resolve_image(images, row["image"]), "wanted")
        matches = evaluation.top_matches(query, SHOWN).itertuples(index=False)
        for rank, (axis, match) in enumerate(zip(places, matches), start=1):
            mark, colour = ("✓", HIT) if match.hit else ("✗", MISS)
            title = f"{mark} {rank}\nid {match.identity}"
            framed(axis, resolve_image(images, match.image), title, colour)
    return figure


def hit_grid(hits: pd.DataFrame, title: str) -> Figure:
    """Show hits of a gallery (`path`, `cosine`, best first) with rank, cosine and file name."""
    columns, lines = 5, max(1, -(-len(hits) // 5))
    figure, axes = picture_places(lines, [1] * columns, (2.4 * columns, 3.2 * lines))
    for rank, (axis, hit) in enumerate(zip(axes.flat, hits.itertuples(index=False)), start=1):
        name = textwrap.shorten(_plain(Path(hit.path).name), 26, placeholder="...")
        framed(axis, hit.path, f"{rank}: cosine {hit.cosine:.3f}\n{name}")
    figure.suptitle(textwrap.fill(_plain(title), 22 * columns, max_lines=3, placeholder=" ..."), parse_math=False)
    return figure


def plot_errors(table: pd.DataFrame) -> Figure:
    """Show `fmfa.analysis.attributes.errors_by_attribute`: what is wrong with the people found instead."""
    errors = int(table["errors"].max())
    if not errors:
        return _notice("no errors: every caption finds its person first")
    table = table.sort_values("wrong", ascending=False)
    bars = {"differs": "wrong", "differs though the caption tells it": "told_and_wrong"}
    long = pd.concat(table.assign(what=what, share=table[column]) for what, column in bars.items())
    long["attribute"] = long["attribute"].str.replace("_", " ")
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(table) + 1), layout="constrained")
    sns.barplot(long, y="attribute", x="share", hue="what", palette=["#c8c8c8", "#de8f05"], ax=axis)
    axis.plot(table["chance"], range(len(table)), "k|", markersize=11, label="differs in a random other person")
    axis.set(xlabel=f"share of n = {errors:,} errors (%)", ylabel="")
    axis.margins(y=0.01)
    axis.legend(title="", loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
    return figure


def _panels(count: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Up to three panels a line; places that are left over are taken away."""
    columns = min(count, 3) if count != 4 else 2
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(max(4.2 * columns, 5), 3.1 * lines), squeeze=False,
                                sharey=sharey, layout="constrained")  # fmt: skip
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _in_order(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == "total", (*LOSSES, name).index(name), name))


def _style(loss: str) -> dict:
    place = (*LOSSES, loss).index(loss)
    return {"color": f"C{place}", "linestyle": ("-", "--", "-.", ":")[place % 4]}


def _marked(points: int, marker: str = "o") -> dict:
    return {"marker": marker if points <= 40 else "", "markersize": 4}


def _chance_cmc(metrics: RankMetrics) -> np.ndarray:
    """Expected CMC of a random ranking: `fmfa.metrics.chance_metrics`' R@k at every rank."""
    relevant, queries = np.unique(metrics.relevant[metrics.relevant > 0], return_counts=True)
    ranks = np.minimum(np.arange(1, _RANKS + 1), metrics.gallery_size)
    hit = stats.hypergeom.sf(0, metrics.gallery_size, relevant[:, None], ranks)
    return np.average(hit, axis=0, weights=queries)


def picture_places(lines: int, widths: Sequence[float], size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches with lines of places for pictures and texts, without axes: Axes [lines, widths]."""
    figure, places = plt.subplots(lines, len(widths), figsize=size, width_ratios=widths, squeeze=False,
                                  layout="constrained")  # fmt: skip
    for axis in places.flat:
        axis.set_axis_off()
    return figure, places


def framed(axis: Axes, picture: str | Path | np.ndarray, title: str, colour: str = "0.6") -> None:
    """Show a picture (a file, or uint8 [H, W, 3]) in a frame under a title of the frame's colour, black over grey."""
    if not isinstance(picture, np.ndarray):
        image = load_image(picture)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture = np.asarray(image)
    axis.set_axis_on()
    axis.imshow(picture)
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8, color="black" if colour == "0.6" else colour, parse_math=False)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)


def _write(axis: Axes, head: str, caption: str) -> None:
    text = textwrap.fill(_plain(caption), 36, max_lines=13, placeholder=" ...")
    axis.text(0, 0.98, head, va="top", fontsize=8, weight="bold", transform=axis.transAxes)
    axis.text(0, 0.88, text, va="top", fontsize=8, transform=axis.transAxes, parse_math=False)


def _plain(text: str) -> str:
    """The text as one line of characters that a font can draw."""
    return "".join(character if character.isprintable() else " " for character in text)


def _notice(text: str) -> Figure:
    figure, ((axis,),) = picture_places(1, [1], (6, 0.8))
    axis.text(0, 0.5, text, va="center", transform=axis.transAxes)
    return figure
