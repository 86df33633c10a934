"""The record of a scored system: how well it ranked each query of a split, without any picture or caption.

A record is gzipped JSON with a checksum. Queries are in an order that follows from the split alone, so that records
of different laboratories can be compared query by query.
"""

import gzip
import hashlib
import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from fmfa.data.check import PUBLISHED
from fmfa.errors import ConfigError, checked
from fmfa.evaluation.evaluate import TEXT_TO_IMAGE, Evaluation
from fmfa.files import content_checksum, said_plainly, whole_file
from fmfa.records import package_versions

MOST_BYTES = 2**28  # of a record, unpacked
Count = Field(ge=0)


@checked
class Split:
    """What was searched.

    Attributes:
        dataset, split: names.
        version: which published version it is by its counts ("RSTPReid, older split"); empty: none that is known.
        identities, images, captions: their numbers.
        fingerprint: SHA-256 over the sorted (path, identity, caption).
        pictures: the same over the sorted (path, identity).
    """

    dataset: str
    split: str
    version: str
    identities: int
    images: int
    captions: int
    fingerprint: str
    pictures: str


@checked
class Cost:
    """What a query costs.

    Attributes:
        dimension: numbers per picture that a query is multiplied with, 0 of a system known by its scores alone, None
            where it is not known.
        rerank_depth: the most pictures that a second stage scores for a query, 0 without.
        model_calls: networks run per query: 1 encodes the sentence, and each pair of a second stage adds one.
        caption_operations, picture_operations: floating-point operations to encode one, None where not known.
    """

    dimension: int | None = Count
    rerank_depth: int = Count
    model_calls: int = Count
    caption_operations: int | None = None
    picture_operations: int | None = None

    def __str__(self) -> str:
        """The class: "dot products", what is done beside them, or "not told"."""
        extra = [f"re-ranks {self.rerank_depth}"] * bool(self.rerank_depth)
        extra += [f"{self.model_calls} model calls"] * (self.model_calls > 1 + self.rerank_depth)
        return ", ".join(extra) or ("not told" if self.dimension == 0 else "dot products")


@checked
class Queries:
    """Text-to-image results in the split's order (see `canonical_order`), AP and INP rounded to six digits.

    Attributes:
        identity: of each query.
        first_rank: rank of its first hit, from 1.
        average_precision: mean precision at its hits.
        inverse_negative_penalty: number of its hits by the rank of the last.
    """

    identity: list[int]
    first_rank: list[int]
    average_precision: list[float]
    inverse_negative_penalty: list[float]

    def __post_init__(self) -> None:
        """Refuse columns of different lengths, and values that no ranking has."""
        columns: list[list] = list(asdict(self).values())
        if len({*map(len, columns)}) > 1 or not self.identity:
            raise ConfigError(f"queries: found columns of {', '.join(str(len(c)) for c in columns)} values")
        if min(self.first_rank) < 1 or not all(0 <= min(column) <= max(column) <= 1 for column in columns[2:]):
            raise ConfigError("queries: found a rank below 1, or an AP or INP outside of 0 to 1")

    def by_identity(self) -> pd.DataFrame:
        """Sums of the metrics of each identity's queries, as fractions: `identity`, `queries`, R@1 to mINP."""
        ranks, identity = np.array(self.first_rank), pd.Series(self.identity, name="identity")
        columns = {"queries": np.ones_like(ranks)}
        columns |= {f"R@{k}": (ranks <= k).astype(np.float64) for k in (1, 5, 10)}
        columns |= {"mAP": np.array(self.average_precision), "mINP": np.array(self.inverse_negative_penalty)}
        return pd.DataFrame(columns).groupby(identity).sum().reset_index()


