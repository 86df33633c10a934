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
from fmfa.files import content_checksum, read_json, write_json

RECORD, RECIPE, TRUTH = "dataset.json", "recipe.json", "truth"


def is_simpedes(root: str | Path) -> bool:
    """Say whether a folder holds a SimPEDES data set; a damaged or unfinished one has two of its three marks left."""
    root = Path(root)
    return (root / RECORD).is_file() + (root / RECIPE).is_file() + (root / TRUTH).is_dir() > 1


class Truth:
    """What a SimPEDES data set knows: its record, and of each split people, pictures, phrases and part maps.

    Attributes:
        record: `dataset.json`: the recipe, the counts, the ceiling of validation and test, checksums of the files.
    """

    def __init__(self, root: str | Path) -> None:
        """The truth of the data set in `root`; AnnotationError if it is no SimPEDES, or its record is damaged."""
        self.root = Path(root)
        if not is_simpedes(root):
            raise AnnotationError(
                f"{root} holds no ground truth: only SimPEDES has it (python -m fmfa.simpedes --help)"
            )
        self.record = read_object(self.root, RECORD)
        if self.record.pop("checksum", None) != content_checksum(self.record):
            raise _damaged(self.root, f"{self.root / RECORD} is not as this version wrote it")
        self._records: dict[str, list[dict[str, Any]]] = {}

    def check(self) -> None:
        """Read all of the truth; AnnotationError if the recipe or a file is missing or not as it was written."""
        for name in self.record["files"]:
            self._read(name)

    def records(self, split: str) -> list[dict[str, Any]]:
        """The truth records of a split, one per picture; the keys are those of `generate.pictures`.

        Raises:
            AnnotationError: there is no truth of this split, or a damaged one.
        """
        if split not in self._records:
            self._records[split] = [r for shard in self._shards(split) for r in parse_shard(self._read(shard))]
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
        table = pd.DataFrame(self.records(split)).rename(columns={"id": "identity", "file_path": "image"})
        return table.set_index("image")

    def phrases(self, split: str) -> pd.DataFrame:
        """One row per phrase, in the order of the data set.

        Columns: image, identity, caption; text, part ("person" for the whole), told (attribute -> values that the words
        allow), mistakes (attribute -> true value), start and end (characters of the caption).
        """
        rows = [
            {"image": record["file_path"], "identity": record["id"], "caption": caption["text"], **phrase}
            for record in self.records(split)
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
        phrases = {
            (record["file_path"], caption["text"]): caption["phrases"]
            for record in reversed(self.records(split))
            for caption in reversed(record["captions"])
        }
        keys = list(zip(rows["image"], rows["caption"], strict=True))
        if unknown := next((key for key in keys if key not in phrases), None):
            raise AnnotationError(
                f"{self.root}: the truth of {split} lacks the caption {unknown[1]!r} of {unknown[0]}; take every "
                "caption with its own picture, as SimPEDES wrote it"
            )
        return [phrases[key] for key in keys]

    def parts(self, split: str) -> dict[str, np.ndarray]:
        """Part maps by image: uint8 [H, W], positions in `canvas.PARTS`."""
        maps: dict[str, np.ndarray] = {}
        for shard in self._shards(split):
            paths = [record["file_path"] for record in parse_shard(self._read(shard))]
            with np.load(io.BytesIO(self._read(shard.replace(".jsonl", ".npz")))) as arrays:
                maps.update(zip(paths, arrays["parts"], strict=True))
        return maps

    def _shards(self, split: str) -> list[str]:
        start, end = f"{TRUTH}/{split}-", ".jsonl"
        shards = [name for name in self.record["files"] if name.startswith(start) and name.endswith(end)]
        if not shards:
            raise AnnotationError(f"{self.root} holds no ground truth for split {split!r}: expected {start}*{end}")
        return shards

    def _read(self, name: str) -> bytes:
        file = self.root / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _damaged(self.root, f"{file} cannot be read ({error.strerror})") from None
        if hashlib.sha256(content).hexdigest() != self.record["files"][name]:
            raise _damaged(self.root, f"{file} is not as it was written")
        return content


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
    sums = {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    record = record | {"files": sums}
    write_json(root / RECORD, record | {"checksum": content_checksum(record)})


def read_object(root: str | Path, name: str) -> dict:
    """Return the JSON object in a file of a data set; raises AnnotationError if there is none."""
    try:
        return read_json(Path(root) / name, AnnotationError)
    except AnnotationError as error:
        raise _damaged(root, error) from None


def parse_shard(content: bytes) -> Iterator[dict]:
    """Yield the truth records of a `.jsonl` file."""
    yield from map(json.loads, content.splitlines())


def _damaged(root: str | Path, fault: object) -> AnnotationError:
    return AnnotationError(
        f"{fault}: the SimPEDES in {root} is damaged or unfinished; delete this folder and make it again "
        "(python -m fmfa.simpedes --help)"
    )
