"""The first pass of a search by a Milvus server (`pip install pymilvus`), where one machine's memory is outgrown."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmfa.errors import ConfigError

_BATCH = 5_000  # vectors that are sent at once
_MOST = 16_384  # hits that Milvus gives at most
_ROUNDING = 2e-3  # of cosines of vectors in half precision, which the server may compute otherwise


@dataclass(frozen=True, eq=False)
class MilvusVectors:
    """The first vectors of a gallery in a collection of a server, with the interface of `fmfa.nearest.Codes`.

    How exact the search is, the collection's index decides: FLAT, with which it is made, is exact.

    Attributes:
        client: a `pymilvus.MilvusClient`.
        collection: its name.
        vector: the vectors that are there.
        probes, recall: not known.
    """

    client: Any
    collection: str
    vector: range
    probes: int = 0
    recall: float = float("nan")

    def near(
        self, query: np.ndarray, take: int, places: np.ndarray | None = None, probes: int = 0
    ) -> tuple[np.ndarray, float]:
        """As `fmfa.nearest.Codes.near`."""
        chosen: dict[str, Any] = {"output_fields": ["vector"], "limit": min(take, _MOST)}
        if places is not None:
            chosen["filter"] = f"vector in {places.tolist()}"
        with _told(self.collection):
            hits = self.client.search(self.collection, data=[query.tolist()], anns_field="picture", **chosen)[0]
        whole = len(hits) < chosen["limit"] or chosen["limit"] == _MOST
        bound = -np.inf if whole else hits[-1]["distance"] + _ROUNDING
        return np.array([hit["vector"] for hit in hits], np.int64), float(bound)


def open_milvus(uri: str, collection: str, count: int) -> MilvusVectors:
    """Connect to a server.

    Args:
        uri: as http://host:19530, or a file of Milvus Lite.
        collection: its name there.
        count: how many vectors of the gallery it holds.

    Raises:
        ConfigError: pymilvus is missing, or there is no server.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError:
        raise ConfigError("this gallery is searched by Milvus; pip install pymilvus") from None
    with _told(uri):
        return MilvusVectors(MilvusClient(uri), collection, range(count))


def send_vectors(served: MilvusVectors, vectors: np.ndarray) -> None:
    """Send those of a gallery's vectors, float16 [N, D], that are not there; the first make the collection anew."""
    from pymilvus import DataType

    client, sent = served.client, len(served.vector)
    with _told(served.collection):
        if not sent:
            client.drop_collection(served.collection)
            schema = client.create_schema()
            schema.add_field("vector", DataType.INT64, is_primary=True)
            schema.add_field("picture", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
            index = client.prepare_index_params()
            index.add_index("picture", index_type="FLAT", metric_type="IP")
            client.create_collection(served.collection, schema=schema, index_params=index, consistency_level="Strong")
        for start in range(sent, len(vectors), _BATCH):
            batch = vectors[start : start + _BATCH].astype(np.float32)
            client.upsert(served.collection, [{"vector": start + n, "picture": row} for n, row in enumerate(batch)])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn errors of the server, of gRPC and of the client, which are of many kinds, into a ConfigError."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{what}: Milvus refuses: {' '.join(str(error).split())}") from error
