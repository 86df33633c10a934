"""Write SimPEDES to disk in CUHK-PEDES layout, with its ground truth beside it.

    ROOT/imgs/...            the pictures (PNG)
    ROOT/reid_raw.json       annotations, exactly as CUHK-PEDES distributes them
    ROOT/truth/SHARD.jsonl   one line per picture: attributes, camera, view, visibility, phrases, mistakes
    ROOT/truth/SHARD.npz     part maps of the shard's pictures, uint8 [n, H, W], in the same order
    ROOT/recipe.json         the recipe; written first
    ROOT/dataset.json        the recipe, counts, the ceiling of validation and test, and checksums of recipe and truth

A shard is finished when its .jsonl has its final name, and the data set when `dataset.json` has: a killed run leaves
nothing that looks whole, and the next one goes on where it stopped.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from PIL import Image

from fmfa.errors import ConfigError, checked, setting
from fmfa.files import said_plainly, whole_file, write_json
from fmfa.processes import end_with
from fmfa.progress import progress_bar
from fmfa.simpedes.camera import BASE_SIZE, CAMERAS, SEASONS, render
from fmfa.simpedes.captions import STYLES, describe
from fmfa.simpedes.ceiling import ceiling
from fmfa.simpedes.people import population
from fmfa.simpedes.truth import RECIPE, RECORD, TRUTH, Truth, parse_shard, read_object, write_dataset_record

VERSION = 1
DOMAINS = tuple(CAMERAS)
SPLITS = ("train", "val", "test")
SCALES = {
    "tiny": (24, 12, 24),
    "small": (700, 100, 200),
    "standard": (2500, 300, 1000),
    "large": (2500, 300, 5000),
    "wide": (2500, 1000, 1000),
}
_SHARD = 240  # identities; a multiple of every family size from 1 to 6, so that families stay whole


@checked
class Recipe:
    """Everything that determines a SimPEDES data set, byte for byte.

    Raises:
        ConfigError: a value outside its range.
    """

    domain: Literal["street", "station", "night"] = setting("street", "where people are photographed")
    seed: int = setting(0, "of everything that is drawn", ge=0)
    train: int = setting(700, "identities", ge=0)
    val: int = setting(100, "identities", ge=0)
    test: int = setting(200, "identities", ge=0)
    images: int = setting(4, "pictures per identity, each by another camera if there are enough", ge=1)
    captions: int = setting(2, "annotators per picture", ge=1)
    family: int = setting(2, "identities that differ in one or two attributes", ge=1, le=6)
    height: int = setting(BASE_SIZE[0], "pixels", ge=1)
    width: int = setting(BASE_SIZE[1], "pixels", ge=1)
    version: int = setting(VERSION, "of the renderer")


def recipe(scale: str = "small", domain: str = "street", seed: int = 0, **changes: Any) -> Recipe:
    """Return the recipe of a named scale: tiny, small, standard, large or wide. Raises ConfigError for another name."""
    if scale not in SCALES:
        raise ConfigError(f"SimPEDES has no scale {scale!r}; expected one of {', '.join(SCALES)}.")
    return Recipe(**{**dict(zip(SPLITS, SCALES[scale])), "domain": domain, "seed": seed, **changes})


def pictures(recipe: Recipe, split: str, first: int, count: int) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Yield (truth record, image, part map) for identities `first` to `first + count` of a split.

    The record holds identity and file path as in `reid_raw.json`, the family, the attribute vector, camera, view,
    render seed, occluder, visible fraction of each part, and for each caption its text and phrases (character span,
    part, what the words allow, mistakes). `first` must be a multiple of the family size.
    """
    domain, where = DOMAINS.index(recipe.domain), SPLITS.index(split)
    cameras, style, season = CAMERAS[recipe.domain], STYLES[recipe.domain], SEASONS[recipe.domain]
    offset = sum((recipe.train, recipe.val)[:where]) + 1  # CUHK-PEDES numbers identities from 1, over all splits
    stream = [recipe.seed, domain, where]
    for index, family, person in population(stream, count, recipe.family, season, first):
        order = np.random.default_rng([*stream, 2, index]).permutation(len(cameras))
        for k in range(recipe.images):
            camera = cameras[order[k % len(cameras)]]
            seed = [*stream, 3, index, k]
            picture = render(person, camera, seed, (recipe.height, recipe.width))
            captions = [describe(person, picture, style, [*stream, 4, index, k, a]) for a in range(recipe.captions)]
            record = {
                "id": index + offset,
                "file_path": f"{split}/{index // _SHARD:04d}/{index + offset:06d}_{camera.name}_{k}.png",
                "split": split,
                "family": f"{split}-{family}",
                "attributes": person.to_dict(),
                "camera": camera.name,
                "seed": seed,
                "view": dict(vars(picture.view)),
                "occluder": picture.occluder,
                "visible": picture.visible,
                "captions": [{"text": c.text, "phrases": [dict(vars(p)) for p in c.phrases]} for c in captions],
            }
            yield record, picture.image, picture.parts


def generate(root: str | Path, recipe: Recipe, workers: int = 0, progress: bool = True) -> Path:
    """Write a data set under `root` and return `root`; a finished one is checked and left as it is.

    Args:
        root: the folder; one recipe per folder.
        recipe: what to write.
        workers: processes; 0 means one a core. The bytes do not depend on it.
        progress: show a progress bar.

    Raises:
        ConfigError: `root` holds a data set of another recipe or cannot be written to, or a worker process died.
        AnnotationError: a file of the data set is damaged or missing.
    """
    root = Path(root)
    with said_plainly(f"SimPEDES cannot be written to {root}; started again, it goes on where it stopped"):
        if _is_finished(root, recipe):  # without the lock, so that it may lie where nothing can be written
            return root
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):  # two notebooks may ask for the same data set at once
            if not _is_finished(root, recipe):
                _generate(root, recipe, workers, progress)
    return root


