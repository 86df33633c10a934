"""The check of a data set's annotations and pictures: `python -m fmfa.data.check ROOT [--name ...]`."""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from fmfa.data.annotations import Dataset, read_dataset
from fmfa.data.images import load_image
from fmfa.errors import FmfaError, ImageError
from fmfa.processes import end_with
from fmfa.progress import progress_bar
from fmfa.simpedes.generate import SPLITS
from fmfa.text.bytepair import Tokenizer, clip_tokenizer, small_tokenizer

OLDER = "RSTPReid, older split"
PUBLISHED = {
    ("CUHK-PEDES", "train"): (11003, 34054, 68126),
    ("CUHK-PEDES", "val"): (1000, 3078, 6158),
    ("CUHK-PEDES", "test"): (1000, 3074, 6156),
    ("ICFG-PEDES", "train"): (3102, 34674, 34674),
    ("ICFG-PEDES", "test"): (1000, 19848, 19848),
    ("RSTPReid", "train"): (3701, 18505, 37010),
    ("RSTPReid", "val"): (200, 1000, 2000),
    ("RSTPReid", "test"): (200, 1000, 2000),
    (OLDER, "train"): (3901, 19505, 39010),
    (OLDER, "val"): (100, 500, 1000),
    (OLDER, "test"): (100, 500, 1000),
}
"""Identities, images, captions by split, as the owners publish them.

CUHK-PEDES: Li et al., CVPR 2017. ICFG-PEDES: Ding et al., arXiv 2107.12666 (one caption per image). RSTPReid:
Zhu et al., ACM MM 2021 (five images per identity, two captions per image); the older split follows likewise.
"""
_CHUNK = 64
_WORTH_PROCESSES = 1000
_SPOKEN = "{:,} identities, {:,} images, {:,} captions"
SEVERITIES = ("fatal", "warning", "note", "ok")
EXAMPLES = 3
Finding = tuple[str, str, int, str]
"""Check, severity, count, detail."""


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What the check found.

    Attributes:
        dataset: the data set's name.
        table: one row per check, the worst first: `check`, `severity` ("fatal", "warning", "note", "ok"),
            `count` (int64, how many things were found) and `detail` (which, with the first few).
    """

    dataset: str
    table: pd.DataFrame

    @property
    def fatal(self) -> bool:
        """Whether training has to refuse this data set."""
        return bool((self.table["severity"] == "fatal").any())

    @property
    def verdict(self) -> str:
        """One plain sentence."""

        def names(severity: str) -> list[str]:
            return self.table["check"][self.table["severity"] == severity].tolist()

        if fatal := names("fatal"):
            return f"{self.dataset} cannot be used for training: {', '.join(fatal)}."
        if warnings := names("warning"):
            return f"{self.dataset} can be used for training; look at the warnings first: {', '.join(warnings)}."
        return f"{self.dataset} can be used for training: no check found a fault."


def check_dataset(
    dataset: Dataset,
    *,
    tokenizer: Tokenizer | None = None,
    decode: bool = True,
    progress: bool = True,
) -> CheckReport:
    """Check pictures, captions, identities and counts of a data set; every check gives a row, passed or not.

    Args:
        dataset: what `read_dataset` returned.
        tokenizer: whose tokens and context decide which captions are cut; None for CLIP's, on SimPEDES the one of the
            tiny CLIP.
        decode: decode every picture in full, and compare them. Without it only the presence of the files is looked
            at, and notes say so.
        progress: show a progress bar.

    Fatal are: a missing image folder, missing or unreadable pictures, empty captions, a picture listed for two people,
    and identities or images shared between train and test. Copies of a picture under other names are found by their
    pixels and are warnings.

    Raises:
        ImageError: a decoding process died.
    """
    usual = small_tokenizer if dataset.name.startswith("SimPEDES") else clip_tokenizer
    findings = [
        *check_pictures(dataset.images, dataset.table, decode, progress),
        *check_captions(dataset.table, tokenizer or usual()),
        *check_identities(dataset.table),
        *check_counts(dataset.name, dataset.table),
        *(("reading", "note", 0, note) for note in dataset.notes),
    ]
    table = pd.DataFrame(findings, columns=["check", "severity", "count", "detail"]).astype({"count": "int64"})
    worst_first = np.argsort(table["severity"].map(SEVERITIES.index), kind="stable")
    return CheckReport(dataset.name, table.iloc[worst_first].reset_index(drop=True))


def main(arguments: list[str] | None = None) -> int:
    """Print table and verdict; returns 0, 1 when something is fatal, 2 when nothing could be checked.

    Raises:
        SystemExit: wrong arguments (status 2), or `--help`.
    """
    parser = argparse.ArgumentParser(prog="python -m fmfa.data.check", description="Check a data set before training.")
    parser.add_argument("root", nargs="?", default="", help="annotation file, or the folder that holds it")
    parser.add_argument("--name", help="CUHK-PEDES, ICFG-PEDES, RSTPReid, SimPEDES, or one's own")
    parser.add_argument("--images", help="image folder (default: imgs beside the annotation file)")
    parser.add_argument("--drop-empty-captions", action="store_true", help="leave captions without a word out")
    options = parser.parse_args(arguments)
    if not options.root.strip():
        parser.error("give the folder of the data set or its annotation file, such as /data/CUHK-PEDES")
    try:
        dataset = read_dataset(
            options.root,
            options.name,
            images=options.images,
            drop_empty_captions=options.drop_empty_captions,
        )
        report = check_dataset(dataset, progress=sys.stderr.isatty())
    except FmfaError as error:
        print(f"The data set cannot be checked: {error}", file=sys.stderr)
        return 2
    for row in report.table.itertuples():
        print(f"{row.severity:8}{row.count:>9,}  {row.check}: {row.detail}")
    print(report.verdict)
    return int(report.fatal)


def check_captions(table: pd.DataFrame, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Yield findings on captions: without a word, cut by the tokenizer's context, shared between identities."""
    empty = ~table["caption"].str.contains(r"\w")
    yield finding(
        "empty captions",
        "fatal",
        _places(table[empty]),
        f"all {len(table):,} captions have words",
        "Write them, or leave them out: -p drop_empty_captions true (the check: --drop-empty-captions)",
    )
    lengths = pd.Series({caption: tokenizer.length(caption) for caption in table["caption"].unique()})
    context = f"the {tokenizer.context_length} positions that the tokenizer has"
    cut = table["caption"].map(lengths) > tokenizer.context_length
    yield finding(
        "captions longer than the context",
        "warning",
        _places(table[cut]),
        f"none needs more than {context}, the longest {lengths.max()}",
        f"They need more than {context}, so their ends are not read; the longest needs {lengths.max()}",
    )
    text = table["caption"].str.strip()
    identities = table[~empty].groupby(text[~empty])["identity"].nunique()
    copied = identities.index[identities > 1]
    yield finding(
        "captions copied onto other identities",
        "warning",
        _places(table[text.isin(copied)]),
        "no text belongs to two identities",
        f"{len(copied):,} different texts; a query that fits two people counts one of them as wrong",
    )


