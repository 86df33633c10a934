"""Nearest vectors among millions: a first pass over 8-bit codes by FAISS, from which the exact best can be had.

Vectors are centred, turned by a random rotation, which spreads the few large dimensions of CLIP over all of them, and
rounded to int8. How far a cosine of codes is from the vectors' own is bounded, so that a caller knows when the best are
among what the first pass found. Codes lie ordered by k-means cells; the approximate search reads the nearest cells.
"""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from fmfa.errors import ConfigError
from fmfa.files import whole_file

CODES = "codes.npz"
RECALL = 0.97  # of the ten best, by which the number of cells that the approximate search reads is chosen
_STEP = 20_000
_PER_CELL = 40  # training vectors of k-means
_SLACK = 1e-4  # rounding of float32 in turning and adding


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of the first `len(vector)` vectors of a gallery; use `open_codes`.

    Attributes:
        index: the memory-mapped FAISS index that holds the codes.
        rows: uint8 [N, D], its codes, ordered by cell.
        vector: int32 [N], which vector each row is.
        row: int32 [N], its inverse.
        mean: float32 [D], subtracted from every vector.
        rotation: float32 [D, D].
        centroids: float32 [C, D], of the cells, centred and turned.
        bounds: int64 [C + 1], the rows where cells start.
        scale: of a code.
        error: the longest difference between a vector and its code.
        reach: the longest centred vector.
        probes: how many cells the approximate search reads.
        recall: its recall@10 against the exact search, measured when built.
    """

    index: faiss.Index
    rows: np.ndarray
    vector: np.ndarray
    row: np.ndarray
    mean: np.ndarray
    rotation: np.ndarray
    centroids: np.ndarray
    bounds: np.ndarray
    scale: float
    error: float
    reach: float
    probes: int = 0
    recall: float = 1.0

    def near(
        self, query: np.ndarray, take: int, places: np.ndarray | None = None, probes: int = 0
    ) -> tuple[np.ndarray, float]:
        """The vectors that are nearest by their codes.

        Args:
            query: float32 [D] of unit length.
            take: how many.
            places: int [P]; only these vectors are searched.
            probes: how many cells are read; 0: all.

        Returns:
            int [take] vectors in no order, and a cosine that none of the others searched exceeds, unless by an error
            of more than six standard deviations: after the rotation, errors of length e have deviation e / sqrt(D).
        """
        turned = np.einsum("d,de->e", query, self.rotation)  # threads of BLAS wait for each other on a busy machine
        unit = max(np.abs(turned).max() / 127, 1e-12)
        code = np.rint(turned / unit)
        threads = faiss.omp_get_max_threads()
        if places is not None:
            parts = np.array_split(np.sort(self.row[places]), threads)
            blocks = [(self.rows[part], part) for part in parts]
        elif probes:
            cells = np.argpartition(-np.einsum("cd,d->c", self.centroids, turned), probes - 1)[:probes]
            blocks = [(self.rows[start:end], start) for start, end in zip(self.bounds[cells], self.bounds[cells + 1])]
        else:
            bounds = np.linspace(0, len(self.rows), threads + 1).astype(int)
            blocks = [(self.rows[start:end], start) for start, end in pairwise(bounds)]
        shares = [blocks[first::threads] for first in range(threads)]
        found = _pool(threads).map(lambda share: [self._best(code, take, *block) for block in share], shares)
        scores, rows = map(np.concatenate, zip(*(best for share in found for best in share)))
        if take >= sum(len(block) for block, _ in blocks):
            return self.vector[rows], -np.inf
        best = np.argpartition(-scores, take - 1)[:take]
        lost = self.error + np.linalg.norm(turned - unit * code) * (self.reach + self.error)
        lost = lost * min(1, 6 / len(query) ** 0.5) + _SLACK
        return self.vector[rows[best]], float(scores[best].min() * unit * self.scale + query @ self.mean + lost)

    def _best(
        self, code: np.ndarray, take: int, rows: np.ndarray, numbers: np.ndarray | int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and numbers of the best of some rows, which are numbered by an array or from a number on."""
        if not len(rows):
            return np.empty(0, np.float32), np.empty(0, int)
        part = _empty(rows.shape[1])
        address = faiss.cast_integer_to_void_ptr(rows.ctypes.data)
        part.codes = faiss.MaybeOwnedVectorUInt8.create_view(address, rows.size, self.index.codes.owner)
        part.ntotal = len(rows)
        scores, found = part.search(code[None].astype(np.float32), min(take, len(rows)))
        return scores[0], numbers[found[0]] if isinstance(numbers, np.ndarray) else numbers + found[0]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,))


