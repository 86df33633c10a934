"""Figures of counterfactuals: what was changed, and whether the similarity follows it, by attribute."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmfa.alignment.changes import PICTURE, Changer, Counterfactual, Site, read_sites
from fmfa.alignment.counterfactual import ALL, score_counterfactuals
from fmfa.data.annotations import Dataset
from fmfa.data.images import load_image
from fmfa.systems import System

CHANGES = 3  # changed pictures beside an original
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # of the colour-blind palette, one a change
_WIDTH = 44  # characters a line of a caption


def counterfactual_strip(system: System, dataset: Dataset, split: str, seed: int = 0, people: int = 4) -> Figure:
    """Show people beside themselves with one attribute changed, under the caption that no longer fits.

    One line a person: a caption whose phrases are set bold in the colour of the picture in which they are no longer
    true; the original picture; up to three changed ones, each with the new value and the cosine similarity with the
    caption. A change that is followed lowers the similarity: it is ticked, and an equal similarity marked by "=".

    Args:
        system: scores pictures and captions.
        dataset: a SimPEDES.
        split: of the data set.
        seed: of the choice of people, captions and values.
        people: lines.

    Raises:
        AnnotationError: `dataset` is no SimPEDES, or its pictures are not those of this renderer.
    """
    strips = _draw_strips(dataset, split, np.random.default_rng(seed), people)
    found = [made for strip in strips for made in strip]
    scores = score_counterfactuals(system, dataset, found)
    before, after = (dict(zip(map(id, found), values.tolist())) for values in (scores.before, scores.after))
    figure, lines = plt.subplots(len(strips), CHANGES + 2, figsize=(9.5, 2.9 * len(strips)), squeeze=False,
                                 width_ratios=[3.9] + [1] * (CHANGES + 1), layout="constrained")  # fmt: skip
    for (text, original, *places), strip in zip(lines, strips, strict=True):
        for axis in (text, original, *places):
            axis.set_axis_off()
        record = strip[0].site.record
        _write_caption(text, strip)
        _show(original, np.asarray(load_image(dataset.images / record["file_path"])), "0.6",
              f"original\nsimilarity\n{before[id(strip[0])]:.3f}")  # fmt: skip
        for axis, made, colour in zip(places, strip, COLOURS):
            change = after[id(made)] - before[id(made)]
            mark = "✓" if change < 0 else "✗" if change > 0 else "="
            name = made.attribute.replace("_", " ")
            _show(axis, made.changed, colour, f"{name}:\n{made.value}\n{after[id(made)]:.3f} {mark}")
    return figure


def _draw_strips(dataset: Dataset, split: str, rng: np.random.Generator, people: int) -> list[list[Counterfactual]]:
    """For each of some people one caption, with up to three changed pictures of different phrases."""
    captions: dict[int, dict[str, list[Site]]] = {}
    for site in read_sites(dataset, split):
        captions.setdefault(site.record["id"], {}).setdefault(site.text, []).append(site)
    changer, strips = Changer(dataset, rng), []
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
        if len(strips) == people:
            break
    return strips


def _write_caption(axis: Axes, strip: list[Counterfactual]) -> None:
    """Write a caption in letters of one width, so that phrases can be written over it in bold."""
    text = strip[0].site.text
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
            style = {"color": "0.25"} if layer is None else {"color": COLOURS[layer], "weight": "bold"}
            axis.annotate(shown, (0, 0.9), xytext=(0, -14 * number), xycoords="axes fraction", fontsize=9,
                          textcoords="offset points", va="baseline", family="monospace", parse_math=False,
                          **style)  # fmt: skip


def _show(axis: Axes, picture: np.ndarray, colour: str, title: str) -> None:
    axis.set_axis_on()
    axis.grid(False)
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8, color="black" if colour == "0.6" else colour)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)


def plot_counterfactual(table: pd.DataFrame) -> Figure:
    """Show `fmfa.alignment.counterfactual.measure_counterfactual`: the share of right changes by attribute.

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
