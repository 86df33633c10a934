"""Does the similarity follow the attribute? One attribute of a picture, or one word of a caption, is changed.

A caption that truly tells an attribute must be more similar to the picture that it was written for than to the same
picture with another value of the attribute (kind "picture"), and the picture more similar to the caption than to the
same caption with a word that means another value (kind "caption").
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fmfa.analysis.changes import CAPTION, PICTURE, Counterfactual, draw_counterfactuals
from fmfa.analysis.grounding import ALL
from fmfa.data.annotations import Dataset
from fmfa.evaluation.evaluate import encode_captions, encode_images
from fmfa.evaluation.statistics import bootstrap_interval
from fmfa.simpedes.people import ATTRIBUTES
from fmfa.systems import System

COLUMNS = ("kind", "attribute", "pairs", "right", "right_low", "right_high", "shift", "effect")


@dataclass(frozen=True, eq=False)
class Scores:
    """Cosine similarities, float64.

    Attributes:
        before: [P], of each picture with its caption.
        after: [P], with the changed one in its place.
        spread: standard deviation over all these pictures and captions that belong to different identities.
    """

    before: np.ndarray
    after: np.ndarray
    spread: float


def score_counterfactuals(system: System, dataset: Dataset, changes: Sequence[Counterfactual]) -> Scores:
    """Encode pictures and captions, as they were and changed, in the way an evaluation does."""
    names = sorted({c.site.phrase["image"] for c in changes})
    texts = sorted({c.site.phrase["caption"] for c in changes})
    with tempfile.TemporaryDirectory() as folder:
        paths = [dataset.images / name for name in names]
        for number, made in enumerate(changes):
            if not isinstance(made.changed, str):
                paths.append(Path(folder) / f"{number}.png")
                Image.fromarray(made.changed).save(paths[-1], compress_level=1)
        pictures = _unit(encode_images(system.model, paths, system.transform, progress=False))
    changed_texts = [c.changed for c in changes if isinstance(c.changed, str)]
    captions = _unit(encode_captions(system.model, texts + changed_texts, system.tokenizer, progress=False))
    picture = np.array([names.index(c.site.phrase["image"]) for c in changes])
    caption = np.array([texts.index(c.site.phrase["caption"]) for c in changes])
    similarity = pictures @ captions.T
    changed = np.array([c.kind == PICTURE for c in changes])
    other_picture = np.where(changed, len(names) + np.cumsum(changed) - 1, picture)
    other_caption = np.where(changed, caption, len(texts) + np.cumsum(~changed) - 1)
    shown = dict(zip(picture, (c.site.phrase["identity"] for c in changes), strict=True))
    meant = dict(zip(caption, (c.site.phrase["identity"] for c in changes), strict=True))
    strangers = np.array([[shown[i] != meant[j] for j in range(len(texts))] for i in range(len(names))])
    unpaired = similarity[: len(names), : len(texts)][strangers]
    return Scores(
        similarity[picture, caption],
        similarity[other_picture, other_caption],
        float(unpaired.std()) if len(unpaired) else float("nan"),
    )


def _unit(features: Tensor) -> np.ndarray:
    return F.normalize(features.double(), dim=1).numpy()


def measure_counterfactual(system: System, dataset: Dataset, split: str, pairs: int, seed: int = 0) -> pd.DataFrame:
    """Measure whether a system's similarity follows the attributes that pictures show and captions tell.

    Args:
        system: any.
        dataset: a SimPEDES.
        split: of the data set.
        pairs: changed pictures, and changed captions, to draw (see `draw_counterfactuals`).
        seed: of the draw and of the bootstrap.

    Returns:
        One row per kind and attribute. The total ("all") comes first, a balanced mean, as attributes take turns.
        kind: "picture" or "caption", what was changed.
        attribute: what was changed.
        pairs: number of pairs.
        right: share of pairs (0..1) that are more similar before the change than after it; a tie counts half.
        right_low, right_high: 95 % interval by bootstrap over identities, NaN with one identity.
        shift: mean over pairs of the cosine similarity before minus after.
        effect: shift in standard deviations of the similarities of unpaired pictures and captions; NaN where a system
            finds all pictures and captions equally similar.

    Raises:
        AnnotationError: see `draw_counterfactuals`.
    """
    changes = draw_counterfactuals(dataset, split, pairs, seed)
    scores = score_counterfactuals(system, dataset, changes)
    return tabulate(changes, scores, seed)


def tabulate(changes: Sequence[Counterfactual], scores: Scores, seed: int) -> pd.DataFrame:
    """Return the table of `measure_counterfactual` from scored pairs; `seed` is of the bootstrap."""
    generator = np.random.default_rng(seed)
    shift = scores.before - scores.after
    right = np.where(shift == 0, 0.5, shift > 0)
    identity = np.array([c.site.phrase["identity"] for c in changes])
    kinds, attributes = (np.array([getattr(c, n) for c in changes]) for n in ("kind", "attribute"))
    rows = []
    for kind in (PICTURE, CAPTION):
        for name in (ALL, *ATTRIBUTES):
            selection = (kinds == kind) & ((attributes == name) | (name == ALL))
            if not selection.any():
                continue
            interval = bootstrap_interval(right[selection], identity[selection], generator)
            mean = float(shift[selection].mean())
            rows.append(
                {
                    "kind": kind,
                    "attribute": name,
                    "pairs": int(selection.sum()),
                    "right": interval.estimate,
                    "right_low": interval.low,
                    "right_high": interval.high,
                    "shift": mean,
                    "effect": mean / scores.spread if scores.spread > 0 else float("nan"),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)
