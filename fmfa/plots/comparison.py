"""Figures of the comparison: rows, claims, what can be seen, curves and grids, grounding against retrieval."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from fmfa.errors import ConfigError
from fmfa.study.claims import VERDICTS, seeds_in_words
from fmfa.study.correlation import SEED_ON_REAL_DATA
from fmfa.study.curves import OWN
from fmfa.study.power import gains_of_fmfa, power_table
from fmfa.study.results import Results, references

STYLES = (":", "-.", "--", (0, (1, 3)), (0, (8, 2)))
MARKERS = ("o", "s", "D", "P", "^", "v")


def plot_comparison(results: Results, split: str = "test", seed: int = 0) -> Figure:
    """Show R@1 of every row with its 95 % interval over seeds and identities, its runs, and the reference levels.

    Raises:
        ConfigError: no run was evaluated.
    """
    rows = results.rows(split)
    if not rows.runs:
        raise ConfigError(f"no run was evaluated on {split}: run notebooks/04_evaluate.ipynb first")
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(rows.runs) + 1.9), layout="constrained")
    for place, name in enumerate(rows.runs):
        mean = rows.mean(name, seed=seed)
        span = [[100 * (mean.estimate - mean.low)], [100 * (mean.high - mean.estimate)]]
        axis.errorbar(100 * mean.estimate, place, xerr=np.nan_to_num(span), fmt="o", capsize=4, color="C0")
        single = 100 * np.nanmean(rows.values(name), axis=1)
        axis.plot(single, np.full(len(single), place + 0.2), "|", color="C1", markersize=8)
    for (name, level), style in zip(references(results, split).items(), cycle(STYLES), strict=False):
        value = level["R@1"][0]
        axis.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name}, {value:.1f} %")
    labels = [f"{name} ({seeds_in_words([len(runs)])})" for name, runs in rows.runs.items()]
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    people = len(np.unique(rows.identity))
    axis.set(xlabel=f"R@1 on {split} (%), n = {len(rows.identity):,} queries of {people:,} identities", xlim=(0, 100))
    axis.invert_yaxis()
    axis.margins(y=0.05)
    _legend_below(figure)
    return figure


def plot_ranking(table: pd.DataFrame, metric: str = "R@1") -> Figure:
    """Show a metric of scored systems with its 95 % interval, best first, with their ranks, by what a query costs.

    Args:
        table: of `fmfa.compare.compare_systems`.
        metric: a column of it that `low` and `high` belong to.
    """
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(table) + 1.5), layout="constrained")
    sns.scatterplot(table.assign(place=table.index), x=metric, y="place", hue="cost", style="cost", s=70, ax=axis)
    axis.hlines(table.index, table["low"], table["high"], color="0.4", linewidth=1.5, zorder=0)
    ranks = [f"{first} to {last}" if first < last else first for first, last in zip(table["rank"], table["last rank"])]
    labels = [f"{system} (rank {rank})" for system, rank in zip(table["system"], ranks)]
    axis.set_yticks(table.index, labels, parse_math=False)
    axis.set(xlabel=f"{metric} (%), 95 % intervals over identities", ylabel="", ylim=(len(table) - 0.5, -0.5))
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1), title="cost of a query")
    return figure


def plot_claims(table: pd.DataFrame, own: pd.DataFrame | None = None, name: str = "") -> Figure | None:
    """Show the measured difference of each claim that was run with its intervals; None without any.

    Thick bars are 95 % intervals, thin ones those corrected by Holm's method, which exclude zero exactly if there is
    a verdict.

    Args:
        table: of `claims_table`.
        own: the same of other results, drawn hollow beside it with their 95 % intervals.
        name: what the legend calls `own`.
    """
    run = table[table["seeds"] > 0].reset_index(drop=True)
    if run.empty:
        return None
    beside = run[["claim"]].merge(own[own["seeds"] > 0], on="claim", how="left") if own is not None else run.iloc[:0]
    figure, axis = plt.subplots(figsize=(9, 0.34 * len(run) + 1.7), layout="constrained")
    for place, (verdict, marker) in enumerate(zip(VERDICTS, MARKERS, strict=True)):
        part, colour = run[run["verdict"] == verdict], f"C{place}"
        if part.empty:
            continue
        axis.hlines(part.index, part["low (Holm)"], part["high (Holm)"], color=colour, linewidth=1)
        axis.hlines(part.index, part["low"], part["high"], color=colour, linewidth=3)
        axis.plot(part["R@1 difference"], part.index, marker, color=colour, label=verdict)
    if beside["seeds"].notna().any():
        places = beside.index + 0.27
        axis.hlines(places, beside["low"], beside["high"], color="black", linewidth=1)
        seeds = beside["seeds"].dropna().astype(int)
        label = f"{name}: {seeds_in_words(seeds)}{', one draw' if seeds.max() == 1 else ''}"
        axis.plot(beside["R@1 difference"], places, "o", color="black", fillstyle="none", label=label)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(run.index, run["claim"], parse_math=False)
    axis.plot([], [], color="0.4", linewidth=3, label="95 % interval")
    if run["low (Holm)"].notna().any():
        axis.plot([], [], color="0.4", linewidth=1, label="corrected for the number of claims (Holm)")
    axis.set_xlabel(f"difference in R@1 (points), n = {seeds_in_words(run['seeds'])} per row")
    axis.set_ylim(len(run) - 0.4, -0.6)
    _legend_below(figure)
    return figure


def plot_known(table: pd.DataFrame) -> Figure | None:
    """Show the differences that are known from real data beside those measured here; None without any.

    Args:
        table: of `claims_table`, kind "known", without what was not run.
    """
    if table.empty:
        return None
    figure, axis = plt.subplots(figsize=(9, 0.38 * len(table) + 1.5), layout="constrained")
    places, here = np.arange(len(table)), table["R@1 difference"]
    spread = 1.96 * np.sqrt(2) * SEED_ON_REAL_DATA
    label = "CUHK-PEDES, one run each, within two runs' noise (published, not measured here)"
    axis.errorbar(table["real data"], places - 0.14, xerr=spread, fmt="D", color="0.4", fillstyle="none", label=label)
    errors = [here - table["low"], table["high"] - here]
    label = f"rendered people, {seeds_in_words(table['seeds'])}, 95 % interval"
    axis.errorbar(here, places + 0.14, xerr=errors, fmt="o", color="C0", label=label)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(places, table["claim"], parse_math=False)
    axis.invert_yaxis()
    axis.set_xlabel("difference in R@1 (points)")
    _legend_below(figure)
    return figure


def plot_power(table: pd.DataFrame) -> Figure | None:
    """Show the smallest difference that is seen, by seeds and identities, with FMFA's published gains; None without.

    Args:
        table: of `components_table`.
    """
    if table.empty:
        return None
    seeds = np.unique(np.geomspace(2, 30, 14).round().astype(int))
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, values), marker in zip(power_table(table, seeds.tolist()).items(), MARKERS, strict=False):
        axis.plot(seeds, values, marker=marker, markersize=4, label=name)
    gains = gains_of_fmfa()
    for value in gains:
        axis.axhline(value, color="black", linestyle=":", linewidth=0.8)
    axis.plot(
        [], [], color="black", linestyle=":", label=f"FMFA's published gains, n = {len(gains)} (not measured here)"
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="seeds of each row",
        ylabel="smallest difference in R@1\nseen with 80 % power (points)",
    )
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axis.set_xticks([2, 3, 5, 10, 20, 30])
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50])
    axis.set_ylim(0.1, None)
    axis.legend(fontsize=8)
    return figure


def plot_against_retrieval(table: pd.DataFrame, group: str, measure: str, label: str) -> Figure | None:
    """Plot a measure of every run against R@1, one panel per value of `group`, one colour per system; None if empty.

    Args:
        table: of `grounding_runs` or `counterfactual_runs`.
        group: column of the panels.
        measure: column on the x axis.
        label: what it is, with its unit.
    """
    if table.empty:
        return None
    panels = min(table[group].nunique(), 4)
    points = {"hue": "system", "style": "system", "height": 2.8, "s": 60, "alpha": 0.7}
    grid = sns.relplot(table, x=measure, y="R@1", col=group, col_wrap=panels, **points)
    grid.set_axis_labels("", f"R@1 (%), n = {table[['row', 'seed']].drop_duplicates().shape[0]} runs")
    grid.set_titles("{col_name}")
    grid.figure.supxlabel(label, fontsize="medium", y=-0.02)
    return grid.figure


def plot_domains(table: pd.DataFrame) -> Figure | None:
    """Show R@1 by row and training set with 95 % intervals, one panel a test set; None without a line.

    Args:
        table: of `cross_domain_table`.
    """
    if table.empty:
        return None
    tests, homes, rows = (list(dict.fromkeys(table[name])) for name in ("tested on", "trained on", "row"))
    figure, axes = plt.subplots(1, len(tests), figsize=(4 * len(tests) + 1, 0.5 * len(rows) + 1.6), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")  # fmt: skip
    for axis, test in zip(axes[0], tests):
        for number, (home, marker) in enumerate(zip(homes, cycle(MARKERS))):
            part = table[(table["tested on"] == test) & (table["trained on"] == home)]
            places = part["row"].map(rows.index) + 0.2 * (number - (len(homes) - 1) / 2)
            errors = [part["R@1"] - part["low"], part["high"] - part["R@1"]]
            axis.errorbar(part["R@1"], places, xerr=errors, fmt=marker, color=f"C{number}", capsize=3, label=home)
        queries = table.loc[table["tested on"] == test, "queries"].iloc[0]
        axis.set_xlabel(f"R@1 on {test} (%), n = {queries:,} queries", parse_math=False)
    labels = [f"{row} ({seeds_in_words(seeds)})" for row, seeds in table.groupby("row", sort=False)["seeds"]]
    axes[0][0].set_yticks(range(len(rows)), labels, parse_math=False)
    axes[0][0].invert_yaxis()
    axes[0][0].margins(y=0.12)
    handles, names = axes[0][0].get_legend_handles_labels()
    _legend_below(figure, handles, [f"trained on {name}" for name in names])
    return figure


def plot_sensitivity(table: pd.DataFrame) -> Figure | None:
    """Show R@1 over each hyper-parameter with 95 % intervals (FMFA, TOMM 2026, Figure 4); None without a curve.

    The system's own value is a square; the band is where one further training with it would lie (95 %).

    Args:
        table: of `curves.sensitivity_table`.
    """
    names = list(dict.fromkeys(table["curve"]))
    if not names:
        return None
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns + 0.5, 3.1 * lines), squeeze=False, sharey=True,
                                layout="constrained")  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        points = table[table["curve"] == name]
        axis.plot(points["value"], points["estimate"], color="C0", linewidth=1)
        for own, marker in ((False, "o"), (True, "s")):
            part = points[points[OWN] == own]
            errors = [part["estimate"] - part["low"], part["high"] - part["estimate"]]
            axis.errorbar(part["value"], part["estimate"], yerr=errors, fmt=marker, color=f"C{int(own)}", capsize=3)
        own = points[points[OWN]]
        if own["further_low"].notna().any():
            axis.axhspan(own["further_low"].iloc[0], own["further_high"].iloc[0], color="C1", alpha=0.2, linewidth=0)
        if points["value"].min() > 0 and points["value"].max() >= 30 * points["value"].min():
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.locator_params(axis="x", nbins=5)
        seeds = f"{points.loc[~points[OWN], 'seeds'].min()}" + f", own {own['seeds'].max()}" * bool(len(own))
        axis.set_xlabel(name, parse_math=False)
        axis.set_title(f"seeds: {seeds}; n = {points['queries'].iloc[0]:,} queries", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("R@1 (%)")
    return figure


def plot_grid(table: pd.DataFrame) -> Figure | None:
    """Show how far every point of the grids ended above or below its start, one panel a grid; None without one.

    Colour and upper number: R@1 on validation after the last epoch minus that of the start (points); in brackets the
    R@1 (%) on the split that is compared.

    Args:
        table: of `curves.grid_table`.
    """
    if table.empty:
        return None
    grids = list(table.groupby("grid", sort=False))
    figure, axes = plt.subplots(1, len(grids), figsize=(4.4 * len(grids) + 1, 3.4), squeeze=False, layout="constrained")
    gained = table["last"] - table["start"]
    reach = max(gained.abs().max(), 1)
    for axis, (name, points) in zip(axes[0], grids):
        first, second = points.columns[1:3]
        change = points.assign(gained=gained[points.index]).pivot(index=first, columns=second, values="gained")
        level = points.pivot(index=first, columns=second, values="R@1")
        words = change.map("{:+.1f}".format) + level.map("\n({:.1f} %)".format)
        sns.heatmap(change, annot=words, fmt="", cmap="RdBu", center=0, vmin=-reach, vmax=reach, ax=axis,
                    cbar=axis is axes[0][-1], cbar_kws={"label": "last epoch minus start (points of R@1)"})  # fmt: skip
        title = f"{name}: start at {points['start'].mean():.1f} % on validation"
        axis.set_title(title, fontsize=10, parse_math=False)
    return figure


def _legend_below(figure: Figure, *entries: Sequence) -> None:
    for text in figure.legend(*entries, fontsize=8, loc="outside lower center", ncols=3).get_texts():
        text.set_parse_math(False)  # names of data sets and weight files
