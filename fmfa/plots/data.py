"""Figures of a data set: what is in it, and what SimPEDES knows about itself."""

import textwrap
from collections import Counter
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from fmfa.data.annotations import Dataset
from fmfa.data.images import load_image, resolve_image
from fmfa.plots.retrieval import picture_places
from fmfa.simpedes.canvas import PARTS
from fmfa.simpedes.people import ATTRIBUTES
from fmfa.simpedes.truth import Truth

# What the papers say of their captions; CUHK-PEDES: Li et al., CVPR 2017; ICFG-PEDES: Ding et al., arXiv 2107.12666;
# RSTPReid: Zhu et al., ACM MM 2021 (gives a minimum of 23 words, no mean).
PUBLISHED_CAPTIONS = pd.DataFrame(
    [("CUHK-PEDES", 23.5, 9408), ("ICFG-PEDES", 37.2, 5554)], columns=["data set", "mean words", "vocabulary"]
)
PART_COLOURS = ("#000000", "#555555", "#f0c8a0", "#5b3a1e", "#0072b2", "#00e5ff", "#cc79a7", "#009e73", "#005f43",
                "#b2df8a", "#56b4e9", "#d55e00", "#f0e442", "#ff7fbf")  # fmt: skip


def use_style() -> None:
    """Set the look of every figure (light grid, colour-blind palette, readable in print), and show tables in full."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook", font_scale=0.9)
    plt.rcParams["figure.dpi"] = 90
    for limit in ("max_rows", "max_columns", "max_colwidth"):
        pd.set_option(f"display.{limit}", None)


def words(captions: pd.Series) -> pd.Series:
    """Return the words of each caption: lower case, letters with inner apostrophes and hyphens."""
    return captions.str.lower().str.findall(r"[^\W_]+(?:['-][^\W_]+)*")


def plot_counts(dataset: Dataset) -> Figure:
    """Show how many pictures per identity has and how many captions per picture has, by split."""
    table = dataset.table
    images = table.groupby(["split", "identity"], observed=True)["image"].nunique().rename("images per identity")
    captions = table.groupby(["split", "image"], observed=True).size().rename("captions per image")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, counts in zip(axes, (images, captions), strict=True):
        parts = counts.groupby("split", observed=True, sort=False)
        share = parts.value_counts(normalize=True).mul(100).rename("share").reset_index()
        named = {split: f"{split} (n = {number:,})" for split, number in parts.size().items()}
        share["split"], order = share["split"].map(named), table["split"].drop_duplicates().map(named)
        sns.barplot(share, x=counts.name, y="share", hue="split", hue_order=order, ax=axis)
        axis.set(ylabel="share within split (%)", ylim=(0, 105))
        sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_captions(dataset: Dataset) -> tuple[Figure, pd.DataFrame]:
    """Show caption lengths and how the vocabulary grows, beside what the papers publish; returns the table too."""
    captions = words(dataset.table["caption"])
    lengths = captions.str.len()
    vocabulary = Counter(word for caption in captions for word in caption)
    seen: set[str] = set()
    growth = []
    for caption in captions:
        seen.update(caption)
        growth.append(len(seen))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    sns.histplot(x=lengths, discrete=True, stat="percent", ax=axes[0], color="C0")
    for (name, mean, _), style in zip(PUBLISHED_CAPTIONS.itertuples(index=False), ("--", ":"), strict=True):
        axes[0].axvline(mean, color="black", linestyle=style, label=f"{name}, published mean {mean}")
    axes[0].axvline(lengths.mean(), color="C3", label=f"here, mean {lengths.mean():.1f}")
    axes[0].set(xlabel="words per caption", ylabel=f"share of n = {len(lengths):,} captions (%)")
    axes[0].legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes[1].plot(np.arange(1, len(growth) + 1), growth, color="C0")
    axes[1].set(xlabel="captions read", ylabel="different words", xscale="log")
    table = pd.concat(
        [
            PUBLISHED_CAPTIONS.assign(origin="published, not measured here"),
            pd.DataFrame([{"data set": dataset.name, "mean words": lengths.mean().round(1),
                           "vocabulary": len(vocabulary), "shortest": lengths.min(), "longest": lengths.max(),
                           "origin": "measured here"}]),
        ],
        ignore_index=True,
    )  # fmt: skip
    return figure, table


def contact_sheet(dataset: Dataset, split: str, seed: int = 0) -> Figure:
    """Show twelve pictures drawn at random from a split, each with its first caption."""
    rows = dataset.split(split).drop_duplicates("image")
    rows = rows.sample(min(12, len(rows)), random_state=np.random.default_rng(seed))
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = picture_places(lines, [1, 2] * columns, (13, 2.6 * lines))
    for place, row in enumerate(rows.itertuples(index=False)):
        picture, text = axes[place // columns, 2 * (place % columns) : 2 * (place % columns) + 2]
        picture.imshow(load_image(resolve_image(dataset.images, row.image)), interpolation="nearest")
        caption = textwrap.fill(row.caption, 30, max_lines=10, placeholder=" ...")
        text.text(0, 0.98, f"identity {row.identity}\n{caption}", va="top", fontsize=8, transform=text.transAxes,
                  parse_math=False)  # fmt: skip
    return figure


def plot_part_maps(dataset: Dataset, split: str, seed: int) -> Figure:
    """Show ten SimPEDES pictures above their true part maps."""
    maps = dataset.require_truth().parts(split)
    paths = np.random.default_rng(seed).choice(list(maps), size=min(10, len(maps)), replace=False)
    figure, axes = picture_places(2, [1] * len(paths), (1.15 * len(paths) + 1.6, 6.4))
    colours = ListedColormap(PART_COLOURS)
    for column, path in enumerate(paths):
        axes[0, column].imshow(load_image(dataset.images / path), interpolation="nearest")
        shown = axes[1, column].imshow(
            maps[path], cmap=colours, vmin=-0.5, vmax=len(PARTS) - 0.5, interpolation="nearest"
        )
    bar = figure.colorbar(shown, ax=axes, ticks=range(len(PARTS)), fraction=0.02)
    bar.ax.set_yticklabels(PARTS)
    return figure


def plot_attributes(truth: Truth, split: str) -> Figure:
    """Show how often each attribute value occurs among the identities of a SimPEDES split."""
    people = truth.people(split)
    shown = ("gender", "hair_style", "hair_colour", "headwear", "glasses", "top", "top_colour", "outer", "lower",
             "lower_colour", "shoes", "bag")  # fmt: skip
    figure, axes = plt.subplots(3, 4, figsize=(13, 8.5), layout="constrained")
    for axis, name in zip(axes.flat, shown, strict=True):
        share = people[name].value_counts(normalize=True) * 100
        sns.barplot(x=share.to_numpy(), y=share.index, ax=axis, color="C0")
        axis.set(title=name.replace("_", " "), xlabel="", ylabel="")
    figure.supxlabel(f"share of n = {len(people):,} identities (%)")
    return figure


def plot_families(dataset: Dataset, split: str) -> Figure:
    """Show five families of look-alikes side by side, with the attributes in which they differ."""
    truth = dataset.require_truth()
    families = [family for _, family in truth.people(split).groupby("family", sort=False) if len(family) > 1][:5]
    shown = truth.pictures(split).reset_index().drop_duplicates("identity").set_index("identity")["image"]
    size = max(map(len, families))
    columns = len(families) * size
    figure, (axes,) = picture_places(1, [1] * columns, (1.35 * columns, 4.4))
    for k, family in enumerate(families):
        for axis, identity in zip(axes[k * size :], family.index, strict=False):
            axis.imshow(load_image(dataset.images / shown[identity]), interpolation="nearest")
            axis.set_title(f"id {identity}", fontsize=8)
        lines = [f"{n}: " + " / ".join(family[n]) for n in sorted(ATTRIBUTES) if family[n].nunique() > 1]
        axes[k * size].text(0, -0.06, "\n".join(textwrap.fill(line, 30) for line in lines), va="top", fontsize=7,
                            transform=axes[k * size].transAxes)  # fmt: skip
    return figure


def family_differences(truth: Truth, split: str) -> pd.DataFrame:
    """Return how often look-alikes differ in each attribute (share of pairs, %)."""
    families = [family[list(ATTRIBUTES)] for _, family in truth.people(split).groupby("family", sort=False)]
    pairs = [family.iloc[i] != family.iloc[j] for family in families for i, j in combinations(range(len(family)), 2)]
    counts = Counter(name for differs in pairs for name in differs.index[differs])
    table = pd.DataFrame(counts.most_common(), columns=["attribute", "pairs"])
    return table.assign(**{"share (%)": (100 * table["pairs"] / max(len(pairs), 1)).round(1)})


def mistake_rates(truth: Truth, split: str) -> pd.DataFrame:
    """Return phrases, and injected mistakes, by the part that a phrase speaks of."""
    phrases = truth.phrases(split).assign(mistakes=lambda table: table["mistakes"].str.len() > 0)
    table = phrases.groupby("part").agg(phrases=("part", "size"), mistakes=("mistakes", "sum"))
    table = table.sort_values("phrases", ascending=False)
    table.loc["all"] = table.sum()
    return table.assign(**{"rate (%)": (100 * table["mistakes"] / table["phrases"]).round(2)})
