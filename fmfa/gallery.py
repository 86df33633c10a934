"""A gallery: the pictures of a folder, table or data set, encoded once and searched by any number of sentences.

`python -m fmfa.gallery build SOURCE --to GALLERY`, then `add`, `remove`, `refresh`; `python -m fmfa.search` searches.
A gallery is a folder with `vectors` (half precision, unit length), `gallery.sqlite` (one row per picture),
`gallery.json` (the system that encodes) and, if it is large, 8-bit codes (see `fmfa.nearest`). The vectors of a batch
are on disk before its rows are, so that a kill at any moment leaves a gallery that opens.
"""

import argparse
import itertools
import json
import mmap
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from fmfa.data.annotations import REAL, SIMPEDES, Dataset, canonical_name
from fmfa.data.datasets import open_dataset
from fmfa.errors import ConfigError, FmfaError
from fmfa.evaluation.evaluate import encode_captions, encode_images, pictures_below
from fmfa.files import flush, held_folder, read_json, said_plainly, write_json
from fmfa.milvus import MilvusVectors, open_milvus, send_vectors
from fmfa.nearest import Codes, build_codes, open_codes
from fmfa.progress import progress_bar
from fmfa.systems import System, add_model_options, fingerprint, load_system, model_options

RECORD = "gallery.json"
TABLE = "gallery.sqlite"
VECTORS = "vectors"
OWN_COLUMNS = ("vector", "path", "size", "changed")  # of the table; further ones are the user's
_HIT_COLUMNS = ("query", "rank", "cosine", "deviations")
_SCHEMA = "vector INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, changed REAL"
_BATCH = 512
CODED_ABOVE = 20_000  # vectors without codes; as many are searched in half precision
APPROXIMATE_ABOVE = 2_000_000  # vectors; below, exact search takes 100 ms at most
PATIENCE = 20.0  # seconds that a condition may take
_RESCORED = 500  # of the first pass, beyond the hits
_SAMPLE = 2048  # pictures that say what cosines are usual


