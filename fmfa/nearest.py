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
_pool = cache(ThreadPoolExecutor)


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of the first `len(vector)` vectors of a gallery; use `open_codes`.

    Attributes:
        rows: uint8 [N, D], the codes plus 128, memory-mapped and ordered by cell.
        vector: int64 [N], which vector each row is.
        row: int64 [N], its inverse.
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
        if places is not None:
            chosen = np.sort(self.row[places])
            shares = [[(self.rows.take(chosen, axis=0), self.vector[chosen])]]
        elif probes:
            cells = np.argpartition(-np.einsum("cd,d->c", self.centroids, turned), probes - 1)[:probes]
            ranges = zip(self.bounds[cells], self.bounds[cells + 1])
            shares = [[(self.rows[a:b], self.vector[a:b]) for a, b in ranges]]
        else:
            bounds = np.linspace(0, len(self.rows), faiss.omp_get_max_threads() + 1).astype(int)
            shares = [[(self.rows[a:b], self.vector[a:b])] for a, b in pairwise(bounds)]
        parts = _pool(len(shares)).map(lambda share: self._best(code, take, share), shares)
        scores, found = map(np.concatenate, zip(*parts))
        if np.count_nonzero(found >= 0) < take:
            return found[found >= 0], -np.inf
        best = np.argpartition(-scores, take - 1)[:take]
        lost = self.error + np.linalg.norm(turned - unit * code) * (self.reach + self.error)
        lost = lost * min(1, 6 / len(query) ** 0.5) + _SLACK
        return found[best], float(scores[best].min() * unit * self.scale + query @ self.mean + lost)

    def _best(
        self, code: np.ndarray, take: int, blocks: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and vectors [take] of the best of some rows [R, D] and their vectors [R]; -1 beyond the last."""
        kind = faiss.ScalarQuantizer(len(code), faiss.ScalarQuantizer.QT_8bit_direct_signed)
        scanner = kind.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, None)
        scores, found = np.full(take, -np.inf, np.float32), np.full(take, -1)
        scanner.set_query(faiss.swig_ptr(code))
        for rows, vectors in blocks:
            given = map(faiss.swig_ptr, (rows, vectors, scores, found))
            scanner.scan_codes(len(rows), *given, take)
        return scores, found


def open_codes(folder: Path) -> Codes | None:
    """Open the codes of a gallery, if it has some; ConfigError if they are damaged."""
    if not (folder / CODES).exists():
        return None
    try:
        with np.load(folder / CODES, allow_pickle=False) as file:
            kept = {name: value if value.ndim else value.item() for name, value in file.items()}
        return _opened(_rows_file(folder, len(kept["vector"])), **kept)
    except (OSError, ValueError, EOFError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
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
    rows, cell = np.empty((count, size), np.uint8), np.empty(count, np.int64)
    for start in range(0, count, _STEP):
        step = slice(start, start + _STEP)
        turned = (vectors[step].astype(np.float32) - mean) @ rotation
        code = np.rint(turned / scale).clip(-127, 127)
        error = max(error, float(np.linalg.norm(turned - code * scale, axis=1).max()))
        reach = max(reach, float(np.linalg.norm(turned, axis=1).max()))
        cell[step] = means.index.search(turned, 1)[1][:, 0]
        rows[step] = (code + 128).astype(np.uint8)
    vector = np.argsort(cell, kind="stable")
    for rest in folder.glob(".codes*"):  # of a killed call
        rest.unlink()
    path = _rows_file(folder, count)
    with whole_file(path) as partial:
        ordered = np.lib.format.open_memmap(partial, "w+", np.uint8, rows.shape)
        for start in range(0, count, _STEP):
            ordered[start : start + _STEP] = rows[vector[start : start + _STEP]]
        ordered.flush()
    del rows
    kept = {"vector": vector, "mean": mean, "rotation": rotation, "centroids": means.centroids, "scale": scale}
    kept |= {"bounds": np.searchsorted(cell[vector], np.arange(cells + 1)), "error": error, "reach": reach}
    kept |= _measured(_opened(path, **kept), vectors, queries)
    with whole_file(folder / CODES) as partial, open(partial, "wb") as file:
        np.savez(file, **kept)
    for old in set(folder.glob(_rows_file(folder, "*").name)) - {path}:
        old.unlink()
    return _opened(path, **kept)


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


def _opened(path: Path, **kept: Any) -> Codes:
    row = np.empty_like(kept["vector"])
    row[kept["vector"]] = np.arange(len(row))
    return Codes(np.asarray(np.load(path, mmap_mode="r")), row=row, **kept)


def _rows_file(folder: Path, count: int | str) -> Path:
    return folder / f"codes-{count}.npy"
