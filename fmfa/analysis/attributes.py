"""Which attribute confuses a model: errors on SimPEDES, compared with what is true and what the captions tell."""

from collections import Counter

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from fmfa.errors import AnnotationError
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation
from fmfa.metrics import CHUNK_ELEMENTS, chance_metrics, feature_metrics
from fmfa.simpedes.people import ATTRIBUTES
from fmfa.simpedes.truth import Truth, told_truly


def errors_by_attribute(evaluation: Evaluation, truth: Truth, split: str) -> pd.DataFrame:
    """Return how often each attribute of the person found first is wrong, over the captions that find a wrong one.

    An error is a caption that misses R@1; the person found is the one on its best picture of another identity, so
    that a tie counts against the model here as it does in R@1.

    Args:
        evaluation: of a SimPEDES split; a part of its captions will do.
        truth: of that SimPEDES.
        split: name of the split.

    Returns:
        One row per attribute, the most telling first. Shares are percent of the errors, NaN if there are none.
        attribute: its name.
        wrong: the person found has another value than the one wanted.
        chance: the same of a picture drawn at random among the other identities'.
        told_and_wrong: the caption truly tells the attribute, and its words rule the found value out.
        wrong_if_told: the latter, as a share of the errors whose caption tells the attribute.
        errors, n_wrong, n_told, n_told_and_wrong: the counts behind them.

    Raises:
        AnnotationError: there is no truth of the split, or another truth than that of the evaluation.
    """
    people = _people_shown(evaluation, truth, split)
    queries, answers = _errors(evaluation)
    targets = evaluation.gallery["image"].pipe(pd.Index).get_indexer(evaluation.rows["image"])[queries]
    told = [told_truly(phrases) for phrases in truth.of_captions(split, evaluation.rows.iloc[queries])]
    same_person = Counter(evaluation.gallery["identity"])
    others = np.array([len(people) - same_person[i] for i in evaluation.rows["identity"].iloc[queries]])
    rows = []
    for name in ATTRIBUTES:
        values = people[name].to_numpy()
        alike = Counter(values.tolist())
        random = np.array([len(people) - alike[value] for value in values[targets].tolist()])
        ruled_out = [value not in t[name] for t, value in zip(told, values[answers].tolist(), strict=True) if name in t]
        rows.append(
            {
                "attribute": name,
                "chance": 100 * float((random / others).sum()),
                "errors": len(queries),
                "n_wrong": int((values[targets] != values[answers]).sum()),
                "n_told": len(ruled_out),
                "n_told_and_wrong": sum(ruled_out),
            }
        )
    table = pd.DataFrame(rows)
    table["chance"] /= table["errors"]
    table["wrong"] = 100 * table["n_wrong"] / table["errors"]
    table["told_and_wrong"] = 100 * table["n_told_and_wrong"] / table["errors"]
    table["wrong_if_told"] = 100 * table["n_told_and_wrong"] / table["n_told"]
    shares, counts = ["wrong", "chance", "told_and_wrong", "wrong_if_told"], ["errors", "n_wrong", "n_told"]
    table = table.sort_values(["n_told_and_wrong", "n_wrong"], ascending=False, kind="stable", ignore_index=True)
    return table[["attribute", *shares, *counts, "n_told_and_wrong"]]


def family_share(evaluation: Evaluation, truth: Truth, split: str) -> pd.DataFrame:
    """Return how often the person wanted, and how often one of its family of look-alikes, is found first.

    Returns:
        Lines "the person" (R@1) and "one of its family"; `found first` and `chance` (of a random ranking) in percent of
        the `captions`.

    Raises:
        AnnotationError: see `errors_by_attribute`.
    """
    gallery, _ = pd.factorize(_people_shown(evaluation, truth, split)["family"])
    query = gallery[evaluation.gallery["image"].pipe(pd.Index).get_indexer(evaluation.rows["image"])]
    metrics = feature_metrics(evaluation.text_features, evaluation.image_features, query, gallery)
    person = evaluation.metrics[TEXT_TO_IMAGE].summary["R@1"], evaluation.chance[TEXT_TO_IMAGE]["R@1"]
    family = metrics.summary["R@1"], chance_metrics(query, gallery)["R@1"]
    table = 100 * pd.DataFrame([person, family], ["the person", "one of its family"], ["found first", "chance"])
    return table.assign(captions=len(query))


def _people_shown(evaluation: Evaluation, truth: Truth, split: str) -> pd.DataFrame:
    """Family and attributes of the person on each picture of the gallery, as the truth knows them."""
    gallery = evaluation.gallery
    identities = truth.pictures(split)["identity"].reindex(gallery["image"]).to_numpy()
    if (wrong := identities != gallery["identity"].to_numpy()).any():
        image, identity = gallery[["image", "identity"]].iloc[int(wrong.argmax())]
        raise AnnotationError(
            f"picture {image!r} shows identity {identity} in the evaluation and another or nobody in the ground truth "
            f"of {truth.root}, split {split!r}; give the truth and the split that were evaluated"
        )
    return truth.people(split).loc[identities].reset_index(drop=True)


def _errors(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the captions that miss R@1, and the best gallery position of another identity for each."""
    queries = np.flatnonzero(evaluation.metrics[TEXT_TO_IMAGE].first_rank > 1)
    gallery = F.normalize(evaluation.image_features.double(), dim=1)
    shown = evaluation.gallery["identity"].to_numpy()
    targets = evaluation.rows["identity"].to_numpy()
    step = max(1, CHUNK_ELEMENTS // len(gallery))
    answers = [np.empty(0, np.int64)]
    for chunk in (queries[i : i + step] for i in range(0, len(queries), step)):
        text = F.normalize(evaluation.text_features[torch.from_numpy(chunk)].double(), dim=1)
        scores = (text @ gallery.T).float().numpy()  # rounded as in `feature_metrics`, so that ranks agree
        answers.append(np.where(shown == targets[chunk][:, None], -np.inf, scores).argmax(axis=1))
    return queries, np.concatenate(answers)
