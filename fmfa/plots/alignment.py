"""Figures of alignment: maps of phrases over their pictures, pointing accuracy, and counterfactual changes."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmfa.analysis.changes import PICTURE, Changer, Counterfactual, Site, read_sites
from fmfa.analysis.counterfactual import score_counterfactuals
from fmfa.analysis.grounding import ALL, part_masks
from fmfa.analysis.maps import GRADIENT, MAPS, PatchGrid, gradient_relevance, patch_grid, phrase_maps
from fmfa.data.annotations import Dataset
from fmfa.data.images import load_image, resolve_image
from fmfa.evaluation.evaluate import evaluating
from fmfa.plots.retrieval import framed, picture_places
from fmfa.systems import System

OUTLINE = "#00e5ff"  # of the true part; stands out from grey and from every tone of the maps
_MARKERS = dict(zip(MAPS, "osD^"))
PEOPLE, CHANGES = 4, 3  # people, and changed pictures beside each one's original
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # of the colour-blind palette, one a change
_WIDTH = 44  # characters a line of a caption


def plot_grounding(table: pd.DataFrame) -> Figure:
    """Show the pointing game of every map by part and by visibility, with chance and prior.

    Args:
        table: of `fmfa.analysis.grounding.measure_grounding`, or its CSV read back.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * table["part"].nunique() + 1.6), width_ratios=(3, 2),
                                layout="constrained")  # fmt: skip
    _hits(axes[0], table[table["visibility"] == ALL], "part")
    _hits(axes[1], table[table["part"] == ALL], "visibility")
    axes[1].set_ylabel("share of the picture that the part covers")
    figure.supxlabel("pointing game: the map's highest patch is on the part (% of phrases)", fontsize=10)
    axes[0].set_ylabel("part that the phrase speaks of")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def _hits(axis: Axes, table: pd.DataFrame, by: str) -> None:
    names = [name for name in MAPS if name in set(table["map"])]
    first = table[table["map"] == names[0]].set_index(by)
    order = [name for name in first.sort_values("phrases", ascending=False).index if name != ALL]
    order = [ALL, *(sorted(order, key=_bin_start) if by == "visibility" else order)]
    places = np.arange(len(order))
    for row, name in enumerate(names):
        rows = table[table["map"] == name].set_index(by).loc[order]
        hit, low, high = (100 * rows[column].to_numpy() for column in ("hit", "hit_low", "hit_high"))
        shifted = places + (row - (len(names) - 1) / 2) * 0.17
        axis.errorbar(hit, shifted, xerr=np.abs([hit - low, high - hit]), fmt=_MARKERS[name], markersize=5,
                      color=f"C{MAPS.index(name)}", linewidth=1, capsize=2, label=name)  # fmt: skip
    for column, mark, label in (("chance_hit", ":", "chance (size of the part)"), ("prior_hit", "-", "prior place")):
        values = 100 * first.loc[order, column]
        axis.vlines(values, places - 0.42, places + 0.42, color="black", linestyle=mark, linewidth=1.6, label=label)
    axis.set_yticks(places, [f"{name} (n = {first.loc[name, 'phrases']})" for name in order])
    axis.set_xlim(-2, 102)
    axis.invert_yaxis()


def _bin_start(name: str) -> float:
    return 0.0 if name.startswith("under") else float(name.split()[0])


def plot_phrase_maps(system: System, dataset: Dataset, split: str, phrases: pd.DataFrame) -> Figure:
    """Show every map that a system has of some phrases, over the pictures, with the true part outlined.

    One line per phrase: the picture, then its maps (FMFA, TOMM 2026, Figure 5: the token-patch map before and after
    sparsification). Each map goes from its lowest to its highest patch, marked by a cross.

    Args:
        system: any.
        dataset: a SimPEDES.
        split: that the phrases are of.
        phrases: of `fmfa.analysis.grounding`.
    """
    maps = phrase_maps(system, dataset.images, phrases)
    return _map_grid(dataset, split, phrases, {name: (patch_grid(system.model), maps[name]) for name in maps})


def plot_relevance(systems: Mapping[str, System], dataset: Dataset, split: str, phrases: pd.DataFrame) -> Figure:
    """Show the gradient relevance of the same phrases under several systems, side by side; see `plot_phrase_maps`."""
    columns = {
        name: (patch_grid(system.model), phrase_maps(system, dataset.images, phrases)[GRADIENT])
        for name, system in systems.items()
    }
    return _map_grid(dataset, split, phrases, columns)