def _places(rows: pd.DataFrame) -> list[str]:
    return [f"{image} (record {record})" for image, record in zip(rows["image"], rows["record"])]


def check_identities(table: pd.DataFrame) -> Iterator[Finding]:
    """Yield findings on identities and images of two splits, and on images of two identities."""
    for things, column, other in (
        ("identities in two splits", "identity", "split"),
        ("images in two splits", "image", "split"),
        ("images named by two identities", "image", "identity"),
    ):
        pairs = table[[column, other]].drop_duplicates()
        several = pairs[pairs[column].duplicated(keep=False)].groupby(column)[other].agg(list)
        severity, advice = "fatal", "List each picture for the one person whom it shows"
        if other == "split":
            leak = any({"train", "test"} <= set(splits) for splits in several)
            severity = "fatal" if leak else "warning"
            advice = "No model may be tested on what it was trained on" if leak else ""
        shown = (f"{thing} ({', '.join(map(str, others))})" for thing, others in several.items())
        yield finding(things, severity, shown, "none", advice)


def check_counts(name: str, table: pd.DataFrame) -> Iterator[Finding]:
    """Yield the counts of each split beside the published ones, and which RSTPReid split this is.

    Held-out validation identities count with train, as published; they have a row of their own as well.
    """
    held_out = table["held_out"] if "held_out" in table else pd.Series(False, index=table.index)
    counts = {split: _counts(part) for split, part in table.groupby(table["split"].mask(held_out, "train"))}
    if name == "RSTPReid":
        people = tuple(counts.get(split, (0,))[0] for split in SPLITS)
        older = people == (3901, 100, 100)
        words = "the older split; results do not compare" if older else "the usual split"
        expected = older or people == (3701, 200, 200)
        words = words if expected else "expected 3701 / 200 / 200 or the older 3901 / 100 / 100"
        shown = " / ".join(map(str, people))
        severity = "note" if expected else "warning"
        yield "RSTPReid split version", severity, int(not expected), f"{shown} identities: {words}"
        name = OLDER if older else name
    for split in SPLITS:
        published = PUBLISHED.get((name, split))
        beside = f"; published are {_SPOKEN.format(*published)}" if published else ""
        if split not in counts:
            if published or not held_out.any():
                yield f"counts of {split}", "warning", 0, f"there is no {split} split{beside}"
            continue
        severity = "ok" if counts[split] == published else "warning" if published else "note"
        beside = {"ok": "; as published", "note": "; no published counts to compare with"}.get(severity, beside)
        yield f"counts of {split}", severity, counts[split][2], _SPOKEN.format(*counts[split]) + beside
    if held_out.any():
        people = _counts(table[held_out])
        detail = f"{_SPOKEN.format(*people)}, held out of train and counted there as well"
        yield "counts of val", "note", people[2], detail


