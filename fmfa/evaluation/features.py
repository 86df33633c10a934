"""Features and scores in files that any system wrote, as an evaluation.

A features file has the arrays `query` [Q, D] and `gallery` [G, D] with `query_ids` [Q] and `gallery_ids` [G]; a system
of several branches has `query.NAME` and `gallery.NAME` for each, and its score is the weighted mean of their cosines.
The id of a picture is its path in the annotation file, that of a caption PATH#N, the N-th of its picture from 0; whole
numbers are positions in the order of the file instead. The arrays are in an .npz, in a folder of .npy files, in a
.safetensors (names as JSON lists in its metadata), or in a Parquet table with one row per item: `of` ("query" or
"gallery"), `id`, and a list column for each branch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch.nn import functional as F

from fmfa.errors import ConfigError, nearest
from fmfa.evaluation.evaluate import Evaluation
from fmfa.files import whole_file

SIDES = ("query", "gallery")
_SHOWN = 3


def is_features(path: str | Path) -> bool:
    """Whether a file or folder holds features, and not a model."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "np") as file:
                return any(name.split(".")[0] in SIDES for name in file.keys())  # noqa: SIM118
        except Exception:  # it is then read, and refused, as a model
            return False
    return path.suffix in (".npz", ".parquet") or (path.is_dir() and any(path.glob("query*.npy")))


def caption_ids(rows: pd.DataFrame) -> pd.Series:
    """The id of every caption of a split: the path of its picture, `#`, and its number there, or the column `id`."""
    if "id" in rows:
        return rows["id"]
    return rows["image"] + "#" + rows.groupby("image").cumcount().astype(str)


def read_features(
    path: str | Path, rows: pd.DataFrame, gallery: pd.DataFrame, weights: Mapping[str, float] | None = None
) -> Evaluation:
    """Read a features file as an evaluation of a split, in whatever order its rows are.

    Args:
        path: of the file or folder; see the module.
        rows: the split, one row per caption; see `caption_ids`.
        gallery: its different pictures, as `gallery_of` gives them.
        weights: of the branches by name, positive; None weights them equally.

    Raises:
        ConfigError: it cannot be read, or an array or id is not as described above; the message names it.
    """
    arrays = _read_arrays(Path(path))
    branches = sorted({name.partition(".")[2] for name in arrays if name.split(".")[0] in SIDES})
    weights = dict.fromkeys(branches, 1.0) if weights is None else dict(weights)
    if not branches or set(weights) != set(branches):
        known = ", ".join(branches) or "none"
        raise ConfigError(f"{path} has the branches {known}; found weights of {', '.join(weights) or 'none'}")
    for name, weight in weights.items():
        if not 0 < weight < np.inf:
            raise ConfigError(f"the weight of branch {name!r} is {weight}; expected a number above 0")
    known_ids = {"query": caption_ids(rows), "gallery": gallery["image"]}
    parts: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
    for side in SIDES:
        if f"{side}_ids" not in arrays:
            raise ConfigError(f"{path} has no {side}_ids; found {', '.join(sorted(arrays))}")
        ids = arrays[f"{side}_ids"]
        order = _places(f"{path}, {side}_ids", ids, known_ids[side])
        for branch in branches:
            name = f"{side}.{branch}".rstrip(".")
            features = _features(f"{path}, {name}", arrays.get(name), len(ids))
            unit = F.normalize(torch.from_numpy(features[np.argsort(order)]), dim=1)
            parts[side].append(weights[branch] ** 0.5 * unit)  # so that the cosine of all is the weighted mean
    for branch, query, item in zip(branches, parts["query"], parts["gallery"], strict=True):
        if query.shape[1] != item.shape[1]:
            found = f"{query.shape[1]} numbers per query and {item.shape[1]} per picture"
            raise ConfigError(f"{path}{f', branch {branch}' * bool(branch)}: found {found}; expected as many")
    return Evaluation(rows, gallery, torch.cat(parts["query"], 1), torch.cat(parts["gallery"], 1))


def read_scores(path: str | Path, rows: pd.DataFrame, gallery: pd.DataFrame) -> pd.DataFrame:
    """Read scores of a second stage, or of a whole system, as `Evaluation.reranked` takes them.

    Args:
        path: a TREC run, or a .csv or .parquet with the columns query, item and score; ids as in features files.
        rows, gallery: as in `read_features`.

    Raises:
        ConfigError: it cannot be read, an id is unknown, a pair is there twice, or a score is not a finite number.
    """
    path = Path(path)
    names = ["query", "item", "score"]
    table = _table(path, names, ["query", "q0", "item", "rank", "score", "tag"])
    scores = pd.to_numeric(table["score"], errors="coerce").to_numpy(np.float64)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ConfigError(f"{path}, row {row + 1}: found the score {table['score'].iloc[row]!r}, expected a number")
    places = {}
    for name, known in (("query", caption_ids(rows)), ("item", gallery["image"])):
        places[name] = pd.Index(known).get_indexer(table[name])
        _refuse_unknown(f"{path}, {name}", table[name].to_numpy(object), places[name], known)
    found = pd.DataFrame(places | {"score": scores})
    if found.empty:
        raise ConfigError(f"{path} holds no scores")
    if (twice := found.duplicated(["query", "item"])).any():
        row = table[twice].iloc[0]
        raise ConfigError(f"{path}: the pair {row['query']}, {row['item']} is there twice; expected one score for it")
    return found