def open_codes(folder: Path) -> Codes | None:
    """Open the codes of a gallery, if it has some; ConfigError if they are damaged."""
    if not (folder / CODES).exists():
        return None
    try:
        with np.load(folder / CODES, allow_pickle=False) as file:
            kept = {name: value if value.ndim else value.item() for name, value in file.items()}
        index = faiss.read_index(str(_index_file(folder, len(kept["vector"]))), faiss.IO_FLAG_MMAP_IFC)
        return _opened(index, **kept)
    except (OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder / CODES} is damaged ({reason}); delete it and refresh the gallery") from error


def build_codes(folder: Path, vectors: np.ndarray, queries: np.ndarray, seed: int = 0) -> Codes:
    """Make the codes of all vectors of a gallery; the old ones stay until the new ones are complete.

    Args:
        folder: the gallery's.
        vectors: float16 [N, D] of unit length.
        queries: float32 [Q, D] of unit length, with which the recall of the approximate search is measured.
        seed: of the rotation, the sample and k-means.
    """
    count, size = vectors.shape
    rng = np.random.default_rng(seed)
    cells = max(1, int(2 * count**0.5))
    sample = vectors[np.sort(rng.choice(count, min(count, _PER_CELL * cells), replace=False))].astype(np.float32)
    mean, rotation = sample.mean(axis=0), np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32)
    sample = (sample - mean) @ rotation
    scale, error, reach = max(float(np.abs(sample).max()) / 127, 1e-12), 0.0, 0.0
    means = faiss.Kmeans(size, cells, niter=10, seed=seed, min_points_per_centroid=1)
    means.train(sample)
    index = _empty(size)
    index.codes.resize(count * size)
    index.ntotal = count
    rows, cell = _rows(index), np.empty(count, np.int64)
    for start in range(0, count, _STEP):
        step = slice(start, start + _STEP)
        turned = (vectors[step].astype(np.float32) - mean) @ rotation
        code = np.rint(turned / scale).clip(-127, 127)
        error = max(error, float(np.linalg.norm(turned - code * scale, axis=1).max()))
        reach = max(reach, float(np.linalg.norm(turned, axis=1).max()))
        cell[step] = means.index.search(turned, 1)[1][:, 0]
        rows[step] = (code + 128).astype(np.uint8)
    vector = np.argsort(cell, kind="stable").astype(np.int32)
    rows[:] = rows[vector]
    kept = {"vector": vector, "mean": mean, "rotation": rotation, "centroids": means.centroids, "scale": scale}
    kept |= {"bounds": np.searchsorted(cell[vector], np.arange(cells + 1)), "error": error, "reach": reach}
    kept |= _measured(_opened(index, **kept), vectors, queries)
    for rest in folder.glob(".codes*"):  # of a killed call
        rest.unlink()
    with whole_file(_index_file(folder, count)) as partial:
        faiss.write_index(index, str(partial))
    with whole_file(folder / CODES) as partial, open(partial, "wb") as file:
        np.savez(file, **kept)
    for old in set(folder.glob(_index_file(folder, "*").name)) - {_index_file(folder, count)}:
        old.unlink()
    return _opened(index, **kept)


def _measured(codes: Codes, vectors: np.ndarray, queries: np.ndarray) -> dict[str, int | float]:
    """The least number of cells (in steps by a half) that has the wanted recall, and that recall."""

    def ten_best(query: np.ndarray, probes: int) -> set[int]:
        near = codes.near(query, 110 if probes else 500, probes=probes)[0]
        return set(near[np.argsort(-(vectors[near].astype(np.float32) @ query), kind="stable")[:10]])

    exact = [ten_best(query, 0) for query in queries]
    probes, recall = 1, 0.0
    while recall < RECALL and probes < len(codes.centroids):
        probes = min(probes + (probes + 1) // 2, len(codes.centroids))
        recall = float(np.mean([len(best & ten_best(q, probes)) / len(best) for q, best in zip(queries, exact)]))
    return {"probes": probes, "recall": recall}


def _opened(index: faiss.Index, **kept: Any) -> Codes:
    row = np.empty_like(kept["vector"])
    row[kept["vector"]] = np.arange(len(row), dtype=row.dtype)
    return Codes(index, _rows(index), row=row, **kept)


def _rows(index: faiss.Index) -> np.ndarray:
    return faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.d).reshape(-1, index.d)


def _empty(size: int) -> faiss.Index:
    return faiss.IndexScalarQuantizer(size, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)


def _index_file(folder: Path, count: int | str) -> Path:
    return folder / f"codes-{count}.faiss"
