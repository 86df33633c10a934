"""Figures of alignment: maps of phrases over their pictures, and how often they point at the right part."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmfa.alignment.maps import GRADIENT, MAPS, phrase_maps
from fmfa.alignment.patches import PatchGrid, patch_grid
from fmfa.alignment.phrases import part_masks
from fmfa.alignment.scores import ALL
from fmfa.data.annotations import Dataset
from fmfa.data.images import load_image, resolve_image
from fmfa.systems import System

OUTLINE = "#00e5ff"  # of the true part; stands out from grey and from every tone of the maps
_MARKERS = dict(zip(MAPS, "osD^"))


def plot_grounding(table: pd.DataFrame) -> Figure:
    """Show the pointing game of every map by part and by visibility, with chance and prior.

    Args:
        table: of `fmfa.alignment.measure_grounding`, or its CSV read back.
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
        found = table[table["map"] == name].set_index(by).loc[order]
        hit, low, high = (100 * found[column].to_numpy() for column in ("hit", "hit_low", "hit_high"))
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

    One line a phrase: the picture, then its maps (FMFA, TOMM 2026, Figure 5: the token-patch map before and after
    sparsification). Each map goes from its lowest to its highest patch, marked by a cross.

    Args:
        system: any.
        dataset: a SimPEDES.
        split: that the phrases are of.
        phrases: of `fmfa.alignment.phrases`.
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


def percent_table(table: pd.DataFrame) -> pd.DataFrame:
    """The totals of `measure_grounding` in percent, one row a map, then what chance and the prior reach."""
    total = table[(table["part"] == ALL) & (table["visibility"] == ALL)]
    rows = [
        {"map": r.map, "hit": f"{100 * r.hit:.1f} [{100 * r.hit_low:.1f}, {100 * r.hit_high:.1f}]",
         "mass": f"{100 * r.mass:.1f}", "ap": f"{100 * r.ap:.1f}", "phrases": r.phrases}
        for r in total.itertuples()
    ]  # fmt: skip
    r = next(total.itertuples())
    chance = {"hit": r.chance_hit, "mass": r.chance_hit, "ap": r.chance_ap}  # a flat map's mass is the part's size
    prior = {"hit": r.prior_hit, "mass": r.prior_mass, "ap": r.prior_ap}
    for name, values in (("chance", chance), ("prior place", prior)):
        rows.append({"map": name, **{key: f"{100 * value:.1f}" for key, value in values.items()}, "phrases": r.phrases})
    return pd.DataFrame(rows)