def scores_only(scores: pd.DataFrame, rows: pd.DataFrame, gallery: pd.DataFrame) -> Evaluation:
    """The evaluation of a system known by its scores alone; pictures without a score share the last place."""
    return Evaluation(rows, gallery, torch.zeros(len(rows), 1), torch.zeros(len(gallery), 1), reranked=scores)


def write_trec(evaluation: Evaluation, prefix: str | Path, tag: str, depth: int = 1000) -> None:
    """Write a TREC run PREFIX.run and its judgements PREFIX.qrels; blanks in ids are percent-encoded.

    Tools that read them break ties by the id; to agree with this package a tie is written with the irrelevant first.

    Args:
        evaluation: of a split.
        prefix: path without its ending.
        tag: name of the system.
        depth: pictures per query, 0 for all.
    """
    rows = evaluation.rows
    ids = [quote(name, safe="/#") for name in caption_ids(rows)]
    items = np.array([quote(name, safe="/#") for name in evaluation.gallery["image"]], object)
    people = evaluation.gallery["identity"].to_numpy()
    with whole_file(f"{prefix}.run") as run, run.open("w", encoding="utf-8") as file:
        for queries, similarity in evaluation.similarities():
            for query, scores in zip(queries, similarity.numpy(), strict=True):
                hit = people == rows["identity"].iloc[query]
                best = np.lexsort((hit, -scores))[: depth or None]
                ranked = enumerate(zip(items[best], _falling(scores[best])), 1)
                file.writelines(f"{ids[query]} Q0 {item} {k} {score:.9g} {quote(tag)}\n" for k, (item, score) in ranked)
    with whole_file(f"{prefix}.qrels") as qrels, qrels.open("w", encoding="utf-8") as file:
        for name, identity in zip(ids, rows["identity"], strict=True):
            file.writelines(f"{name} 0 {item} 1\n" for item in items[people == identity])


def _falling(scores: np.ndarray) -> np.ndarray:
    """Float32 scores [K] in descending order, with ties parted by the smallest steps that float32 has."""
    for place in range(1, len(scores) if (np.diff(scores) >= 0).any() else 0):
        scores[place] = min(scores[place], np.nextafter(scores[place - 1], np.float32(-np.inf)))
    return scores


