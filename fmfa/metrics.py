"""Exact retrieval metrics from rank counts (CMC, mAP and mINP, per query), and their values at chance."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fmfa.errors import ConfigError

PROTOCOLS = ("standard", "ivt")
CHUNK_ELEMENTS = 2**23  # scores held at a time: about 64 MiB in float64
PER_QUERY = ("identity", "relevant", "first_rank", "average_precision", "inverse_negative_penalty")
Identities = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class RankMetrics:
    """Ranking quality of every query, and the averages over queries.

    All per-query arrays have shape [Q] and follow the order of the queries, so that bootstrap and paired
    tests can use them. A query without any relevant gallery item has `first_rank` 0, and NaN in the two
    float arrays; `unanswerable` counts such queries. They are left out of every average under the
    `standard` protocol and count as complete misses (0) under `ivt`.

    Attributes:
        identity: int64, identity of each query.
        relevant: int64, number of gallery items of that identity.
        first_rank: int64, rank (1 = best) of the best relevant item.
        average_precision: float64 in [0, 1].
        inverse_negative_penalty: float64 in [0, 1]: relevant / rank of the last relevant item.
        gallery_size: number of gallery items ranked.
        protocol: "standard" or "ivt".
    """

    identity: np.ndarray
    relevant: np.ndarray
    first_rank: np.ndarray
    average_precision: np.ndarray
    inverse_negative_penalty: np.ndarray
    gallery_size: int
    protocol: str = "standard"

    @property
    def unanswerable(self) -> int:
        """Number of queries that have no relevant gallery item."""
        return int((self.relevant == 0).sum())

    def recall(self, rank: int) -> np.ndarray:
        """R@`rank` by query, float64 [Q]: 1 for a hit within the first `rank`, else 0 (NaN: unanswerable)."""
        return self._open(((self.first_rank >= 1) & (self.first_rank <= rank)).astype(np.float64))

    def per_query(self) -> dict[str, np.ndarray]:
        """The metrics that tables report, by name, one value per query: R@1, R@5, R@10, mAP and mINP."""
        return {
            **{f"R@{rank}": self.recall(rank) for rank in (1, 5, 10)},
            "mAP": self._open(self.average_precision),
            "mINP": self._open(self.inverse_negative_penalty),
        }

    def cmc(self, max_rank: int = 10) -> np.ndarray:
        """Cumulative matching characteristic: fraction of queries hit within rank 1..`max_rank`, float64."""
        hits = np.bincount(np.minimum(self.first_rank, max_rank + 1), minlength=max_rank + 2)
        return np.cumsum(hits[1 : max_rank + 1]) / self._averaged

    @cached_property
    def summary(self) -> dict[str, float]:
        """Averages over queries of R@1, R@5, R@10, mAP and mINP, as fractions."""
        return {name: float(np.nansum(values) / self._averaged) for name, values in self.per_query().items()}

    @property
    def _averaged(self) -> int:
        count = len(self.relevant) - (0 if self.protocol == "ivt" else self.unanswerable)
        return max(count, 1)

    def _open(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.relevant > 0, values, 0.0 if self.protocol == "ivt" else np.nan)


def rank_metrics(
    similarity: Tensor | np.ndarray,
    query_identity: Identities,
    gallery_identity: Identities,
    *,
    protocol: str = "standard",
    gallery_step: int = 1,
) -> RankMetrics:
    """Rank the gallery for every query by a given similarity matrix.

    The rank of a relevant item is 1 + the relevant items above it + the irrelevant items whose score is at
    least as high: a tie counts against the model, so that constant scores earn nothing. Ranks come from
    counting in chunks of queries.

    Args:
        similarity: [Q, G], higher is more similar, any real dtype, on any device.
        query_identity: integers [Q].
        gallery_identity: integers [G].
        protocol: "standard" (usual average precision), or "ivt" (trapezoidal average precision of the
            released IVT code; queries without a match stay in every denominator).
        gallery_step: every `gallery_step`-th gallery row is used. IVT's code takes one row per caption and
            then every second row on CUHK-PEDES and RSTPReid (2), all rows on ICFG-PEDES (1).

    Returns:
        The metrics of all queries. The other direction is `rank_metrics(similarity.T, gallery, query)`.

    Raises:
        ValueError: shapes do not fit, the gallery is empty, or a score is not finite.
        ConfigError: the protocol is unknown.
    """
    similarity = torch.as_tensor(similarity)[:, ::gallery_step]
    if not similarity.is_floating_point():
        similarity = similarity.double()

    def scores(first: int, last: int) -> Tensor:
        return similarity[first:last]

    gallery_identity = gallery_identity[::gallery_step]
    shape = len(similarity), similarity.shape[1]
    return _collect(scores, shape, similarity.device, query_identity, gallery_identity, protocol)


def feature_metrics(
    query: Tensor | np.ndarray,
    gallery: Tensor | np.ndarray,
    query_identity: Identities,
    gallery_identity: Identities,
    *,
    protocol: str = "standard",
    gallery_step: int = 1,
) -> RankMetrics:
    """Rank the gallery for every query by the cosine similarity of features, without the whole matrix.

    Args:
        query: features [Q, D], any length (they are normalised here).
        gallery: features [G, D], on the same device.
        query_identity, gallery_identity, protocol, gallery_step: see `rank_metrics`.

    Returns:
        The metrics of all queries. Scores are taken in float64 and rounded to float32, so that equal
        features tie exactly and the result does not depend on the chunk size or the matrix library.

    Raises:
        ValueError, ConfigError: see `rank_metrics`.
    """
    query = F.normalize(torch.as_tensor(query).double(), dim=-1)
    gallery = F.normalize(torch.as_tensor(gallery).double()[::gallery_step], dim=-1)

    def scores(first: int, last: int) -> Tensor:
        return (query[first:last] @ gallery.T).float()

    shape = (len(query), len(gallery))
    gallery_identity = gallery_identity[::gallery_step]
    return _collect(scores, shape, query.device, query_identity, gallery_identity, protocol)


def _collect(
    scores: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    device: torch.device,
    query_identity: Identities,
    gallery_identity: Identities,
    protocol: str,
) -> RankMetrics:
    check_protocol(protocol)
    queries, gallery = _identities(query_identity, device), _identities(gallery_identity, device)
    if (len(queries), len(gallery)) != tuple(shape):
        found = f"{len(queries)} query and {len(gallery)} gallery identities for scores of shape {tuple(shape)}"
        raise ValueError(f"Identities and scores do not fit: {found}.")
    order, starts, counts = _relevant_ranges(queries, gallery)
    parts = [
        _chunk_metrics(_finite(scores(first, last)), order, starts[first:last], counts[first:last], protocol)
        for first, last in _chunks(*shape)
    ]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts)] if parts else [np.empty(0)] * 3
    return RankMetrics(
        identity=queries.cpu().numpy(),
        relevant=counts.cpu().numpy(),
        first_rank=columns[0].astype(np.int64),
        average_precision=columns[1],
        inverse_negative_penalty=columns[2],
        gallery_size=len(gallery),
        protocol=protocol,
    )


def _chunk_metrics(
    scores: Tensor, order: Tensor, starts: Tensor, counts: Tensor, protocol: str
) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.arange(max(int(counts.max()), 1), device=scores.device)  # [M]
    filled = slots < counts[:, None]  # [c, M]
    columns = order[(starts[:, None] + slots).clamp(max=len(order) - 1)]
    relevant = scores.gather(1, columns).masked_fill(~filled, torch.inf).sort(dim=1).values  # ascending
    above = _at_least(relevant, scores) - _at_least(relevant, relevant.where(filled, -torch.inf))
    position = counts[:, None] - slots  # 1 for the best relevant item of the row, counts for the worst
    ranks = (position + above).where(filled, 1).double()
    precision = position / ranks
    if protocol == "ivt":
        before = torch.where(ranks > 1, (position - 1) / (ranks - 1), 1.0)
        precision = (precision + before) / 2
    answered = counts > 0
    average = precision.where(filled, 0.0).sum(1) / counts
    best = ranks.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
    first = best.where(answered, 0.0)
    return first, average.where(answered, torch.nan), (counts / ranks[:, 0]).where(answered, torch.nan)


def _at_least(relevant: Tensor, scores: Tensor) -> Tensor:
    """Count, by row, `scores` [c, G] at or above each of `relevant` [c, M] (ascending): int64 [c, M]."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))  # vectorised: faster than looking each score up
        return scores.shape[1] - torch.searchsorted(ordered, relevant)
    passed = torch.searchsorted(relevant, scores, right=True)  # relevant items that each score reaches
    histogram = torch.zeros(len(scores), relevant.shape[1] + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(1, passed, torch.ones_like(passed))
    return histogram.flip(1).cumsum(1).flip(1)[:, 1:]


def _relevant_ranges(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gallery order by identity, and for each query where its identity starts in it and how long it is."""
    ordered, order = gallery.sort(stable=True)
    starts = torch.searchsorted(ordered, queries)
    return order, starts, torch.searchsorted(ordered, queries, right=True) - starts


def _chunks(queries: int, gallery: int) -> Iterator[tuple[int, int]]:
    if not gallery:
        raise ValueError("The gallery is empty: nothing can be ranked.")
    step = max(1, CHUNK_ELEMENTS // gallery)
    return ((first, min(first + step, queries)) for first in range(0, queries, step))


def _finite(scores: Tensor) -> Tensor:
    if scores.numel() and not bool(torch.isfinite(torch.stack(scores.aminmax())).all()):
        raise ValueError("A similarity is not a finite number: the features or scores are broken.")
    return scores.contiguous()


def _identities(values: Identities, device: torch.device) -> Tensor:
    values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return values.to(device, torch.int64).contiguous()


def check_protocol(protocol: str) -> None:
    """Raise `ConfigError` unless `protocol` is one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"Unknown metric protocol {protocol!r}; known are {', '.join(PROTOCOLS)}.")


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