@dataclass(frozen=True)
class Gallery:
    """An open gallery; use `open_gallery`.

    `vectors` is float16 [N, D] of unit length, memory-mapped. Rows of the table point into it; vectors of pictures that
    were removed or changed stay, and no row points at them. `codes` are those of the first vectors, if there are many.
    """

    folder: Path
    record: dict[str, Any]
    vectors: np.ndarray
    codes: Codes | MilvusVectors | None = None

    def __len__(self) -> int:
        """Number of pictures."""
        with _connected(self.folder) as table:
            return table.execute("SELECT count(*) FROM pictures").fetchone()[0]

    def system(self, device: str = "cpu", weights: str = "") -> System:
        """Open the system that encoded the gallery.

        Args:
            device: auto, cpu or cuda.
            weights: where its weights are now, if they were moved.

        Raises:
            ConfigError: the weights are not those that encoded the gallery.
            CheckpointError: they cannot be read.
        """
        given = self.record["system"] | ({"source": weights} if weights else {})
        system = load_system(given["source"], device, **given["model"])
        if fingerprint(system) != self.record["fingerprint"]:
            raise ConfigError(
                f"{given['source'] or 'the shipped CLIP'} is not the system that encoded {self.folder}: vectors of two "
                "systems cannot be compared. Name the weights that built it, or build a gallery with these"
            )
        return system

    def rows(self, where: str = "") -> pd.DataFrame:
        """One row per picture, in the order of their addition.

        Args:
            where: an SQL condition on the columns, such as `camera == 'entrance' and time > '2026-05-01'`; it can only
                read. Empty: all pictures.

        Raises:
            ConfigError: the condition is not valid; the columns are named.
        """
        with _connected(self.folder) as table:
            asked = self._asked(table, "*", where)
            rows = pd.DataFrame.from_records(asked.fetchall(), columns=[name for name, *_ in asked.description])
        return rows.sort_values("vector", ignore_index=True)

    def search(self, query: Tensor, k: int = 10, where: str = "", approximate: bool | None = None) -> pd.DataFrame:
        """The k pictures closest to an embedding, best first; of equal ones the earlier added.

        Args:
            query: float [D], of a sentence or a picture; see `encode_captions` and `encode_images`.
            k: number of pictures, or fewer if there are no more.
            where: as in `rows`; only these pictures are searched.
            approximate: search the nearest cells only, whose recall `codes.recall` tells; None: in galleries of more
                than `APPROXIMATE_ABOVE`. With a condition, and in galleries without codes, the search is exact.

        Returns:
            The rows, as `rows` gives them, with `cosine`, and `deviations`: how many standard deviations that is above
            the mean cosine of the gallery, both estimated from at most 2,048 of its pictures.

        Raises:
            ConfigError: `where` is not valid, or the query's size is not the gallery's.
        """
        if query.shape != (self.vectors.shape[1],):
            raise ConfigError(f"the query has shape {tuple(query.shape)}, expected ({self.vectors.shape[1]},)")
        unit = F.normalize(query.detach().cpu().float(), dim=0).numpy()
        approximate = len(self.vectors) > APPROXIMATE_ABOVE if approximate is None else approximate
        with _connected(self.folder) as table:
            table.execute("BEGIN")  # one state of the table, whoever writes to it meanwhile
            places = self._places(table, where) if where or not self.codes else None
            if self.codes and (places is None or len(places) > k + _RESCORED):
                places, cosine = self._near(self.codes, table, unit, k, places, approximate)
            else:
                assert places is not None
                cosine = _products(self.vectors[places], unit)
            order = np.argsort(-cosine, kind="stable")[:k]
            best, cosine = places[order], cosine[order]
            asked = self._asked(table, "*", _among(best))
            found = {row[0]: row for row in asked}  # by vector, the first column
        names = [name for name, *_ in asked.description]
        columns = list(zip(*(found[vector] for vector in best.tolist()))) or [()] * len(names)
        mean, covariance = self._usual
        deviations = (cosine - unit @ mean) / np.sqrt(unit @ np.einsum("de,e->d", covariance, unit))
        if isinstance(self.vectors.base, mmap.mmap) and self.codes:  # what was read stays in the system's cache alone
            self.vectors.base.madvise(mmap.MADV_DONTNEED)
        return pd.DataFrame(dict(zip(names, columns)) | {"cosine": cosine, "deviations": deviations})

    def choices(self, most: int = 20) -> dict[str, list[Any]]:
        """By column of the user, its different values, of those columns that have 2 to `most`."""
        found = {}
        with _connected(self.folder) as table:
            for _, name, *_ in table.execute("PRAGMA table_info(pictures)").fetchall():
                asked = f"SELECT DISTINCT {_quoted(name)} FROM pictures LIMIT {most + 1}"
                values = [] if name in OWN_COLUMNS else [row[0] for row in table.execute(asked)]
                if 2 <= len(values) <= most:
                    found[name] = sorted((v for v in values if v is not None), key=lambda v: (isinstance(v, str), v))
        return found

    def _near(
        self, codes: Codes | MilvusVectors, table: sqlite3.Connection, query: np.ndarray, k: int,
        places: np.ndarray | None, approximate: bool,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Some vectors in ascending order, among them the k best (if approximate, most of them), and their cosines."""
        approximate, coded = approximate and places is None, len(codes.vector)
        take = k + (_RESCORED if places is None and not approximate else 100)
        rest = self._places(table, f"vector >= {coded}") if places is None else places[places >= coded]
        given = None if places is None else places[places < coded]
        while True:
            near, bound = codes.near(query, take, given, codes.probes if approximate else 0)
            near = self._places(table, _among(near)) if places is None else np.sort(near)  # without those removed
            near = np.concatenate([near, rest])
            cosine = _products(self.vectors[near], query)
            if approximate or bound == -np.inf or np.count_nonzero(cosine > bound) >= k:
                return near, cosine
            take *= 8

    @cached_property
    def _usual(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] of some vectors of the gallery; NaN if it has less than two."""
        drawn = np.random.default_rng(0).permutation(len(self.vectors))[:_SAMPLE]
        with _connected(self.folder) as table:
            sample = self.vectors[self._places(table, _among(drawn))].astype(np.float64)
        if len(sample) < 2:
            sample = np.full((2, self.vectors.shape[1]), np.nan)
        return sample.mean(axis=0), np.cov(sample.T).astype(np.float32)

    def _places(self, table: sqlite3.Connection, where: str) -> np.ndarray:
        """Vectors of the rows that a condition selects, int64 in ascending order."""
        text = self._asked(table, "group_concat(vector)", where).fetchone()[0]
        return np.sort(np.fromstring(text or "", np.int64, sep=","))

    def _asked(self, table: sqlite3.Connection, columns: str, where: str) -> sqlite3.Cursor:
        """Rows that a condition selects, of those whose vectors were there when the gallery was opened."""
        condition = f"vector < {len(self.vectors)}" + (f" AND ({where})" if where else "")
        try:
            return table.execute(f"SELECT {columns} FROM pictures WHERE {condition}")
        except (sqlite3.Error, sqlite3.Warning) as error:
            known = ", ".join(row[1] for row in table.execute("PRAGMA table_info(pictures)"))
            raise ConfigError(f"the condition {where!r} is not valid: {error}; columns are {known}") from None


def condition(values: Mapping[str, Any], where: str = "") -> str:
    """An SQL condition: columns have given values (text, numbers), and `where` holds; ConfigError for another kind."""
    parts = [f"({where})"] if where.strip() else []
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise ConfigError(f"the value of {name} is {value!r}; expected text or a number")
        text = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)
        # Without the table, SQLite takes an unknown name for text.
        parts.append(f"pictures.{_quoted(name)} = {text}")
    return " AND ".join(parts)


