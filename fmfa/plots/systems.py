"""Figures that set trained systems side by side: what they find, their similarities, their shared space."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch.nn import functional as F

from fmfa.data.annotations import Dataset
from fmfa.data.images import resolve_image
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation
from fmfa.plots.retrieval import HIT, MISS, SHOWN, framed, picture_places
from fmfa.simpedes.truth import Truth, told_truly

PERPLEXITY = 30  # of t-SNE: how many neighbours a point has, about


def pick_disagreements(evaluations: Mapping[str, Evaluation], count: int, seed: int = 0) -> list[int]:
    """Draw captions whose person some systems find first and others do not; of one system, captions that it misses.

    Returns:
        Row positions in the evaluations' `rows`, ascending; fewer than `count` if there are no more.
    """
    hits = np.stack([e.metrics[TEXT_TO_IMAGE].first_rank == 1 for e in evaluations.values()])
    differing = hits.any(axis=0) != hits.all(axis=0) if len(hits) > 1 else ~hits[0]
    rows = np.flatnonzero(differing)
    return sorted(np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False).tolist())


def plot_side_by_side(evaluations: Mapping[str, Evaluation], dataset: Dataset, split: str, query: int) -> Figure:
    """Show the ten best pictures of one caption, one line per system (FMFA, TOMM 2026, Figures 6 to 8).

    Right persons are framed green and ticked, others red and crossed; on SimPEDES, below each wrong person is what
    the caption rules out in it.

    Args:
        evaluations: by the system's name, all of the same split.
        dataset: that was evaluated.
        split: of the data set.
        query: row position of the caption.
    """
    row = next(iter(evaluations.values())).rows.iloc[query]
    wrong = _contradictions(dataset.truth, split, row.to_frame().T) if dataset.truth else {}
    size = 1.12 * SHOWN + 1.6, 3.35 * len(evaluations) + 0.7
    figure, lines = picture_places(len(evaluations), [1] * (SHOWN + 1), size)
    figure.suptitle(textwrap.fill(row["caption"], 125), fontsize=9, parse_math=False)
    for (target, *places), (name, evaluation) in zip(lines, evaluations.items()):
        framed(target, resolve_image(dataset.images, row["image"]), "wanted")
        rank = evaluation.metrics[TEXT_TO_IMAGE].first_rank[query]
        target.set_xlabel(f"{textwrap.fill(name, 14)}\nfirst hit at\nrank {rank}", fontsize=8, parse_math=False)
        matches = evaluation.top_matches(query, SHOWN).itertuples(index=False)
        for place, (axis, match) in enumerate(zip(places, matches), start=1):
            mark, colour = ("✓", HIT) if match.hit else ("✗", MISS)
            framed(axis, resolve_image(dataset.images, match.image), f"{place} {mark}", colour)
            if wrong and not match.hit:
                axis.set_xlabel(wrong[match.identity], fontsize=6.5)
    return figure


def _contradictions(truth: Truth, split: str, row: pd.DataFrame) -> dict[int, str]:
    """For each identity, the attributes in which it contradicts what the caption of one row truly tells."""
    told = told_truly(truth.of_captions(split, row)[0])
    return {
        identity: _listed(
            [f"{name.replace('_', ' ')}: {person[name]}" for name in told if person[name] not in told[name]]
        )
        for identity, person in truth.people(split).iterrows()
    }


def _listed(lines: list[str]) -> str:
    shown = lines if len(lines) <= 4 else [*lines[:3], f"and {len(lines) - 3} more"]
    return "\n".join(textwrap.fill(line, 17) for line in shown) or "(all that is\ntold fits)"


def plot_similarities(evaluations: Mapping[str, Evaluation], seed: int = 0) -> Figure:
    """Show the cosines of captions with pictures of their person and of others, one panel per system.

    Args:
        evaluations: by the system's name.
        seed: of the draw of up to 2,000 captions, each against the whole gallery.
    """
    figure, axes = plt.subplots(1, len(evaluations), figsize=(4.6 * len(evaluations) + 0.6, 3.4), squeeze=False,
                                sharey=True, layout="constrained")  # fmt: skip
    for axis, (name, evaluation) in zip(axes[0], evaluations.items()):
        total = len(evaluation.rows)
        sample = np.random.default_rng(seed).choice(total, min(2000, total), replace=False)
        text = F.normalize(evaluation.text_features[torch.from_numpy(sample)], dim=1)
        cosine = (text @ F.normalize(evaluation.image_features, dim=1).T).numpy()
        own = evaluation.rows["identity"].to_numpy()[sample][:, None] == evaluation.gallery["identity"].to_numpy()
        edges = np.linspace(cosine.min(), cosine.max(), 60)
        for values, label, style in ((cosine[own], "matched", "-"), (cosine[~own], "unmatched", "--")):
            axis.hist(values, edges, density=True, histtype="step", linestyle=style, linewidth=1.8,
                      label=f"{label}, n = {values.size:,}")  # fmt: skip
        axis.set_title(name, parse_math=False)
        axis.set_xlabel("cosine of caption and picture")
        axis.legend(fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("density of pairs")
    return figure


def plot_joint_space(evaluation: Evaluation, truth: Truth, split: str, seed: int = 0) -> Figure:
    """Show captions and pictures of six families of look-alikes, laid out in a plane by t-SNE (scikit-learn).

    Each modality's mean is taken away from the unit vectors first, since the gap between pictures and captions would
    set the two apart; its size is in the title. t-SNE keeps neighbours together; its distances and axes mean nothing.

    Args:
        evaluation: of a SimPEDES split.
        truth: of that SimPEDES.
        split: that was evaluated.
        seed: of the draw.
    """
    family = truth.people(split)["family"]
    names = family.unique()
    selection = np.random.default_rng(seed).choice(names, min(6, len(names)), replace=False).tolist()
    sides, means = [], []
    for kind, table, features in (
        ("picture", evaluation.gallery, evaluation.image_features),
        ("caption", evaluation.rows, evaluation.text_features),
    ):
        of = table["identity"].map(family)
        mask = of.isin(selection).to_numpy()
        unit = F.normalize(features[torch.tensor(mask)], dim=1)
        means.append(unit.mean(dim=0))
        people = table["identity"].to_numpy()[mask]
        sides.append(
            (unit - means[-1], pd.DataFrame({"kind": kind, "family": of.to_numpy()[mask], "identity": people}))
        )
    vectors, table = torch.cat([unit for unit, _ in sides]), pd.concat([t for _, t in sides], ignore_index=True)
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    table[["x", "y"]] = TSNE(perplexity=perplexity, metric="cosine", random_state=seed).fit_transform(vectors.numpy())
    gap = float((means[0] - means[1]).norm())
    figure, axis = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
    for place, name in enumerate(selection):
        members, colour = table[table["family"] == name], f"C{place % 10}"
        for kind, marker, face in (("picture", "o", colour), ("caption", "^", "none")):
            points = members[members["kind"] == kind]
            axis.scatter(points["x"], points["y"], marker=marker, s=30, edgecolors=colour, facecolors=face)
        centre = members[["x", "y"]].median()
        box = {"boxstyle": "circle", "facecolor": "white", "edgecolor": colour, "alpha": 0.85}
        axis.annotate(str(place + 1), centre, fontsize=12, weight="bold", ha="center", va="center", bbox=box)
    counts = table["kind"].value_counts()
    axis.set(
        xlabel=f"t-SNE (cosine, perplexity {perplexity:.0f}): neighbours are close together, distances have no unit",
        xticks=[],
        yticks=[],
        title=f"{counts['picture']} pictures (●) and {counts['caption']} captions (△) of {len(selection)} families; "
        f"gap between the modalities' means {gap:.2f}",
    )
    axis.title.set_fontsize(9)
    return figure