def _is_finished(root: Path, recipe: Recipe) -> bool:
    """Whether the data set is there, undamaged; False for one that is not there or was only begun."""
    finished = (root / RECORD).exists()
    if finished:
        truth = Truth(root)
        truth.check()
        contents = truth.record["recipe"]
    elif (root / RECIPE).exists() or (root / TRUTH).exists():
        contents = read_object(root, RECIPE)
    else:
        return False
    if contents != asdict(recipe):
        differing = {k: (contents.get(k), v) for k, v in asdict(recipe).items() if contents.get(k) != v}
        raise ConfigError(
            f"{root} holds a SimPEDES of another recipe: {differing} (found, asked for). "
            f"Choose another folder, or delete this one."
        )
    return finished


def _generate(root: Path, recipe: Recipe, workers: int, progress: bool) -> None:
    write_json(root / RECIPE, asdict(recipe))
    (root / TRUTH).mkdir(exist_ok=True)
    for pattern in (".recipe.*", ".reid_raw.*", ".dataset.*", f"{TRUTH}/.*.npz", f"{TRUTH}/.*.jsonl"):
        for left in root.glob(pattern):  # by a killed run
            left.unlink()
    started = time.time()
    shards = [
        (split, first, min(_SHARD, getattr(recipe, split) - first))
        for split in SPLITS
        for first in range(0, getattr(recipe, split), _SHARD)
    ]
    total = sum(count for _, _, count in shards) * recipe.images
    with progress_bar(total, f"SimPEDES {recipe.domain}", "pictures", shown=progress) as bar:
        for written in _write_shards([(root, recipe, *shard) for shard in shards], workers):
            bar.update(written)
    truth = [_shard_path(root, split, first) for split, first, _ in shards]
    _write_annotations(root, truth)
    record = {
        "recipe": asdict(recipe),
        "counts": {s: {"identities": getattr(recipe, s), "images": getattr(recipe, s) * recipe.images} for s in SPLITS},
        "ceiling": {
            s: ceiling([shard for shard in truth if shard.name.startswith(f"{s}-")])
            for s in ("val", "test")
            if getattr(recipe, s)
        },
        "seconds": round(time.time() - started, 1),
    }
    write_dataset_record(root, record, [root / RECIPE, *truth, *(shard.with_suffix(".npz") for shard in truth)])


def _shard_path(root: Path, split: str, first: int) -> Path:
    """The truth file of the shard that begins at identity `first` of a split."""
    return root / TRUTH / f"{split}-{first // _SHARD:04d}.jsonl"


def _write_shards(jobs: list[tuple[Path, Recipe, str, int, int]], workers: int) -> Iterator[int]:
    """Write shards in processes, which end with this one, and yield the number of pictures of each."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from map(_write_shard, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(_write_shard, jobs)
        except BrokenProcessPool:
            raise ConfigError(
                f"a process that wrote SimPEDES to {jobs[0][0]} died; start again, where it stopped, with fewer "
                "workers or more memory"
            ) from None


def _write_shard(job: tuple[Path, Recipe, str, int, int]) -> int:
    root, recipe, split, first, count = job
    final = _shard_path(root, split, first)
    if _is_whole(final, count * recipe.images):
        return count * recipe.images
    folder = root / "imgs" / split / f"{first // _SHARD:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records, maps = [], []
    for record, image, parts in pictures(recipe, split, first, count):
        Image.fromarray(image).save(root / "imgs" / record["file_path"], compress_level=1)
        records.append(json.dumps(record, separators=(",", ":")))
        maps.append(parts)
    with whole_file(final.with_suffix(".npz")) as temporary:
        np.savez_compressed(temporary, parts=np.stack(maps))
    with whole_file(final) as temporary:
        temporary.write_text("\n".join(records) + "\n", encoding="utf-8")
    return len(records)


def _is_whole(shard: Path, count: int) -> bool:
    """Whether an earlier run has written a shard of `count` pictures."""
    if not shard.exists():
        return False
    try:
        records = [_annotation(record) for record in parse_shard(shard.read_bytes())]
        with np.load(shard.with_suffix(".npz")) as arrays:
            return len(records) == len(arrays["parts"]) == count
    except Exception:  # whatever is wrong with it, it is written again
        return False


def _write_annotations(root: Path, shards: list[Path]) -> None:
    """Write `reid_raw.json` record by record, so that memory does not grow with the data set."""
    with whole_file(root / "reid_raw.json") as temporary, open(temporary, "w", encoding="utf-8") as out:
        separator = "[\n"
        for shard in shards:
            for record in parse_shard(shard.read_bytes()):
                out.write(separator + json.dumps(_annotation(record)))
                separator = ",\n"
        out.write("\n]\n")


def _annotation(truth: dict) -> dict:
    """The record of CUHK-PEDES' layout for a picture."""
    captions = [caption["text"] for caption in truth["captions"]]
    tokens = [c.lower().replace(",", " ").replace(".", " ").split() for c in captions]
    return {"split": truth["split"], "captions": captions, "file_path": truth["file_path"], "processed_tokens": tokens,
            "id": truth["id"]}  # fmt: skip
