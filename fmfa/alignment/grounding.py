"""Grounding of a system on a SimPEDES split, in one call."""

import numpy as np
import pandas as pd

from fmfa.alignment.maps import phrase_maps
from fmfa.alignment.patches import patch_grid, true_patches
from fmfa.alignment.phrases import draw_phrases, part_masks, prior_coverage
from fmfa.alignment.scores import grounding_table, phrase_scores
from fmfa.data.annotations import Dataset
from fmfa.systems import System


def measure_grounding(system: System, dataset: Dataset, split: str, phrases: int = 400, seed: int = 0) -> pd.DataFrame:
    """Measure how well a system's maps of phrases point at the parts that the phrases speak of.

    Everything is counted in patches of the system's own grid (see `fmfa.alignment.patches.true_patches`): a pair of
    glasses is smaller than a patch. Hit is the pointing game: the map's highest patch shows the part. Chance is a
    map of random order; the prior is the mean place of the part in the training pictures, which needs no model.

    Args:
        system: any.
        dataset: a SimPEDES.
        split: of the data set.
        phrases: how many to draw (see `draw_phrases`); the same ones for every system.
        seed: of the draw and of the bootstrap.

    Returns:
        See `fmfa.alignment.scores.grounding_table`; the maps are those of `fmfa.alignment.maps.phrase_maps`.

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
