"""Read the record and the ground truth of a SimPEDES data set; a file that is not as it was written is refused."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fmfa.errors import AnnotationError
from fmfa.files import read_json, write_json

RECORD, RECIPE, TRUTH = "dataset.json", "recipe.json", "truth"


def is_simpedes(root: str | Path) -> bool:
    """Say whether a folder holds a SimPEDES data set; a damaged or unfinished one has two of its three marks left."""
    root = Path(root)
    return (root / RECORD).is_file() + (root / RECIPE).is_file() + (root / TRUTH).is_dir() > 1


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
