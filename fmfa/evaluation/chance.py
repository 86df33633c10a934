"""What a uniformly random ranking is expected to score: the floor of every table, in closed form."""

import numpy as np
from scipy import stats

from fmfa.evaluation.metrics import Identities, check_protocol


def chance_metrics(
    query_identity: Identities, gallery_identity: Identities, *, protocol: str = "standard"
) -> dict[str, float]:
    """Expected R@1, R@5, R@10, mAP and mINP (fractions) when every order of the gallery is equally likely.

    With G gallery items of which m are relevant: R@k is hypergeometric, 1 - C(G-m, k) / C(G, k); with
    q = (m-1)/(G-1) the precision at a hit of rank k is expected to be (1 + (k-1) q) / k, and a hit is at
    every rank equally often, which gives the average precision; the last hit is at rank l with probability
    C(l-1, m-1) / C(G, m), which gives mINP.

    Args:
        query_identity: integers [Q].
        gallery_identity: integers [G].
        protocol: see `metrics.rank_metrics`; queries without a relevant item are left out of the averages
            (`standard`) or count 0 (`ivt`).

    Raises:
        ValueError: no query has a relevant gallery item.
        ConfigError: the protocol is unknown.
    """
    check_protocol(protocol)
    gallery = np.sort(np.asarray(gallery_identity))
    query = np.asarray(query_identity)
    relevant = np.searchsorted(gallery, query, side="right") - np.searchsorted(gallery, query)
    if not relevant.any():
        raise ValueError("No query has a relevant gallery item: are both sides of the same split?")
    averaged = len(relevant) if protocol == "ivt" else np.count_nonzero(relevant)
    totals: dict[str, float] = {}
    for count, queries in zip(*np.unique(relevant[relevant > 0], return_counts=True)):
        for name, value in random_ranking(len(gallery), int(count), protocol).items():
            totals[name] = totals.get(name, 0.0) + float(queries * value / averaged)
    return totals


def random_ranking(size: int, relevant: int, protocol: str = "standard") -> dict[str, float]:
    """Expected scores of a query with `relevant` of `size` items in random order; see `chance_metrics`."""
    ranks = np.arange(1, size + 1)
    recalls = {f"R@{k}": stats.hypergeom.sf(0, size, relevant, min(k, size)) for k in (1, 5, 10)}
    other_share = (relevant - 1) / max(size - 1, 1)  # expected share of hits among the items before a hit
    precision = (1 + (ranks - 1) * other_share) / ranks
    if protocol == "ivt":
        precision = (precision + np.where(ranks == 1, 1.0, other_share)) / 2
    last = ranks[relevant - 1 :]
    # C(l-1, m-1) / C(G, m) = m / l * P(all m relevant items are within the first l)
    at_last = relevant / last * stats.hypergeom.pmf(relevant, size, relevant, last)
    return {**recalls, "mAP": precision.mean(), "mINP": (relevant / last * at_last).sum()}