def read_qrels(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Queries and gallery of TREC judgements, as `read_features` takes them; an identity is what shares its pictures.

    Returns:
        rows (`id`, `identity`, and `image` and `caption` as the fingerprint reads them), and gallery.

    Raises:
        ConfigError: no such file, or two queries share some of their relevant pictures and not all.
    """
    path = Path(path)
    table = _table(path, ["query", "item", "relevance"], ["query", "q0", "item", "relevance"])
    table = table[pd.to_numeric(table["relevance"], errors="coerce") > 0]
    sets = table.groupby("query", sort=True)["item"].agg(lambda items: tuple(sorted(set(items))))
    people = {items: number for number, items in enumerate(sorted(set(sets)))}
    gallery = pd.DataFrame(
        [(item, number) for items, number in people.items() for item in items], columns=["image", "identity"]
    )
    if gallery["image"].duplicated().any() or gallery.empty:
        twice = gallery["image"][gallery["image"].duplicated()].head(1).to_list()
        what = f"{twice[0]} is relevant to queries that do not share all of their pictures" if twice else "it is empty"
        raise ConfigError(f"{path}: {what}; expected the pictures of one person for each query")
    rows = pd.DataFrame({"id": sets.index, "identity": [people[items] for items in sets], "image": "", "caption": ""})
    return rows.assign(caption=rows["id"]), gallery


def _table(path: Path, names: Sequence[str], trec: Sequence[str]) -> pd.DataFrame:
    """A table with the columns `names`, of which all but the last are text; other endings are read as TREC's."""
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if wrong := [number for number, line in enumerate(lines, 1) if len(line) != len(trec)]:
                raise ConfigError(f"{path}, line {wrong[0]}: expected the {len(trec)} columns {' '.join(trec)}")
            table = pd.DataFrame(lines, columns=list(trec), dtype=object)
            table = table.assign(query=table["query"].map(unquote), item=table["item"].map(unquote))
    except ConfigError:
        raise
    except Exception as error:  # pandas lets errors of every kind through
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if lost := [name for name in names if name not in table]:
        raise ConfigError(f"{path} has no column {lost[0]}; found {', '.join(map(str, table))}")
    return table[list(names)].astype(dict.fromkeys(names[:2], str))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.is_dir():
            return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                named = {f"{side}_ids": (file.metadata() or {}).get(f"{side}_ids") for side in SIDES}
            halves = (torch.bfloat16, torch.float16)
            arrays = {name: (a.float() if a.dtype in halves else a).numpy() for name, a in arrays.items()}
            return arrays | {name: np.array(json.loads(ids)) for name, ids in named.items() if ids}
        if path.suffix == ".parquet":
            return _of_parquet(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file}
    except ConfigError:
        raise
    except Exception as error:  # readers fail on damaged files with nearly any exception type
        pickled = "it holds pickled objects, which could run code; save ids as np.array(ids, dtype=str)"
        reason = pickled if "pickle" in str(error) or "Python objects" in str(error) else str(error)
        raise ConfigError(f"{path} cannot be read as features ({' '.join(reason.split())})") from error


def _of_parquet(path: Path) -> dict[str, np.ndarray]:
    table = pd.read_parquet(path)
    if not {"of", "id"} < set(table):
        raise ConfigError(f"{path} has the columns {', '.join(map(str, table))}; expected `of`, `id` and features")
    arrays = {}
    for side in SIDES:
        part = table[table["of"] == side]
        arrays[f"{side}_ids"] = part["id"].to_numpy()
        for name in table.columns.drop(["of", "id"]):
            branch = "" if len(table.columns) == 3 else f".{name}"
            arrays[f"{side}{branch}"] = np.stack(part[name].to_list()) if len(part) else np.empty((0, 0))
    return arrays


def _features(where: str, features: np.ndarray | None, count: int) -> np.ndarray:
    if features is None:
        raise ConfigError(f"{where} is missing")
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not features.shape[1]:
        shape = f"{features.dtype} of shape {features.shape}"
        raise ConfigError(f"{where}: found {shape}, expected numbers [items, dimensions]")
    if len(features) != count:
        raise ConfigError(f"{where}: found {len(features):,} rows for {count:,} ids")
    features = np.asarray(features, np.float64)
    good = np.isfinite(features).all(axis=1) & features.any(axis=1)
    if not good.all():
        row = int(good.argmin())
        what = "only zeros" if np.isfinite(features[row]).all() else "a number that is not finite"
        raise ConfigError(f"{where}: {what} in {(~good).sum():,} of {count:,} rows, first in row {row}; repair them")
    return np.ldexp(features, -np.frexp(np.abs(features).max(axis=1, keepdims=True))[1])  # so that no length overflows


def _places(where: str, ids: np.ndarray, known: pd.Series) -> np.ndarray:
    """Position in the split of each row of a file, which must have every item once."""
    if ids.ndim != 1:
        raise ConfigError(f"{where}: found shape {ids.shape}, expected one id per row")
    names = ids.astype(str) if ids.dtype.kind == "S" else ids
    if ids.dtype.kind not in "iuSUO" or (ids.dtype.kind == "O" and {*map(type, ids)} - {str}):
        raise ConfigError(f"{where}: found {ids.dtype}, expected names as text, or positions as whole numbers")
    if ids.dtype.kind in "iu":
        places = np.where((ids >= 0) & (ids < len(known)), ids, -1).astype(np.int64)
    else:
        places = pd.Index(known).get_indexer(names.astype(object))
    _refuse_unknown(where, names, places, known)
    counts = np.bincount(places, minlength=len(known))
    if (counts > 1).any():
        raise ConfigError(f"{where}: {known.iloc[int(counts.argmax())]} is there {counts.max()} times; expected once")
    if lost := list(known[counts == 0]):
        of = "queries" if where.endswith("query_ids") else "pictures, without which queries have no positive"
        raise ConfigError(f"{where} lacks {len(lost):,} of the split's {len(known):,} {of}: {_few(lost)}")
    return places


def _refuse_unknown(where: str, ids: np.ndarray, places: np.ndarray, known: pd.Series) -> None:
    if (unknown := places < 0).any():
        first = ids[unknown][0]
        hint = nearest(first, known.head(10_000)) or f"the split's are like {known.iloc[0]}"
        found = f"{unknown.sum():,} of {len(ids):,} ids are unknown in this split, first {first}"
        raise ConfigError(f"{where}: {found}; {hint}".strip())


def _few(names: Sequence) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (" and more" if len(names) > _SHOWN else "")
