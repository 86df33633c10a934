"""Scores of maps against the truth, patch by patch, and their table."""

import numpy as np
import pandas as pd

from fmfa.evaluation.chance import random_ranking
from fmfa.evaluation.statistics import bootstrap_interval

ALL = "all"
COLUMNS = ("map", "part", "visibility", "phrases", "hit", "hit_low", "hit_high", "mass", "ap", "chance_hit",
           "chance_ap", "prior_hit", "prior_mass", "prior_ap")  # fmt: skip


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
    found = np.empty(len(maps))
    for row, (values, relevant) in enumerate(zip(maps, true)):
        above = values[None, :] >= values[relevant][:, None]  # [R, N]: what is ranked no lower than each true patch
        found[row] = (above[:, relevant].sum(axis=1) / above.sum(axis=1)).mean()
    return found


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


def grounding_table(
    phrases: pd.DataFrame, scores: dict[str, pd.DataFrame], *, seed: int = 0, resamples: int = 2000
) -> pd.DataFrame:
    """Means over phrases: of each map, of each part, and of each bin of visibility.

    Args:
        phrases: of `draw_phrases`; `identity`, `part` and `visibility` are used.
        scores: of `phrase_scores`, rows in the same order.
        seed: of the bootstrap.
        resamples: bootstrap samples.

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
        for part, visibility, chosen in groups:
            chosen = np.asarray(chosen)
            found = table[chosen]
            identity = phrases["identity"].to_numpy()[chosen]
            interval = bootstrap_interval(found["hit"].to_numpy(), identity, generator, resamples=resamples)
            row = {"map": name, "part": part, "visibility": visibility, "phrases": len(found)}
            rows.append(row | found.mean().to_dict() | {"hit_low": interval.low, "hit_high": interval.high})
    return pd.DataFrame(rows, columns=list(COLUMNS))