def _counts(part: pd.DataFrame) -> tuple[int, int, int]:
    return part["identity"].nunique(), part["image"].nunique(), len(part)


def check_pictures(folder: Path, table: pd.DataFrame, decode: bool, progress: bool) -> Iterator[Finding]:
    """Yield findings on the pictures of the image folder `folder` that a data set's table names."""
    if not os.path.isdir(folder):
        yield "image folder", "fatal", 1, f"{folder} is not a folder; put the pictures there or give their folder"
        return
    yield "image folder", "ok", 0, str(folder)
    pictures = pd.Series(table["image"].unique())
    folders = pictures.str.rpartition("/")[0]
    there = np.array([os.path.isfile(folder / path) for path in pictures])
    missing = pictures[~there]
    parts = [
        f"{at or 'image folder'}: {len(paths):,} of {(folders == at).sum():,}, such as {', '.join(paths[:EXAMPLES])}"
        for at, paths in missing.groupby(folders[missing.index])
    ]
    detail = "; ".join(parts) or f"all {len(pictures):,} files are there"
    yield "missing pictures", "fatal" if parts else "ok", len(missing), detail
    present = pictures[there].tolist()
    if not decode:
        yield "unreadable pictures", "note", 0, f"{len(present):,} pictures are there but were not decoded"
        yield "identical pictures", "note", 0, "pictures were not decoded, and so not compared with each other"
        return
    decoded = decode_pictures(folder, present, progress)
    faults = decoded["fault"].dropna()
    yield finding("unreadable pictures", "fatal", faults, f"all {len(present):,} decode in full")
    yield from _identical(table, decoded["pixels"].dropna())


def decode_pictures(images: Path, relative: list[str], progress: bool) -> pd.DataFrame:
    """Decode every picture in full, in one process per core if there are a thousand or more.

    Args:
        images: the image folder.
        relative: paths inside it.
        progress: show a bar.

    Returns:
        One row per picture, with the paths as index. `fault`: why it cannot be read, a sentence that begins with its
        path; `pixels`: a hash of its size and RGB pixels. One of the two is None.

    Raises:
        ImageError: a decoding process died.
    """
    workers = 1 if len(relative) < _WORTH_PROCESSES else os.cpu_count() or 1
    chunks = [relative[start : start + _CHUNK] for start in range(0, len(relative), _CHUNK)]
    rows = []
    bound = {"initializer": end_with, "initargs": (os.getpid(),)}
    jobs = Parallel(workers, return_as="generator", **bound)(delayed(_decode)(images, chunk) for chunk in chunks)
    with progress_bar(len(relative), "decoding", "pictures", shown=progress) as bar:
        try:
            for chunk, decoded in zip(chunks, jobs):
                rows += decoded
                bar.update(len(chunk))
        except TerminatedWorkerError:
            raise ImageError(
                f"a process that decoded pictures of {images} died; check again with more memory"
            ) from None
    return pd.DataFrame(rows, index=relative, columns=["fault", "pixels"], dtype=object)


def _decode(images: Path, relative: list[str]) -> list[tuple[str | None, bytes | None]]:
    rows: list[tuple[str | None, bytes | None]] = []
    for path in relative:
        try:
            picture = load_image(images / path)
        except ImageError as error:
            rows.append((str(error).replace(f"{images}{os.sep}", "", 1), None))
        else:
            digest = hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16)
            rows.append((None, digest.digest()))
    return rows


def _identical(table: pd.DataFrame, pixels: pd.Series) -> Iterator[Finding]:
    """Findings on pictures of the same pixels under different names, within and across splits."""
    copies = table.drop_duplicates("image").assign(pixels=table["image"].map(pixels)).dropna(subset="pixels")
    copies = copies[copies["pixels"].duplicated(keep=False)]
    within: list[str] = []
    across: list[str] = []
    for _, rows in copies.groupby("pixels", sort=False):
        several = rows["split"].nunique() > 1
        shown = [f"{row.image} ({row.split}, identity {row.identity})" for row in rows[:EXAMPLES].itertuples()]
        more = [f"{len(rows) - EXAMPLES:,} more"] if len(rows) > EXAMPLES else []
        (across if several else within).append(" = ".join(shown + more))
    advice = "Keep one of each; where the identities differ, one of them is wrong"
    yield finding("identical pictures within a split", "warning", within, "none", advice)
    yield finding("identical pictures in two splits", "warning", across, "none", advice)


def finding(check: str, severity: str, faults: Iterable[str], fine: str, advice: str = "") -> Finding:
    """A row that counts the faults and names the first few, or says `fine` when there is none."""
    faults = list(faults)
    if not faults:
        return check, "ok", 0, fine
    more = f" and {len(faults) - EXAMPLES:,} more" if len(faults) > EXAMPLES else ""
    return check, severity, len(faults), "; ".join(faults[:EXAMPLES]) + more + (f". {advice}." if advice else "")


if __name__ == "__main__":
    sys.exit(main())
