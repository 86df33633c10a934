"""Grounding on SimPEDES: its phrases, and how often a system's map of a phrase points at the right body part."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fmfa.analysis.maps import PatchGrid, patch_grid, phrase_maps, true_patches
from fmfa.data.annotations import Dataset
from fmfa.errors import ConfigError
from fmfa.evaluation.statistics import bootstrap_interval
from fmfa.metrics import random_ranking
from fmfa.simpedes.canvas import PARTS
from fmfa.systems import System

VISIBILITY = ((0.02, "under 2 %"), (0.08, "2 to 8 %"), (1.0, "8 % and more"))  # share of the picture: thirds of street
ALL = "all"
COLUMNS = ("map", "part", "visibility", "phrases", "hit", "hit_low", "hit_high", "mass", "ap", "chance_hit",
           "chance_ap", "prior_hit", "prior_mass", "prior_ap")  # fmt: skip


def measure_grounding(system: System, dataset: Dataset, split: str, phrases: int, seed: int = 0) -> pd.DataFrame:
    """Measure how well a system's maps of phrases point at the parts that the phrases speak of.

    Everything is counted in patches of the system's own grid (see `fmfa.analysis.maps.true_patches`): a pair of
    glasses is smaller than a patch. Hit is the pointing game: the map's highest patch shows the part. Chance is a
    map of random order; the prior is the mean place of the part in the training pictures, which needs no model.

    Args:
        system: any.
        dataset: a SimPEDES.
        split: of the data set.
        phrases: how many to draw (see `draw_phrases`); the same ones for every system.
        seed: of the draw and of the bootstrap.

    Returns:
        See `fmfa.analysis.grounding.grounding_table`; the maps are those of `fmfa.analysis.maps.phrase_maps`.

    Raises:
        AnnotationError: the data set has no ground truth.
        ConfigError: a system without known patches.
    """
    grid = patch_grid(system.model)
    drawn = draw_phrases(dataset, split, phrases, seed)
    coverage = grid.coverage(part_masks(dataset, split, drawn))
    on_grid = coverage.any(axis=1)  # at an uneven stride the last pixels belong to no patch
    drawn, true = drawn[on_grid].reset_index(drop=True), true_patches(coverage[on_grid])
    usual = prior_coverage(dataset, grid)
    prior = np.stack([usual[part] for part in drawn["part"]])
    maps = phrase_maps(system, dataset.images, drawn)
    return grounding_table(drawn, phrase_scores(maps, true, prior), seed=seed)


def draw_phrases(dataset: Dataset, split: str, count: int, seed: int = 0) -> pd.DataFrame:
    """Draw phrases of a SimPEDES split at random, without replacement; the draw does not depend on any model.

    Left out are phrases about the whole person, which have no part, and phrases with a mistake, which speak of
    something that the picture does not show.

    Args:
        dataset: a SimPEDES.
        split: of the data set.
        count: phrases; all of them if there are fewer.
        seed: of the draw.

    Returns:
        One row per phrase in the order of the data set: `image`, `identity`, `caption`, `phrase`, `start` and `end`
        (characters of the caption), `part`, `visible` (share of the picture that the part covers) and `visibility`
        (its bin).

    Raises:
        AnnotationError: the data set has no ground truth, or no such split.
    """
    table = _all_phrases(dataset, split)
    rows = np.random.default_rng(seed).permutation(len(table))[:count]
    return table.iloc[np.sort(rows)].reset_index(drop=True)


def pick_phrases(
    dataset: Dataset, split: str, count: int, seed: int = 0, positions: Sequence[int] = ()
) -> pd.DataFrame:
    """Phrases to look at: those at given positions among all of the split, or drawn, each of another part.

    Args:
        dataset: a SimPEDES.
        split: of the data set.
        count: how many to draw; at most as many as there are parts.
        seed: of the draw.
        positions: from 0, in the order of the data set; if given, nothing is drawn.

    Returns:
        As `draw_phrases`, in the order of `positions`.

    Raises:
        ConfigError: a position that no phrase has.
        AnnotationError: see `draw_phrases`.
    """
    table = _all_phrases(dataset, split)
    if wrong := [p for p in positions if not 0 <= p < len(table)]:
        raise ConfigError(f"no phrase at position {wrong[0]}: {split} has {len(table):,} phrases, counted from 0")
    if len(positions):
        return table.iloc[list(positions)].reset_index(drop=True)
    order = table.iloc[np.random.default_rng(seed).permutation(len(table))]
    return order.drop_duplicates("part").head(count).reset_index(drop=True)


def _all_phrases(dataset: Dataset, split: str) -> pd.DataFrame:
    images, truth = set(dataset.split(split)["image"]), dataset.require_truth()
    table = truth.phrases(split).rename(columns={"text": "phrase"})
    table = table[table["image"].isin(images) & table["part"].isin(PARTS) & (table["mistakes"].str.len() == 0)]
    shares = truth.pictures(split)["visible"]
    visible = [shares[image][part] for image, part in zip(table["image"], table["part"], strict=True)]
    bins = np.searchsorted([limit for limit, _ in VISIBILITY], visible, side="right")
    names = ["image", "identity", "caption", "phrase", "start", "end", "part"]
    table = table[names].assign(visible=visible, visibility=np.array([name for _, name in VISIBILITY])[bins])
    return table.reset_index(drop=True)


def part_masks(dataset: Dataset, split: str, phrases: pd.DataFrame) -> np.ndarray:
    """Pixels of each phrase's part, bool [P, H, W]."""
    maps = dataset.require_truth().parts(split)
    return np.stack([maps[row.image] == PARTS.index(row.part) for row in phrases.itertuples()])


