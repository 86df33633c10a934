"""Exact retrieval metrics from rank counts (CMC, mAP and mINP, per query), and their values at chance."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from fmfa.errors import ConfigError

PROTOCOLS = ("standard", "ivt")
CHUNK_ELEMENTS = 2**22  # scores that a thread holds at a time: 32 MiB in float64
THREADS = 4  # at most; more would wait for Python
BINS = 2**16  # of cosines from 0 to 1, in which close ones are looked for
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

    def count(chunk: slice, columns: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        return _count(similarity[chunk], columns, filled)

    gallery_identity = gallery_identity[::gallery_step]
    shape = len(similarity), similarity.shape[1]
    return _collect(count, shape, similarity.device, query_identity, gallery_identity, protocol)


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
        features tie exactly and the result does not depend on the chunk size or the matrix library. On a CPU float32
        products decide where they are further from a relevant item's score than they can be wrong.

    Raises:
        ValueError, ConfigError: see `rank_metrics`.
    """
    query = F.normalize(torch.as_tensor(query).detach().double(), dim=-1)
    gallery = F.normalize(torch.as_tensor(gallery).detach().double()[::gallery_step], dim=-1)

    def count(chunk: slice, columns: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        return _count((query[chunk] @ gallery.T).float(), columns, filled)

    if query.device.type == "cpu":
        count = _NearCounts(_finite(query).numpy(), _finite(gallery).numpy())
    shape = (len(query), len(gallery))
    gallery_identity = gallery_identity[::gallery_step]
    return _collect(count, shape, query.device, query_identity, gallery_identity, protocol)


Count = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a chunk of queries [c], with the gallery positions of their relevant items [c, M] and which of these are there:
their scores in ascending order, inf behind them, and how many items score at least as high, both [c, M]."""


def _collect(
    count: Count,
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

    def part(chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        relevant = counts[chunk]
        slots = torch.arange(max(int(relevant.max()), 1), device=device)  # [M]
        filled = slots < relevant[:, None]  # [c, M]
        columns = order[(starts[chunk, None] + slots).clamp(max=len(order) - 1)]
        return _chunk_metrics(*count(chunk, columns, filled), relevant, protocol)

    with ThreadPoolExecutor(min(torch.get_num_threads(), THREADS) if device.type == "cpu" else 1) as pool:
        parts = list(pool.map(part, _chunks(*shape)))
    joined = [torch.cat(column).cpu().numpy() for column in zip(*parts)] if parts else [np.empty(0)] * 3
    return RankMetrics(
        identity=queries.cpu().numpy(),
        relevant=counts.cpu().numpy(),
        first_rank=joined[0].astype(np.int64),
        average_precision=joined[1],
        inverse_negative_penalty=joined[2],
        gallery_size=len(gallery),
        protocol=protocol,
    )


def _chunk_metrics(relevant: Tensor, at_least: Tensor, counts: Tensor, protocol: str) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.arange(relevant.shape[1], device=relevant.device)
    filled = slots < counts[:, None]
    above = at_least - _at_least(relevant, relevant.where(filled, -torch.inf))
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


def _count(scores: Tensor, columns: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """`Count` from the scores [c, G] themselves."""
    relevant = _finite(scores).gather(1, columns).masked_fill(~filled, torch.inf).sort(dim=1).values
    return relevant, _at_least(relevant, scores.contiguous())


def _at_least(relevant: Tensor, scores: Tensor) -> Tensor:
    """Count, by row, `scores` [c, G] at or above each of `relevant` [c, M] (ascending): int64 [c, M]."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))  # vectorised: faster than looking each score up
        return scores.shape[1] - torch.searchsorted(ordered, relevant)
    passed = torch.searchsorted(relevant, scores, right=True)  # relevant items that each score reaches
    histogram = torch.zeros(len(scores), relevant.shape[1] + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(1, passed, torch.ones_like(passed))
    return histogram.flip(1).cumsum(1).flip(1)[:, 1:]


class _NearCounts:
    """`Count` of unit features, float64 [Q, D] and [G, D]: products in float32, those near a relevant score again.

    In any order of summation a product of unit vectors in float32 is off by at most about D + 2 times 2^-24; what is
    further from a score than that, and than the score's own rounding, is on the right side of it.
    """

    def __init__(self, query: np.ndarray, gallery: np.ndarray) -> None:
        self.query, self.gallery = query, gallery
        self.near = query.astype(np.float32), gallery.astype(np.float32).T
        self.error = np.float32(1.1 * (query.shape[1] + 8) * 2.0**-24)

    def __call__(self, chunk: slice, columns: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        relevant = np.full(columns.shape, np.inf, np.float32)
        at_least = np.zeros(columns.shape, np.int64)
        marked, crowded = np.zeros(int((2 + 8 * self.error) * BINS) + 8, bool), []
        wanted = zip(self.near[0][chunk] @ self.near[1], self.query[chunk], columns.numpy(), filled.sum(1).tolist())
        for row, (scores, query, positions, size) in enumerate(wanted):
            if not size:
                continue
            relevant[row, :size] = mine = np.sort(self._exact(query, positions[:size]))
            places = np.flatnonzero(scores >= mine[0] - self.error)
            values = scores[places]
            first, last = self._bins(mine - self.error), self._bins(mine + self.error)
            touched = first[:, None] + np.arange((last - first).max() + 1)
            marked[touched] = True
            close = np.flatnonzero(marked[self._bins(values)])
            marked[touched] = False
            if len(close) > len(scores) // 16 + size:
                crowded.append(row)
                continue
            values[close] = self._exact(query, places[close])
            values.sort()
            at_least[row, :size] = len(values) - values.searchsorted(mine)
        found = torch.from_numpy(relevant), torch.from_numpy(at_least)
        if crowded:  # such as all rows of a model that gives every picture the same embedding
            exact = torch.from_numpy((self.query[chunk][crowded] @ self.gallery.T).astype(np.float32))
            for whole, part in zip(found, _count(exact, columns[crowded], filled[crowded]), strict=True):
                whole[crowded] = part
        return found

    def _exact(self, query: np.ndarray, places: np.ndarray) -> np.ndarray:
        return np.vecdot(self.gallery[places], query).astype(np.float32)

    def _bins(self, cosines: np.ndarray) -> np.ndarray:
        return ((cosines + (1 + 3 * self.error)) * BINS).astype(np.int32)


def _relevant_ranges(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gallery order by identity, and for each query where its identity starts in it and how long it is."""
    ordered, order = gallery.sort(stable=True)
    starts = torch.searchsorted(ordered, queries)
    return order, starts, torch.searchsorted(ordered, queries, right=True) - starts


def _chunks(queries: int, gallery: int) -> Iterator[slice]:
    if not gallery:
        raise ValueError("The gallery is empty: nothing can be ranked.")
    step = max(1, CHUNK_ELEMENTS // gallery)
    return (slice(first, first + step) for first in range(0, queries, step))


def _finite(scores: Tensor) -> Tensor:
    if scores.numel() and not bool(torch.isfinite(torch.stack(scores.aminmax())).all()):
        raise ValueError("A similarity is not a finite number: the features or scores are broken.")
    return scores


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