def _map_grid(
    dataset: Dataset, split: str, phrases: pd.DataFrame, columns: Mapping[str, tuple[PatchGrid, np.ndarray]]
) -> Figure:
    count = 1 + len(columns)
    size = 1.35 * len(phrases) + 0.6, 2.7 * count + 0.4
    figure, axes = plt.subplots(count, len(phrases), figsize=size, squeeze=False, layout="constrained")
    masks = part_masks(dataset, split, phrases)
    for place, row in enumerate(phrases.itertuples()):
        picture = np.asarray(load_image(resolve_image(dataset.images, row.image)))
        lines = axes[:, place]
        lines[0].imshow(picture)
        phrase = textwrap.fill(f"“{row.phrase}”", 17, max_lines=3)
        lines[0].set_title(f"{phrase}\n({row.part})", fontsize=8, parse_math=False)
        for axis, (grid, maps) in zip(lines[1:], columns.values()):
            _overlay(axis, picture, grid, maps[place])
        for axis in lines:
            _outline(axis, masks[place])
    for axis, name in zip(axes[:, 0], ["picture", *columns]):
        axis.set_ylabel(name, fontsize=9, parse_math=False)
    return figure


def plot_looked(system: System, paths: Sequence[str | Path], words: str) -> Figure:
    """Show which patches of pictures speak for a sentence or a phrase; see `gradient_relevance`.

    The figure is not pyplot's, so that a server can draw many.
    """
    device = next(system.model.parameters()).device
    given = torch.stack([system.transform(path) for path in paths]).to(device)
    with evaluating(system.model):
        ids = system.tokenizer([words] * len(paths)).to(device)
        maps = gradient_relevance(system.model, given, ids).clamp(min=0).cpu().numpy()
    pictures = [np.asarray(load_image(path)) for path in paths]
    widths = [picture.shape[1] / picture.shape[0] for picture in pictures]
    figure = Figure(figsize=(3 * sum(widths), 3), dpi=130)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    axes = figure.subplots(1, len(paths), squeeze=False, width_ratios=widths)[0]
    for axis, picture, values in zip(axes, pictures, maps):
        axis.set_axis_off()
        _overlay(axis, picture, patch_grid(system.model), values)
    return figure


def _overlay(axis: Axes, picture: np.ndarray, grid: PatchGrid, values: np.ndarray) -> None:
    """A map as colour over the grey picture; patches are drawn as cells as wide as their stride."""
    height, width = picture.shape[:2]
    rows, columns = grid.shape
    scale = height / grid.image_size[0], width / grid.image_size[1]
    margin = [(patch - stride) / 2 for patch, stride in zip(grid.patch, grid.stride)]
    top, left = (m * s - 0.5 for m, s in zip(margin, scale))
    bottom, right = top + rows * grid.stride[0] * scale[0], left + columns * grid.stride[1] * scale[1]
    span = np.ptp(values)
    shown = ((values - values.min()) / (span or 1)).reshape(rows, columns)
    axis.imshow(picture.mean(axis=2), cmap="gray", vmin=-60, vmax=320)
    axis.imshow(shown, cmap="inferno", alpha=0.62, vmin=0, vmax=1, extent=(left, right, bottom, top))
    if span:
        row, column = np.unravel_index(values.argmax(), (rows, columns))
        step = (bottom - top) / rows, (right - left) / columns
        axis.plot(left + (column + 0.5) * step[1], top + (row + 0.5) * step[0], "x", color="black", markersize=6)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _outline(axis: Axes, mask: np.ndarray) -> None:
    padded = np.pad(mask.astype(float), 1)  # so that the line closes at the picture's edge
    axis.contour(np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1), padded, [0.5], colors=OUTLINE,
                 linewidths=1.2)  # fmt: skip
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def counterfactual_strip(system: System, dataset: Dataset, split: str, seed: int) -> Figure:
    """Show four people beside themselves with one attribute changed, under the caption that no longer fits.

    One line per person: a caption whose phrases are set bold in the colour of the picture in which they are no longer
    true; the original picture; up to three changed ones, each with the new value and the cosine similarity with the
    caption. A change that is followed lowers the similarity: it is ticked, and an equal similarity marked by "=".

    Args:
        system: scores pictures and captions.
        dataset: a SimPEDES.
        split: of the data set.
        seed: of the choice of people, captions and values.

    Raises:
        AnnotationError: `dataset` is no SimPEDES, or its pictures are not those of this renderer.
    """
    strips = _draw_strips(dataset, split, np.random.default_rng(seed))
    counterfactuals = [made for strip in strips for made in strip]
    scores = score_counterfactuals(system, dataset, counterfactuals)
    before, after = (dict(zip(map(id, counterfactuals), values.tolist())) for values in (scores.before, scores.after))
    figure, lines = picture_places(len(strips), [3.9] + [1] * (CHANGES + 1), (9.5, 2.9 * len(strips)))
    for (text, original, *places), strip in zip(lines, strips, strict=True):
        _write_caption(text, strip)
        title = f"original\nsimilarity\n{before[id(strip[0])]:.3f}"
        framed(original, dataset.images / strip[0].site.phrase["image"], title)
        for axis, made, colour in zip(places, strip, COLOURS):
            change = after[id(made)] - before[id(made)]
            mark = "✓" if change < 0 else "✗" if change > 0 else "="
            name = made.attribute.replace("_", " ")
            framed(axis, made.changed, f"{name}:\n{made.value}\n{after[id(made)]:.3f} {mark}", colour)
    return figure


