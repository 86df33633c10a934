"""Write SimPEDES to disk in CUHK-PEDES layout, with its ground truth beside it.

    ROOT/imgs/...            the pictures (PNG)
    ROOT/reid_raw.json       annotations, exactly as CUHK-PEDES distributes them; written last
    ROOT/truth/SHARD.jsonl   one line a picture: attributes, camera, view, visibility, phrases, mistakes
    ROOT/truth/SHARD.npz     part maps of the shard's pictures, uint8 [n, H, W], in the same order
    ROOT/dataset.json        the recipe, counts and the ceiling of validation and test

A shard is finished when its .jsonl stands under its final name, and the data set when `dataset.json` does: a killed
run leaves nothing that looks whole, and the next one goes on where it stopped.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from ..errors import ConfigError
from ..files import write_json
from ..progress import progress_bar
from .camera import BASE_SIZE, CAMERAS, SEASONS, render
from .captions import STYLES, describe
from .ceiling import ceiling
from .people import population

VERSION = 1
DOMAINS = tuple(CAMERAS)
SPLITS = ("train", "val", "test")
SCALES = {
    "tiny": (24, 12, 24),
    "small": (700, 100, 200),
    "standard": (2500, 300, 1000),
    "large": (2500, 300, 5000),
}
_SHARD = 240  # identities; a multiple of every family size from 1 to 6, so that families stay whole


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a SimPEDES data set, byte for byte."""

    domain: str = "street"  # street or station
    seed: int = 0
    train: int = 700  # identities
    val: int = 100
    test: int = 200
    images: int = 4  # pictures an identity, each by another camera where there are enough
    captions: int = 2  # annotators a picture
    family: int = 2  # identities that differ in one or two attributes
    height: int = BASE_SIZE[0]  # pixels
    width: int = BASE_SIZE[1]
    version: int = VERSION

    def __post_init__(self):
        """Check the ranges; raises ConfigError."""
        if self.domain not in DOMAINS:
            raise ConfigError(f"SimPEDES has no domain {self.domain!r}; expected one of {', '.join(DOMAINS)}.")
        if not 1 <= self.family <= 6:
            raise ConfigError(f"family is {self.family}; expected 1 to 6 identities a family.")
        if min(self.images, self.captions, self.height, self.width) < 1 or min(self.train, self.val, self.test) < 0:
            raise ConfigError(f"Counts and sizes must be positive: {asdict(self)}.")


def recipe(scale: str = "small", domain: str = "street", seed: int = 0, **changes) -> Recipe:
    """Return the recipe of a named scale: tiny, small, standard or large. Raises ConfigError for another name."""
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
    """Write a data set under `root` and return `root`; does nothing if it stands there already.

    Args:
        root: the folder; one recipe a folder.
        recipe: what to write.
        workers: processes; 0 means one a core. The bytes do not depend on it.
        progress: show a progress bar.

    Raises:
        ConfigError: `root` holds a data set of another recipe.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):  # two notebooks may ask for the same data set at once
        _refuse_other_recipe(root, recipe)
        if not (root / "dataset.json").exists():
            _generate(root, recipe, workers, progress)
    return root


def _refuse_other_recipe(root: Path, recipe: Recipe) -> None:
    if not (root / "recipe.json").exists():
        return
    found = json.loads((root / "recipe.json").read_text())
    if found != asdict(recipe):
        differing = {k: (found.get(k), v) for k, v in asdict(recipe).items() if found.get(k) != v}
        raise ConfigError(
            f"{root} holds a SimPEDES of another recipe: {differing} (found, asked for). "
            f"Choose another folder, or delete this one."
        )


def _generate(root: Path, recipe: Recipe, workers: int, progress: bool) -> None:
    (root / "truth").mkdir(parents=True, exist_ok=True)
    write_json(root / "recipe.json", asdict(recipe))
    started = time.time()
    shards = [
        (split, first, min(_SHARD, getattr(recipe, split) - first))
        for split in SPLITS
        for first in range(0, getattr(recipe, split), _SHARD)
    ]
    jobs = [(root, recipe, *shard) for shard in shards]
    total = sum(count for _, _, count in shards) * recipe.images
    with progress_bar(total, f"SimPEDES {recipe.domain}", "pictures", shown=progress) as bar:
        workers = min(workers or os.cpu_count() or 1, len(jobs))
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                for written in pool.map(_write_shard, jobs):
                    bar.update(written)
        else:
            for job in jobs:
                bar.update(_write_shard(job))
    _write_annotations(root, shards)
    ceilings = {s: ceiling(root, s) for s in ("val", "test") if getattr(recipe, s)}
    counts = {s: {"identities": getattr(recipe, s), "images": getattr(recipe, s) * recipe.images} for s in SPLITS}
    write_json(
        root / "dataset.json",
        {
            "recipe": asdict(recipe),
            "counts": counts,
            "ceiling": ceilings,
            "seconds": round(time.time() - started, 1),
        },
    )


def shard_name(split: str, first: int) -> str:
    """Return the name under `truth/` of the shard that begins at identity `first` of a split."""
    return f"{split}-{first // _SHARD:04d}"


def _write_shard(job) -> int:
    root, recipe, split, first, count = job
    final = root / "truth" / f"{shard_name(split, first)}.jsonl"
    if final.exists():
        return count * recipe.images
    folder = root / "imgs" / split / f"{first // _SHARD:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records, maps = [], []
    for record, image, parts in pictures(recipe, split, first, count):
        Image.fromarray(image).save(root / "imgs" / record["file_path"], compress_level=1)
        records.append(json.dumps(record, separators=(",", ":")))
        maps.append(parts)
    with open(final.with_suffix(".npz.part"), "wb") as file:
        np.savez_compressed(file, parts=np.stack(maps))
    os.replace(final.with_suffix(".npz.part"), final.with_suffix(".npz"))
    final.with_suffix(".part").write_text("\n".join(records) + "\n", encoding="utf-8")
    os.replace(final.with_suffix(".part"), final)
    return len(records)


def _write_annotations(root: Path, shards) -> None:
    """Write `reid_raw.json` record by record, so that memory does not grow with the data set."""
    temporary = root / "reid_raw.json.part"
    with open(temporary, "w", encoding="utf-8") as out:
        separator = "[\n"
        for split, first, _ in shards:
            with open(root / "truth" / f"{shard_name(split, first)}.jsonl", encoding="utf-8") as lines:
                for line in lines:
                    truth = json.loads(line)
                    captions = [caption["text"] for caption in truth["captions"]]
                    tokens = [c.lower().replace(",", " ").replace(".", " ").split() for c in captions]
                    record = {"split": truth["split"], "captions": captions, "file_path": truth["file_path"],
                              "processed_tokens": tokens, "id": truth["id"]}  # fmt: skip
                    out.write(separator + json.dumps(record))
                    separator = ",\n"
        out.write("\n]\n")
    os.replace(temporary, root / "reid_raw.json")