@checked
class Identities:
    """Text-to-image results of results that were kept per identity: its queries, and sums over them as fractions."""

    identity: list[int]
    queries: list[int]
    sums: dict[str, list[float]]

    def __post_init__(self) -> None:
        """Refuse columns of different lengths, and sums that no queries have."""
        counts = np.array(self.queries)
        columns: list[list] = [self.identity, *self.sums.values()]
        wrong = {*map(len, columns)} != {len(counts)} or list(self.sums) != ["R@1", "R@5", "R@10", "mAP", "mINP"]
        if wrong or any((np.array(column) > counts + 1e-4).any() or min(column) < 0 for column in self.sums.values()):
            raise ConfigError("queries: found sums of other lengths than the identities, or beyond their queries")

    def by_identity(self) -> pd.DataFrame:
        """See `Queries.by_identity`."""
        return pd.DataFrame({"identity": self.identity, "queries": self.queries} | dict(self.sums))


@checked
class ScoreRecord:
    """A scored system.

    Attributes:
        system: its name.
        seed: of its training; several records of one system with different seeds are compared as one.
        selected: how the weights were chosen, for example "validation".
        split, cost, queries: see there.
        versions: of the packages that computed it.
        format: of the record.
    """

    system: str
    seed: int
    selected: str
    split: Split
    cost: Cost
    queries: Queries | Identities
    versions: dict[str, str | None] = Field(default_factory=package_versions)
    format: Literal["fmfa record 1"] = "fmfa record 1"


def canonical_order(rows: pd.DataFrame) -> np.ndarray:
    """Positions of a split's rows, int64 [Q], sorted by (path, identity, caption), whatever the order of the file."""
    return np.lexsort([pd.factorize(rows[name], sort=True)[0] for name in ("caption", "identity", "image")])


def describe_split(dataset: str, split: str, rows: pd.DataFrame, gallery: pd.DataFrame) -> Split:
    """Name and fingerprint a split; see `Split`."""
    counts = rows["identity"].nunique(), len(gallery), len(rows)
    versions = [name for (name, part), known in PUBLISHED.items() if part == split and known == counts]
    version = next((name for name in versions if name.startswith(dataset)), "")
    prints = [_fingerprint(rows[["image", "identity", "caption"]]), _fingerprint(gallery[["image", "identity"]])]
    return Split(dataset, split, version, *counts, *prints)


def _fingerprint(table: pd.DataFrame) -> str:
    digest = hashlib.sha256()
    for line in sorted(json.dumps(row) for row in zip(*map(pd.Series.tolist, (table[name] for name in table)))):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def queries_of(evaluation: Evaluation) -> Queries:
    """The text-to-image results of an evaluation in the order of the record."""
    order, metrics = canonical_order(evaluation.rows), evaluation.metrics[TEXT_TO_IMAGE]
    return Queries(
        identity=metrics.identity[order].tolist(),
        first_rank=metrics.first_rank[order].tolist(),
        average_precision=metrics.average_precision[order].round(6).tolist(),
        inverse_negative_penalty=metrics.inverse_negative_penalty[order].round(6).tolist(),
    )


def write_record(record: ScoreRecord, path: str | Path) -> None:
    """Write a record whole or not at all, the same bytes for the same record.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = asdict(record)
    text = json.dumps(content | {"checksum": content_checksum(content)}, separators=(",", ":"))
    with said_plainly(f"{path} cannot be written"), whole_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_record(path: str | Path) -> ScoreRecord:
    """Read a record.

    Raises:
        ConfigError: it cannot be read, is damaged, or holds what no record has; the message names the file.
    """
    try:
        with gzip.open(path) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ConfigError("it holds more than any record")
        content = json.loads(text)
        damaged = content.pop("checksum") != content_checksum(content)
        queries = content["queries"]
        parts = {"split": Split, "cost": Cost, "queries": Identities if "sums" in queries else Queries}
        record = ScoreRecord(**content | {name: kind(**content[name]) for name, kind in parts.items()})
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, zlib.error, RecursionError) as error:
        raise ConfigError(f"{path} is no record of a scored system ({type(error).__name__}: {error})") from error
    if damaged:
        raise ConfigError(f"{path} is not as its checksum says: it was changed, take the file as it was written")
    return record
