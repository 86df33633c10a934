"""The best that any reader could do: the score of one who knows every attribute that a caption truly tells."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fmfa.metrics import random_ranking
from fmfa.simpedes.people import ATTRIBUTES
from fmfa.simpedes.truth import parse_shard, told_truly


def ceiling(shards: Sequence[Path]) -> dict[str, float]:
    """Return R@1, R@5, R@10, mAP and mINP (fractions) of the all-knowing reader on a split, given its truth files.

    The reader knows the attribute vector of every identity, and of a caption all that its words truly say (mistakes
    are set aside). It puts the pictures of all identities that fit before the others, in random order, so a caption
    that fits c identities scores what chance scores among their pictures; the mean over captions is returned,
    with the mean number of identities that fit.
    """
    vectors: dict[int, tuple[str, ...]] = {}
    pictures: Counter[int] = Counter()
    for record in _records(shards):
        vectors.setdefault(record["id"], tuple(record["attributes"][name] for name in ATTRIBUTES))
        pictures[record["id"]] += 1
    table = np.array(list(vectors.values()))
    has_value = {
        (name, value): table[:, column] == value
        for column, name in enumerate(ATTRIBUTES)
        for value in np.unique(table[:, column])
    }
    copies = np.array([pictures[identity] for identity in vectors])
    fits: Counter[tuple[int, int]] = Counter()
    identities = queries = 0
    for record in _records(shards):  # read twice, so that memory does not grow with the captions
        for caption in record["captions"]:
            fitting = np.ones(len(table), bool)
            for name, values in told_truly(caption["phrases"]).items():
                fitting &= np.logical_or.reduce([has_value[name, v] for v in values if (name, v) in has_value])
            fits[int(copies[fitting].sum()), pictures[record["id"]]] += 1
            identities += int(fitting.sum())
            queries += 1
    totals: defaultdict[str, float] = defaultdict(float)
    for (size, relevant), count in fits.items():
        for name, value in random_ranking(size, relevant).items():
            totals[name] += float(value) * count / queries
    return {**totals, "fitting_identities": identities / queries}


def _records(shards: Sequence[Path]) -> Iterator[dict]:
    for shard in shards:
        yield from parse_shard(shard.read_bytes())