def prior_coverage(dataset: Dataset, grid: PatchGrid) -> dict[str, np.ndarray]:
    """Where each part usually is: mean coverage of the patches over all training pictures, float32 [N] by part."""
    maps = np.stack(list(dataset.require_truth().parts("train").values()))
    usual = np.stack([(maps == part).mean(axis=0) for part in range(len(PARTS))])
    return dict(zip(PARTS, grid.coverage(usual), strict=True))


def pointing_game(maps: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Whether a map's highest patch shows the part, float [P]; equal highest patches share the hit.

    Args:
        maps: [P, N].
        true: bool [P, N], the patches that show the part.
    """
    best = maps == maps.max(axis=1, keepdims=True)
    return (best & true).sum(axis=1) / best.sum(axis=1)


def mass_inside(maps: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Share of a map's total that lies on the part's patches, float [P]; of a map of zeros, the part's own share.

    Args:
        maps: [P, N], nothing negative.
        true: bool [P, N].
    """
    total = maps.sum(axis=1)
    inside = (maps * true).sum(axis=1)
    return np.where(total > 0, inside / np.where(total > 0, total, 1), true.mean(axis=1))


def average_precision(maps: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Average precision of the patches ranked by a map, float [P]; equal patches enter the ranking together.

    Args:
        maps: [P, N].
        true: bool [P, N], at least one of each row.
    """
    precision = np.empty(len(maps))
    for row, (values, relevant) in enumerate(zip(maps, true)):
        above = values[None, :] >= values[relevant][:, None]  # [R, N]: what is ranked no lower than each true patch
        precision[row] = (above[:, relevant].sum(axis=1) / above.sum(axis=1)).mean()
    return precision


def phrase_scores(maps: dict[str, np.ndarray], true: np.ndarray, prior: np.ndarray) -> dict[str, pd.DataFrame]:
    """Scores of every phrase, by map: `hit`, `mass`, `ap` and the same of chance and of the prior.

    Args:
        maps: [P, N] by name.
        true: bool [P, N].
        prior: [P, N], where each phrase's part usually is.
    """
    floor = pd.DataFrame(
        {
            "chance_hit": true.mean(axis=1),
            "chance_ap": [random_ranking(true.shape[1], int(count))["mAP"] for count in true.sum(axis=1)],
            "prior_hit": pointing_game(prior, true),
            "prior_mass": mass_inside(prior, true),
            "prior_ap": average_precision(prior, true),
        }
    )
    return {
        name: floor.assign(
            hit=pointing_game(values, true), mass=mass_inside(values, true), ap=average_precision(values, true)
        )
        for name, values in maps.items()
    }


def grounding_table(phrases: pd.DataFrame, scores: dict[str, pd.DataFrame], *, seed: int = 0) -> pd.DataFrame:
    """Means over phrases: of each map, of each part, and of each bin of visibility.

    Args:
        phrases: of `draw_phrases`; `identity`, `part` and `visibility` are used.
        scores: of `phrase_scores`, rows in the same order.
        seed: of the bootstrap.

    Returns:
        Columns `COLUMNS`, shares from 0 to 1; `hit` has a 95 % interval by bootstrap over identities. The total of a
        map is the row with part "all" and visibility "all".
    """
    generator = np.random.default_rng(seed)
    groups = [(ALL, ALL, np.ones(len(phrases), bool))]
    groups += [(part, ALL, phrases["part"] == part) for part in phrases["part"].value_counts().index]
    groups += [(ALL, bin_, phrases["visibility"] == bin_) for bin_ in phrases["visibility"].drop_duplicates()]
    rows = []
    for name, table in scores.items():
        for part, visibility, selection in groups:
            selection = np.asarray(selection)
            part_scores = table[selection]
            identity = phrases["identity"].to_numpy()[selection]
            interval = bootstrap_interval(part_scores["hit"].to_numpy(), identity, generator)
            row = {"map": name, "part": part, "visibility": visibility, "phrases": len(part_scores)}
            rows.append(row | part_scores.mean().to_dict() | {"hit_low": interval.low, "hit_high": interval.high})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def percent_table(table: pd.DataFrame) -> pd.DataFrame:
    """The totals of `measure_grounding` in percent, one row per map, then what chance and the prior reach."""
    total = table[(table["part"] == ALL) & (table["visibility"] == ALL)]
    rows = []
    for r in total.itertuples():
        hit, low, high, *others = _percent(r.hit, r.hit_low, r.hit_high, r.mass, r.ap)
        rows.append([r.map, f"{hit} [{low}, {high}]", *others, r.phrases])
    r = next(total.itertuples())
    rows.append(["chance", *_percent(r.chance_hit, r.chance_hit, r.chance_ap), r.phrases])  # mass: a flat map's
    rows.append(["prior place", *_percent(r.prior_hit, r.prior_mass, r.prior_ap), r.phrases])
    return pd.DataFrame(rows, columns=["map", "hit (%)", "mass (%)", "AP (%)", "phrases"])


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]
