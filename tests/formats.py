"""Small data sets in the formats that the owners distribute, written to disk for tests and notebooks."""

import json
import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fmfa.text.wordpiece import SPECIAL

SPLITS = ("train", "val", "test")
WORDS = (
    ("red", "green", "blue", "black", "white", "grey", "brown", "pink"),
    ("coat", "jacket", "shirt", "dress", "hoodie", "sweater", "vest", "blouse"),
    ("backpack", "handbag", "umbrella", "phone", "suitcase", "bottle", "newspaper", "cap"),
)

CAPTIONS = ("A red coat.", "blue-jeans, new!", "a man with a bag", "...", "white shoes", "a hat", "striped top")


def write_pair_list(folder: Path) -> None:
    """`pairs.json` with a noise picture for each of CAPTIONS, of which one has no word."""
    rng = np.random.default_rng(0)
    for number in range(len(CAPTIONS)):
        Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    records = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "pairs.json").write_text(json.dumps(records))


def write_wordpiece(captions: Sequence[str], path: Path) -> None:
    """An uncased `vocab.txt`: the special tokens, every letter alone and inside a word, and every word."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(captions).lower())))
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")


def write_cuhk(
    folder: Path,
    identities: Sequence[int] = (6, 2, 2),
    images_each: int = 2,
    captions_each: int = 2,
    file_name: str = "reid_raw.json",
    **options,
) -> Path:
    """CUHK-PEDES as published: a list of records, ids from 1, captions with their tokens."""
    records = people(folder, identities, images_each, captions_each, **options)
    return dump(folder / file_name, records)


def write_icfg(
    folder: Path,
    identities: Sequence[int] = (6, 2),
    images_each: int = 2,
    file_name: str = "ICFG-PEDES.json",
    **options,
) -> Path:
    """ICFG-PEDES as published: train and test only, one caption per image, ids from 0."""
    train, test = identities
    records = people(folder, (train, 0, test), images_each, 1, first_id=0, suffix=".jpg", **options)
    return dump(folder / file_name, records)


def write_rstp(
    folder: Path,
    identities: Sequence[int] = (6, 2, 2),
    images_each: int = 5,
    captions_each: int = 2,
    file_name: str = "data_captions.json",
    **options,
) -> Path:
    """RSTPReid as published: `img_path`, ids from 0, one flat image folder, no tokens."""
    options = {"first_id": 0, "suffix": ".jpg", "subfolders": False, **options}
    records = people(folder, identities, images_each, captions_each, **options)
    for record in records:
        record["img_path"] = record.pop("file_path")
        del record["processed_tokens"]
    return dump(folder / file_name, records)


def write_cuhk_processed(folder: Path, file_name: str = "cuhk_pedes_att.json", **options) -> Path:
    """CUHK-PEDES as processed for IVT: split -> rows of one caption (a string), with attribute phrases."""
    rows = _one_caption_rows(write_cuhk(folder, **options))
    for row in rows:
        row["processed_tokens"] = row["captions"].split()
        row["att"] = {"upper": "a coat"} if row["id"] % 2 else {}
    return dump(folder / file_name, _by_split(rows))


def write_icfg_processed(folder: Path, file_name: str = "ICFG_PEDES_VISTXT.json", **options) -> Path:
    """ICFG-PEDES as processed for IVT: split -> records with lists, and `query` and `gallery` beside."""
    raw = write_icfg(folder, **options)
    parts = _by_split(json.loads(raw.read_text()))
    raw.unlink()
    del parts["val"]
    return dump(folder / file_name, {**parts, "query": parts["test"], "gallery": parts["test"]})


def write_rstp_processed(folder: Path, file_name: str = "rstpreid_vistxt.json", **options) -> Path:
    """RSTPReid as processed for IVT: split -> rows of one caption (a string), `img_path`."""
    return dump(folder / file_name, _by_split(_one_caption_rows(write_rstp(folder, **options))))


FORMATS = {
    "CUHK-PEDES": write_cuhk,
    "ICFG-PEDES": write_icfg,
    "RSTPReid": write_rstp,
    "CUHK-PEDES processed": write_cuhk_processed,
    "ICFG-PEDES processed": write_icfg_processed,
    "RSTPReid processed": write_rstp_processed,
}


def people(
    folder: Path,
    identities: Sequence[int],
    images_each: int,
    captions_each: int,
    *,
    first_id: int = 1,
    suffix: str = ".png",
    subfolders: bool = True,
    size: tuple[int, int] = (16, 40),
    pictures: bool = True,
    seed: int = 0,
) -> list[dict]:
    """Records in the fields of CUHK-PEDES, and pictures under `imgs` when `pictures`.

    `identities` counts train, val and test; `size` is (width, height). Every caption is unlike the others.
    """
    rng = np.random.default_rng(seed)
    records = []
    splits = np.repeat(SPLITS, identities)
    for identity, split in enumerate(splits, first_id):
        colour = rng.integers(0, 256, 3)
        for k in range(images_each):
            place = f"cam{k}/" if subfolders else ""
            path = f"{place}{identity:05d}_{k}{suffix}"
            captions = [_caption(rng, identity, k, j) for j in range(captions_each)]
            records.append(
                {
                    "split": str(split),
                    "captions": captions,
                    "file_path": path,
                    "processed_tokens": [caption.rstrip(".").split() for caption in captions],
                    "id": identity,
                }
            )
            if pictures:
                _paint(folder / "imgs" / path, colour, rng, size)
    return records


def dump(file: Path, content) -> Path:
    """Write JSON, making the folder; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def copy_with(file: Path, target: Path, change) -> Path:
    """Copy a data set to the folder `target` with its parsed annotations passed through `change`."""
    shutil.copytree(file.parent / "imgs", target / "imgs")
    return dump(target / file.name, change(json.loads(file.read_text())))


def _caption(rng: np.random.Generator, identity: int, image: int, turn: int) -> str:
    colour, garment, carried = (words[i] for words, i in zip(WORDS, rng.integers(0, 8, 3)))
    return (
        f"Person {identity} wears a {colour} {garment}, walks with a {carried}, and was seen "
        f"by annotator {turn} in view {image}."
    )


def _paint(file: Path, colour: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.clip(colour + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def _one_caption_rows(raw: Path) -> list[dict]:
    records = json.loads(raw.read_text())
    raw.unlink()
    return [{**record, "captions": caption} for record in records for caption in record["captions"]]


def _by_split(records: list[dict]) -> dict[str, list[dict]]:
    return {
        split: [
            {key: value for key, value in record.items() if key != "split"}
            for record in records
            if record["split"] == split
        ]
        for split in SPLITS
    }


def png_header(width, height):
    """A PNG that stops after its header and a little data: what a decompression bomb looks like."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
