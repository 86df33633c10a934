"""Read the ground truth that lies beside a SimPEDES data set."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import AnnotationError


def is_simpedes(root: str | Path) -> bool:
    """Say whether a folder holds a finished SimPEDES data set."""
    return (Path(root) / "dataset.json").is_file() and (Path(root) / "truth").is_dir()


def read_dataset_record(root: str | Path) -> dict:
    """Return `dataset.json`: the recipe, the counts, and the ceiling of validation and test."""
    return json.loads((Path(root) / "dataset.json").read_text(encoding="utf-8"))


def read_truth(root: str | Path, split: str) -> Iterator[dict]:
    """Yield the truth records of a split, one a picture; the keys are those of `generate.pictures`.

    Raises:
        AnnotationError: `root` holds no truth of this split.
    """
    files = sorted((Path(root) / "truth").glob(f"{split}-*.jsonl"))
    if not files:
        raise AnnotationError(
            f"{root} holds no ground truth for split {split!r}: expected truth/{split}-*.jsonl. "
            f"Only SimPEDES has it; write one with `python -m fmfa.simpedes {root}`."
        )
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def read_parts(root: str | Path, split: str) -> dict[str, np.ndarray]:
    """Return the part maps of a split by file path: uint8 [H, W], positions in `canvas.PARTS`."""
    maps: dict[str, np.ndarray] = {}
    for file in sorted((Path(root) / "truth").glob(f"{split}-*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            paths = [json.loads(line)["file_path"] for line in lines]
        maps.update(zip(paths, _parts_of(str(file.with_suffix(".npz"))), strict=True))
    return maps


@lru_cache(maxsize=8)
def _parts_of(path: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        return file["parts"]
