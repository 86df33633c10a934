"""Phrases of SimPEDES captions, with the part that each speaks of and where that part is."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fmfa.alignment.patches import PatchGrid
from fmfa.data.annotations import Dataset
from fmfa.errors import ConfigError
from fmfa.simpedes import PARTS, read_parts, read_truth

VISIBILITY = ((0.02, "under 2 %"), (0.08, "2 to 8 %"), (1.0, "8 % and more"))  # share of the picture: thirds of street


def draw_phrases(dataset: Dataset, split: str, count: int, seed: int = 0) -> pd.DataFrame:
    """Draw phrases of a SimPEDES split at random, without replacement; the draw does not depend on any model.

    Left out are phrases about the whole person, which have no part, and phrases with a mistake, which speak of
    something that the picture does not show.

    Args:
        dataset: a SimPEDES.
        split: of the data set.
        count: phrases; all of them where there are fewer.
        seed: of the draw.

    Returns:
        One row a phrase in the order of the data set: `image`, `identity`, `caption`, `phrase`, `start` and `end`
        (characters of the caption), `part`, `visible` (share of the picture that the part covers) and `visibility`
        (its bin).

    Raises:
        AnnotationError: the data set has no ground truth, or no such split.
    """
    table = _all_phrases(dataset, split)
    chosen = np.random.default_rng(seed).permutation(len(table))[:count]
    return table.iloc[np.sort(chosen)].reset_index(drop=True)


def pick_phrases(
    dataset: Dataset, split: str, count: int, seed: int = 0, positions: Sequence[int] = ()
) -> pd.DataFrame:
    """Phrases to look at: those at given positions among all of the split, or drawn, each of another part.

    Args:
        dataset: a SimPEDES.
        split: of the data set.
        count: how many to draw; at most as many as there are parts.
        seed: of the draw.
        positions: from 0, in the order of the data set; where there are any, nothing is drawn.

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
    rows = []
    images = set(dataset.split(split)["image"])
    for record in read_truth(dataset.images.parent, split):
        if record["file_path"] not in images:
            continue
        for caption in record["captions"]:
            for phrase in caption["phrases"]:
                if phrase["part"] in PARTS and not phrase["mistakes"]:
                    rows.append(
                        (record["file_path"], record["id"], caption["text"], phrase["text"], phrase["start"],
                         phrase["end"], phrase["part"], record["visible"][phrase["part"]])
                    )  # fmt: skip
    names = ["image", "identity", "caption", "phrase", "start", "end", "part", "visible"]
    table = pd.DataFrame(rows, columns=names)
    bins = np.searchsorted([limit for limit, _ in VISIBILITY], table["visible"], side="right")
    return table.assign(visibility=np.array([name for _, name in VISIBILITY])[bins])


def part_masks(dataset: Dataset, split: str, phrases: pd.DataFrame) -> np.ndarray:
    """Pixels of each phrase's part, bool [P, H, W]."""
    maps = read_parts(dataset.images.parent, split)
    return np.stack([maps[row.image] == PARTS.index(row.part) for row in phrases.itertuples()])


def prior_coverage(dataset: Dataset, grid: PatchGrid) -> dict[str, np.ndarray]:
    """Where each part usually is: mean coverage of the patches over all training pictures, float32 [N] by part."""
    maps = np.stack(list(read_parts(dataset.images.parent, "train").values()))
    usual = np.stack([(maps == part).mean(axis=0) for part in range(len(PARTS))])
    return dict(zip(PARTS, grid.coverage(usual), strict=True))