def open_gallery(folder: str | Path) -> Gallery:
    """Open a gallery; ConfigError if there is none or it is damaged."""
    folder = Path(folder)
    record = _read_record(folder)
    if not (folder / TABLE).is_file():
        raise ConfigError(f"{folder} is no gallery: {TABLE} is missing; build it again")
    path, size = folder / VECTORS, record["dimension"]
    held = path.stat().st_size // (2 * size) if path.is_file() else 0
    with _connected(folder) as table:
        needed = table.execute("SELECT coalesce(max(vector), -1) + 1 FROM pictures").fetchone()[0]
    if held < needed:
        raise ConfigError(f"{path} holds {held:,} vectors and the table needs {needed:,}; build the gallery again")
    codes: Codes | MilvusVectors | None = None
    if server := record.get("milvus"):
        codes = open_milvus(server["uri"], server["collection"], server["vectors"])
    elif (codes := open_codes(folder)) and (len(codes.vector) > held or codes.rows.shape[1] != size):
        raise ConfigError(f"{path} does not fit the codes beside it; build the gallery again")
    vectors = np.memmap(path, np.float16, "c", shape=(held, size)) if held else np.empty((0, size), np.float16)
    return Gallery(folder, record, vectors, codes)


def build_gallery(
    folder: str | Path,
    source: str,
    system: System,
    described: dict[str, Any],
    *,
    vectors: str = "",
    progress: bool = True,
    **opening: Any,
) -> dict[str, str]:
    """Encode what is new or changed at a source into a gallery, which is made if missing; an interrupted call goes on.

    Args:
        folder: the gallery's.
        source: folder of pictures (its subfolders included), a CSV or Parquet table with a column `path` (or `image`;
            relative paths start at the table), or the name of a data set. Further columns of a table, and the
            identity (and of SimPEDES the camera) of a data set, are kept.
        system: encodes the pictures.
        described: `source` and `model` of `load_system`, by which the system is opened again.
        vectors: .npy file with one row per row of the source, as the system encodes its picture; empty: it encodes
            them. Pictures that are not there are kept too, until `refresh_gallery`.
        progress: show a progress bar.
        opening: `root`, `scale` and `split` of a data set.

    Returns:
        By path, why a picture was left out.

    Raises:
        ConfigError: no such source, another process writes to the gallery, or another system encoded it.
    """
    folder = Path(folder)
    pictures, faults = _pictures_at(source, opening, missing=bool(vectors))
    with said_plainly(f"{folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with held_folder(folder):
        mark = fingerprint(system)
        record = _read_record(folder) if (folder / RECORD).exists() else None
        if record and record["fingerprint"] != mark:
            raise ConfigError(f"{folder} was encoded by another system; give another folder, or that system's weights")
        entry = {"source": source, **opening, **({"vectors": vectors} if vectors else {})}
        if record is None:
            size = int(system.model.encode_image(system.transform.finish(_blank(system))).embedding.shape[1])
            record = {"fingerprint": mark, "dimension": size, "system": described, "sources": []}
        given = _given(vectors, source, pictures.attrs["rows"], record["dimension"]) if vectors else None
        if entry not in record["sources"]:
            record["sources"].append(entry)
        with _connected(folder, write=True) as table:
            write_json(folder / RECORD, record)  # after the table: a folder with a record opens
            own = [name for name in pictures if name not in OWN_COLUMNS]
            _fit_columns(table, own)
            outdated = _outdated(table, pictures)
            faults |= _encode_into(folder, table, pictures[outdated], system, record["dimension"], given, progress)
            if own:
                kept, changed = pictures[~outdated], ", ".join(f"{_quoted(name)} = ?" for name in own)
                values = zip(*(map(_plain, kept[name]) for name in [*own, "path"]), strict=True)
                with table:
                    table.executemany(f"UPDATE pictures SET {changed} WHERE path = ?", values)
        _code(folder, system, progress)
        return faults


def _code(folder: Path, system: System, progress: bool) -> None:
    """Code a gallery's vectors, if many have no code."""
    gallery = open_gallery(folder)
    coded = len(gallery.codes.vector) if gallery.codes else 0
    if isinstance(gallery.codes, MilvusVectors):
        send_vectors(gallery.codes, gallery.vectors)
        server = gallery.record["milvus"] | {"vectors": len(gallery.vectors)}
        write_json(gallery.folder / RECORD, gallery.record | {"milvus": server})
        return
    if len(gallery.vectors) - coded <= max(CODED_ABOVE, coded // 20):
        return
    with progress_bar(1, "8-bit codes, for fast search", "index", shown=progress) as bar:
        words = [("man", "woman"), ("red", "black", "white", "blue"), ("coat", "shirt", "jacket", "dress"),
                 ("black trousers", "jeans", "a grey skirt"), ("a backpack", "sunglasses")]  # fmt: skip
        sentences = ["A {} in a {} {}, {} and with {}.".format(*said) for said in itertools.product(*words)]
        queries = F.normalize(encode_captions(system.model, sentences, system.tokenizer, progress=False), dim=1)
        build_codes(folder, gallery.vectors, queries.numpy())
        bar.update(1)


def move_to_milvus(folder: str | Path, uri: str, collection: str) -> None:
    """Let a server do the first pass of a gallery's searches, instead of codes on this machine.

    Args:
        folder: the gallery's, whose table and vectors stay.
        uri: as http://host:19530, or a file of Milvus Lite.
        collection: a name in the server; one that is there is replaced.
    """
    with held_folder(folder):
        gallery = open_gallery(folder)
        server = {"uri": uri, "collection": collection}
        send_vectors(open_milvus(count=0, **server), gallery.vectors)
        write_json(gallery.folder / RECORD, gallery.record | {"milvus": server | {"vectors": len(gallery.vectors)}})


def remove_pictures(folder: str | Path, paths: Iterable[str]) -> int:
    """Take pictures out of a gallery by their paths; returns how many it held."""
    open_gallery(folder)
    with held_folder(folder), _connected(Path(folder), write=True) as table, table:
        before = table.total_changes
        table.executemany("DELETE FROM pictures WHERE path = ?", [(_absolute(path),) for path in paths])
        return table.total_changes - before


def refresh_gallery(folder: str | Path, system: System, *, progress: bool = True) -> tuple[int, dict[str, str]]:
    """Bring a gallery up to date with its sources: new and changed pictures are encoded, vanished ones removed.

    Returns:
        How many were removed, and by path why a picture was left out.

    Raises:
        ConfigError: a whole source is gone, as that of a disk that is not mounted; nothing is removed then.
    """
    gallery = open_gallery(folder)
    faults: dict[str, str] = {}
    for entry in gallery.record["sources"]:
        faults |= build_gallery(folder, system=system, described=gallery.record["system"], progress=progress, **entry)
    gone = [path for path in open_gallery(folder).rows()["path"] if not os.path.isfile(path)]
    return remove_pictures(folder, gone), faults


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 2 a mistake in what was asked for."""
    options = _parser().parse_args(arguments)
    try:
        faults = options.run(options) or {}
        for fault in faults.values():
            print(f"left out: {fault}", file=sys.stderr)
        gallery = open_gallery(options.gallery)
        left_out = f", {len(faults):,} left out" if faults else ""
        recall = gallery.codes.recall if isinstance(gallery.codes, Codes) else None
        coded = f"; recall@10 of the approximate search {recall:.1%}" if recall else ""
        print(f"{options.gallery}: {len(gallery):,} pictures{left_out}{coded}")
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is encoded is kept; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fmfa.gallery", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("build", "encode a source into a gallery"), ("add", "encode a further source")):
        command = commands.add_parser(name, help=help_text)
        command.set_defaults(run=_build)
        command.add_argument("source", help="folder, CSV or Parquet table with a column path, or name of a data set")
        command.add_argument("--to", required=True, dest="gallery", metavar="GALLERY", help="folder of the gallery")
        command.add_argument("--vectors", default="", help=".npy file with a vector per picture, which is not encoded")
        command.add_argument("--root", default="", help="of a data set: its folder")
        command.add_argument("--scale", default="small", help="of SimPEDES without a root")
        command.add_argument("--split", default="test", help="of a data set")
        command.add_argument("--weights", default="", help="run, weight file or open_clip model; empty: shipped CLIP")
        add_model_options(command)
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command = commands.add_parser("remove", help="take pictures out (refresh encodes them again if they are there)")
    command.set_defaults(run=_remove)
    command.add_argument("gallery")
    command.add_argument("paths", nargs="+")
    command = commands.add_parser("milvus", help="let a Milvus server search")
    command.set_defaults(run=_milvus)
    command.add_argument("gallery")
    command.add_argument("uri", help="as http://host:19530, or a file of Milvus Lite")
    command.add_argument("--collection", default="pictures", help="its name in the server; replaced")
    command = commands.add_parser("refresh", help="encode new and changed pictures, remove vanished ones")
    command.set_defaults(run=_refresh)
    command.add_argument("gallery")
    command.add_argument("--weights", default="", help="where the system's weights are now, if they were moved")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def _build(options: argparse.Namespace) -> dict[str, str]:
    weights = _absolute(options.weights) if os.path.exists(options.weights) else options.weights
    described: dict[str, Any] = {"source": weights, "model": model_options(options)}
    if options.command == "add" and not weights:
        described = open_gallery(options.gallery).record["system"]
    system = load_system(described["source"], options.device, **described["model"])
    source = _absolute(options.source) if os.path.exists(options.source) else options.source
    opening = {} if os.path.exists(source) else {name: getattr(options, name) for name in ("root", "scale", "split")}
    vectors = _absolute(options.vectors) if options.vectors else ""
    return build_gallery(options.gallery, source, system, described, vectors=vectors, **opening)


def _remove(options: argparse.Namespace) -> None:
    print(f"{remove_pictures(options.gallery, options.paths)} of {len(options.paths)} removed")


def _refresh(options: argparse.Namespace) -> dict[str, str]:
    system = open_gallery(options.gallery).system(options.device, options.weights)
    removed, faults = refresh_gallery(options.gallery, system)
    print(f"{removed:,} vanished pictures removed")
    return faults


def _milvus(options: argparse.Namespace) -> None:
    uri = options.uri if "://" in options.uri else _absolute(options.uri)
    move_to_milvus(options.gallery, uri, options.collection)


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD)
    kinds = {"fingerprint": str, "dimension": int, "system": dict, "sources": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]:
        raise ConfigError(
            f"{folder / RECORD} is damaged: {', '.join(wrong)} missing or not of its kind; build it again"
        )
    return record


def _pictures_at(source: str, opening: dict[str, Any], missing: bool) -> tuple[pd.DataFrame, dict[str, str]]:
    """Table with absolute `path`, `size`, `changed` and the source's own columns; and what is missing, by path.

    The index is the row of the source, of which `attrs` has the number. Missing pictures can be kept.
    """
    faults: dict[str, str] = {}
    if os.path.isdir(source):
        paths, faults = pictures_below(Path(source))
        if not paths:  # as of a disk that is not mounted
            raise ConfigError(f"{source} holds no picture; give a folder with pictures, or remove what is gone by name")
        table = pd.DataFrame({"path": paths})
    elif os.path.isfile(source):
        table = _read_table(Path(source))
    elif opening and (opening["root"] or canonical_name(source).startswith((SIMPEDES, *REAL))):
        table = _of_dataset(open_dataset(source, opening["root"], scale=opening["scale"]), opening["split"])
    else:
        raise ConfigError(f"{source}: no such folder or table; give one that is there, or the name of a data set")
    table["path"] = [_absolute(path) for path in table["path"]]
    table = table.reset_index(drop=True)
    table.attrs["rows"] = len(table)
    table = table.drop_duplicates("path")
    found = [os.stat(path) if os.path.isfile(path) else None for path in table["path"]]
    sizes, times = [at.st_size if at else -1 for at in found], [at.st_mtime if at else 0.0 for at in found]
    table = table.assign(size=sizes, changed=times)
    if not missing:
        faults |= {path: f"{path}: no such file" for path in table["path"][table["size"] < 0]}
        table = table[table["size"] >= 0]
    return table, faults


def _given(path: str, source: str, rows: int, size: int) -> np.ndarray:
    """Memory-mapped vectors that a user gives, float [N, D]."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as .npy: {error}") from error
    if vectors.shape != (rows, size) or vectors.dtype.kind != "f":
        found = f"{vectors.dtype} {list(vectors.shape)}"
        raise ConfigError(f"{path} holds {found}; expected float [{rows}, {size}], one row per row of {source}")
    return vectors


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = (
            pd.read_parquet(path)
            if path.suffix == ".parquet"
            else pd.read_csv(path, keep_default_na=False, na_values=[""])
        )
    except Exception as error:  # pandas lets errors of every kind through
        raise ConfigError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error
    table = table.rename(columns={"image": "path"}) if "path" not in table else table
    if "path" not in table:
        raise ConfigError(f"{path} has the columns {', '.join(map(str, table))}; expected `path` or `image`")
    taken = sorted({*OWN_COLUMNS, *_HIT_COLUMNS} & set(table) - {"path"})
    if taken:
        raise ConfigError(f"{path} has a column {taken[0]}, a name that galleries use themselves; rename it")
    return table.assign(path=[str(path.parent / entry) for entry in table["path"].astype(str)])


def _of_dataset(data: Dataset, split: str) -> pd.DataFrame:
    rows = data.split(split)[["image", "identity"]].drop_duplicates("image")
    if data.truth:
        rows["camera"] = data.truth.pictures(split)["camera"].loc[rows["image"]].to_numpy()
    return rows.drop(columns="image").assign(path=[str(Path(data.images) / image) for image in rows["image"]])


def _outdated(table: sqlite3.Connection, pictures: pd.DataFrame) -> np.ndarray:
    """Whether each picture is missing from the table or has another size or time of change there."""
    known = {path: (size, changed) for path, size, changed in table.execute("SELECT path, size, changed FROM pictures")}
    rows = zip(pictures["path"], pictures["size"], pictures["changed"], strict=True)
    return np.array([known.get(path) != (size, changed) for path, size, changed in rows], bool)


def _encode_into(
    folder: Path,
    table: sqlite3.Connection,
    pictures: pd.DataFrame,
    system: System,
    size: int,
    given: np.ndarray | None,
    progress: bool,
) -> dict[str, str]:
    faults: dict[str, str] = {}
    columns = ["vector", *pictures.columns]
    insert = (
        f"INSERT OR REPLACE INTO pictures ({', '.join(map(_quoted, columns))}) VALUES ({', '.join('?' * len(columns))})"
    )
    step = _BATCH if given is None else 40 * _BATCH
    with progress_bar(len(pictures), "encoding", "pictures", shown=progress) as bar:
        for start in range(0, len(pictures), step):
            batch = pictures[start : start + step]
            left_out: dict[str, str] = {}
            if given is None:
                paths = batch["path"].tolist()
                encoded = encode_images(system.model, paths, system.transform, faults=left_out, progress=False)
            else:
                encoded = torch.from_numpy(given[batch.index].astype(np.float32))
                odd = ~(encoded.isfinite().all(dim=1) & encoded.any(dim=1)).numpy()
                left_out = {path: f"{path}: its vector is 0 or not finite" for path in batch["path"][odd]}
                encoded = encoded[~odd]
            batch = batch[~batch["path"].isin(left_out)]
            first = _append(folder / VECTORS, F.normalize(encoded, dim=1).half().numpy(), size) if len(batch) else 0
            with table:
                values = zip(range(first, first + len(batch)), *(map(_plain, batch[c]) for c in pictures), strict=True)
                table.executemany(insert, values)
                table.executemany("DELETE FROM pictures WHERE path = ?", [(path,) for path in left_out])
            faults |= left_out
            bar.update(min(step, len(pictures) - start))
    return faults


def _append(path: Path, vectors: np.ndarray, size: int) -> int:
    """Append float16 [B, size] and return the position of the first; half a vector of a killed call is overwritten."""
    with said_plainly(f"{path} cannot be written; make room and run the same command again"):
        with open(path, "r+b" if path.exists() else "w+b") as file:
            first = file.seek(0, os.SEEK_END) // (2 * size)
            file.seek(first * 2 * size)
            file.write(vectors.tobytes())
        flush(path)
    return first


@contextmanager
def _connected(folder: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    path = (folder / TABLE).absolute()
    mode = "rwc" if write else "rw"  # who cannot write cannot undo what a killed writer left half done
    try:
        table = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True)
        try:
            limit = time.monotonic() + PATIENCE
            table.set_progress_handler(None if write else lambda: time.monotonic() > limit, 100_000)
            table.execute(f"CREATE TABLE IF NOT EXISTS pictures ({_SCHEMA})")
            table.execute(f"PRAGMA query_only = {not write}")
            yield table
        finally:
            table.close()
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error


def _fit_columns(table: sqlite3.Connection, names: Sequence[str]) -> None:
    known = {row[1].lower() for row in table.execute("PRAGMA table_info(pictures)")}
    for name in names:
        if str(name).lower() not in known:
            table.execute(f"ALTER TABLE pictures ADD COLUMN {_quoted(name)}")
            table.execute(f"CREATE INDEX {_quoted(f'by {name}')} ON pictures ({_quoted(name)})")


def _products(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[N, D] times [D]; few in one thread, since several wait for each other on a busy machine."""
    if vectors.size > 2**20:
        return (torch.from_numpy(vectors).float() @ torch.from_numpy(query)).numpy()
    return np.einsum("nd,d->n", np.asarray(vectors, np.float32), query)


def _among(vectors: np.ndarray) -> str:
    return f"vector IN (SELECT value FROM json_each('{json.dumps(vectors.tolist())}'))"


def _quoted(name: str) -> str:
    return '"' + str(name).replace('"', '""') + '"'


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | float | str | None) else str(value)


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _blank(system: System) -> Tensor:
    return torch.zeros(1, 3, *system.transform.size, dtype=torch.uint8, device=next(system.model.parameters()).device)


if __name__ == "__main__":
    sys.exit(main())
