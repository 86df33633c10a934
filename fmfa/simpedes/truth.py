"""The ground truth of a SimPEDES data set; a file that is not as it was written is refused."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmfa.errors import AnnotationError
from fmfa.files import read_json, write_json

RECORD, RECIPE, TRUTH = "dataset.json", "recipe.json", "truth"


def is_simpedes(root: str | Path) -> bool:
    """Say whether a folder holds a SimPEDES data set; a damaged or unfinished one has two of its three marks left."""
    root = Path(root)
    return (root / RECORD).is_file() + (root / RECIPE).is_file() + (root / TRUTH).is_dir() > 1


class Truth:
    """What a SimPEDES data set knows: its record, and of each split people, pictures, phrases and part maps.

    Attributes:
        record: `dataset.json`, see `read_dataset_record`.
    """

    def __init__(self, root: str | Path) -> None:
        """The truth of the data set in `root`; AnnotationError if it is no SimPEDES, or damaged."""
        self.root, self.record = Path(root), read_dataset_record(root)
        self._records: dict[str, list[dict[str, Any]]] = {}

    def _read(self, split: str) -> list[dict[str, Any]]:
        if split not in self._records:
            self._records[split] = list(read_truth(self.root, split))
        return self._records[split]

    def ceiling(self, split: str) -> dict[str, float] | None:
        """The best that any reader could do on a split, see `fmfa.simpedes.ceiling`; None for train."""
        return self.record["ceiling"].get(split)

    def people(self, split: str) -> pd.DataFrame:
        """One row per identity (the index): its `family`, and every attribute."""
        pictures = self.pictures(split).drop_duplicates("identity").set_index("identity")
        return pd.DataFrame(list(pictures["attributes"]), pictures.index).assign(family=pictures["family"])

    def pictures(self, split: str) -> pd.DataFrame:
        """One row per picture (index `image`): `identity`, and what else its truth record holds."""
        table = pd.DataFrame(self._read(split)).rename(columns={"id": "identity", "file_path": "image"})
        return table.set_index("image")

    def phrases(self, split: str) -> pd.DataFrame:
        """One row per phrase, in the order of the data set.

        Columns: image, identity, caption; text, part ("person" for the whole), told (attribute -> values that the words
        allow), mistakes (attribute -> true value), start and end (characters of the caption).
        """
        rows = [
            {"image": record["file_path"], "identity": record["id"], "caption": caption["text"], **phrase}
            for record in self._read(split)
            for caption in record["captions"]
            for phrase in caption["phrases"]
        ]
        return pd.DataFrame(rows)

    def of_captions(self, split: str, rows: pd.DataFrame) -> list[list[dict[str, Any]]]:
        """The phrases of the caption of each row, as the lines of `phrases`.

        Args:
            split: that the rows are of.
            rows: with the columns image and caption.

        Raises:
            AnnotationError: a caption that the truth does not have.
        """
        known = {
            (record["file_path"], caption["text"]): caption["phrases"]
            for record in reversed(self._read(split))
            for caption in reversed(record["captions"])
        }
        wanted = list(zip(rows["image"], rows["caption"], strict=True))
        if unknown := next((key for key in wanted if key not in known), None):
            raise AnnotationError(
                f"{self.root}: the truth of {split} lacks the caption {unknown[1]!r} of {unknown[0]}; take every "
                "caption with its own picture, as SimPEDES wrote it"
            )
        return [known[key] for key in wanted]

    def parts(self, split: str) -> dict[str, np.ndarray]:
        """Part maps by image: uint8 [H, W], positions in `canvas.PARTS`."""
        return read_parts(self.root, split)


def told_truly(phrases: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """What the phrases of a caption truly say: attribute -> values that the words allow, mistakes set aside."""
    told: dict[str, tuple[str, ...]] = {}
    for phrase in phrases:
        for name, values in phrase["told"].items():
            if name not in phrase["mistakes"]:
                told[name] = tuple(v for v in told[name] if v in values) if name in told else tuple(values)
    return told


def write_dataset_record(root: Path, record: dict, files: Iterable[Path]) -> None:
    """Write `dataset.json`, which finishes a data set: `record` with checksums of itself and of `files`."""
    checksums = {file.relative_to(root).as_posix(): _checksum(file.read_bytes()) for file in files}
    record = record | {"files": checksums}
    write_json(root / RECORD, record | {"checksum": _record_checksum(record)})


def read_dataset_record(root: str | Path) -> dict:
    """Return `dataset.json`: the recipe, the counts, the ceiling of validation and test, checksums of recipe and truth.

    Raises:
        AnnotationError: `root` is no SimPEDES, or its `dataset.json` is missing or damaged.
    """
    root = Path(root)
    if not is_simpedes(root):
        raise AnnotationError(f"{root} holds no ground truth: only SimPEDES has it (python -m fmfa.simpedes --help)")
    record = read_object(root, RECORD)
    if record.pop("checksum", None) != _record_checksum(record):
        raise _damaged(root, f"{root / RECORD} is not as this version wrote it")
    return record


def check_files(root: str | Path) -> dict:
    """Return `dataset.json` of a data set whose recipe and truth are as they were written.

    Raises:
        AnnotationError: one is missing or damaged.
    """
    record = read_dataset_record(root)
    for name in record["files"]:
        _read_file(root, name, record["files"])
    return record


def read_truth(root: str | Path, split: str) -> Iterator[dict]:
    """Yield the truth records of a split, one a picture; the keys are those of `generate.pictures`.

    Raises:
        AnnotationError: `root` holds no truth of this split, or a damaged one.
    """
    files = read_dataset_record(root)["files"]
    for shard in _shards(root, split, files):
        yield from parse_shard(_read_file(root, shard, files))


def read_parts(root: str | Path, split: str) -> dict[str, np.ndarray]:
    """Return the part maps of a split by file path: uint8 [H, W], positions in `canvas.PARTS`.

    Raises:
        AnnotationError: see `read_truth`.
    """
    files = read_dataset_record(root)["files"]
    maps: dict[str, np.ndarray] = {}
    for shard in _shards(root, split, files):
        paths = [record["file_path"] for record in parse_shard(_read_file(root, shard, files))]
        with np.load(io.BytesIO(_read_file(root, shard.replace(".jsonl", ".npz"), files))) as arrays:
            maps.update(zip(paths, arrays["parts"], strict=True))
    return maps


def read_object(root: str | Path, name: str) -> dict:
    """Return the JSON object in a file of a data set; raises AnnotationError if there is none."""
    try:
        return read_json(Path(root) / name, AnnotationError)
    except AnnotationError as error:
        raise _damaged(root, error) from None


def parse_shard(content: bytes) -> Iterator[dict]:
    """Yield the truth records of a `.jsonl` file."""
    yield from map(json.loads, content.splitlines())


def _shards(root: str | Path, split: str, files: dict[str, str]) -> list[str]:
    shards = [name for name in files if name.startswith(f"{TRUTH}/{split}-") and name.endswith(".jsonl")]
    if not shards:
        raise AnnotationError(f"{root} holds no ground truth for split {split!r}: expected {TRUTH}/{split}-*.jsonl")
    return shards


def _read_file(root: str | Path, name: str, checksums: dict[str, str]) -> bytes:
    file = Path(root) / name
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _damaged(root, f"{file} cannot be read ({error.strerror})") from None
    if _checksum(content) != checksums[name]:
        raise _damaged(root, f"{file} is not as it was written")
    return content


def _record_checksum(record: dict) -> str:
    return _checksum(json.dumps(record, sort_keys=True).encode())


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(root: str | Path, found: object) -> AnnotationError:
    return AnnotationError(
        f"{found}: the SimPEDES in {root} is damaged or unfinished; delete this folder and make it again "
        "(python -m fmfa.simpedes --help)"
    )