def _draw_strips(dataset: Dataset, split: str, rng: np.random.Generator) -> list[list[Counterfactual]]:
    """For each of four people one caption, with up to three changed pictures of different phrases."""
    captions: dict[int, dict[str, list[Site]]] = {}
    for site in read_sites(dataset, split):
        captions.setdefault(site.phrase["identity"], {}).setdefault(site.phrase["caption"], []).append(site)
    changer, strips = Changer(dataset, split, rng), []
    for person in rng.permutation(sorted(captions)):
        texts = list(captions[person].values())
        sites = texts[rng.integers(len(texts))]
        strip: list[Counterfactual] = []
        for i in rng.permutation(len(sites)):
            told = {made.site.phrase["start"] for made in strip}
            if sites[i].phrase["start"] not in told and (made := changer.picture(sites[i])):
                strip.append(made)
            if len(strip) == CHANGES:
                break
        if strip:
            strips.append(strip)
        if len(strips) == PEOPLE:
            break
    return strips


def _write_caption(axis: Axes, strip: list[Counterfactual]) -> None:
    """Write a caption in letters of one width, so that phrases can be written over it in bold."""
    text = strip[0].site.phrase["caption"]
    spans = [(made.site.phrase["start"], made.site.phrase["end"]) for made in strip]
    lines, start = [], 0
    for line in textwrap.wrap(text, _WIDTH, break_on_hyphens=False):
        start = text.index(line, start)
        lines.append((start, line))
        start += len(line)
    for number, (start, line) in enumerate(lines):
        owner = [next((k for k, (a, b) in enumerate(spans) if a <= start + i < b), None) for i in range(len(line))]
        for layer in {None, *owner}:
            shown = "".join(c if of == layer else " " for c, of in zip(line, owner))
            style: dict[str, Any] = {"color": "0.25"}
            if layer is not None:
                style = {"color": COLOURS[layer], "weight": "bold"}
            axis.annotate(shown, (0, 0.9), xytext=(0, -14 * number), xycoords="axes fraction", fontsize=9,
                          textcoords="offset points", va="baseline", family="monospace", parse_math=False,
                          **style)  # fmt: skip


def plot_counterfactual(table: pd.DataFrame) -> Figure:
    """Show `fmfa.analysis.counterfactual.measure_counterfactual`: the share of right changes by attribute.

    Bars are 95 % intervals over identities; the dashed line is the 50 % of a system that does not see the change.
    """
    parts = table[table["attribute"] != ALL]
    order = parts[parts["kind"] == PICTURE].sort_values("right", ascending=False, kind="stable")["attribute"].tolist()
    order = [ALL, *order, *(a for a in parts["attribute"].unique() if a not in order)]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(order) + 1.4), layout="constrained")
    for number, (kind, rows) in enumerate(table.groupby("kind", sort=False)):
        place = np.array([order.index(a) for a in rows["attribute"]]) + 0.3 * number - 0.15
        right = 100 * rows["right"]
        ends = [right - 100 * rows["right_low"], 100 * rows["right_high"] - right]
        fewest, most = (int(n) for n in rows["pairs"].iloc[1:].agg(["min", "max"]))
        each = f"{fewest} to {most}" if fewest < most else most
        label = f"{kind} changed, n = {int(rows['pairs'].iloc[0]):,} pairs, {each} per attribute"
        axis.errorbar(
            right, place, xerr=ends, fmt="os"[number], color=f"C{number}", capsize=2, markersize=4, label=label
        )
    axis.axvline(50, color="black", linestyle="--", linewidth=1, label="chance, 50 %")
    axis.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
    axis.set(xlabel="similarity moves the right way (% of pairs), 95 % intervals", xlim=(-2, 102))
    axis.axhline(0.5, color="0.8", linewidth=1)
    axis.invert_yaxis()
    axis.margins(y=0.02)
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure
