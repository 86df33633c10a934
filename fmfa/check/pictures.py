"""Looking at every picture of a data set: is it there, does it stay inside the folder, does it decode, is it unique."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from fmfa.check.report import EXAMPLES, Finding, finding
from fmfa.data.images import load_image
from fmfa.errors import ImageError
from fmfa.processes import end_with
from fmfa.progress import progress_bar

_CHUNK = 64
_WORTH_PROCESSES = 1000


def check_pictures(
    folder: Path, table: pd.DataFrame, decode: bool, workers: int | None, progress: bool
) -> Iterator[Finding]:
    """Yield findings on the pictures of the image folder `folder` that a data set's table names."""
    if not os.path.isdir(folder):
        yield (
            "image folder",
            "fatal",
            1,
            f"{folder} is not a folder; put the pictures there or give their folder",
        )
        return
    yield "image folder", "ok", 0, str(folder)
    relative = pd.Series(table["image"].unique())
    found = find_pictures(folder, relative)
    folders = relative.str.rpartition("/")[0]
    sizes = folders.value_counts()
    absent = folders[found["folder_missing"]].value_counts()
    yield finding(
        "missing folders",
        "fatal",
        (f"{name} ({count:,} pictures)" for name, count in absent.items()),
        f"all {len(sizes):,} folders are there",
    )
    missing = relative[found["missing"]]
    parts = [
        f"{name or 'image folder'}: {len(paths):,} of {sizes[name]:,}, such as {', '.join(paths[:EXAMPLES])}"
        for name, paths in missing.groupby(folders[missing.index])
    ]
    severity = "fatal" if parts else "ok"
    detail = "; ".join(parts) or f"all {len(relative):,} files are there"
    yield "missing pictures", severity, len(missing), detail
    yield finding("links out of the image folder", "note", relative[found["outside"]], "none")
    present = relative[~found["missing"]].tolist()
    if not decode:
        yield "unreadable pictures", "note", 0, f"{len(present):,} pictures are there but were not decoded"
        yield "identical pictures", "note", 0, "pictures were not decoded, and so not compared with each other"
        return
    decoded = decode_pictures(folder, present, workers, progress)
    faults = decoded["fault"].dropna()
    yield finding("unreadable pictures", "fatal", faults, f"all {len(present):,} decode in full")
    yield from _identical(table, decoded["pixels"].dropna())


def find_pictures(images: Path, relative: pd.Series) -> pd.DataFrame:
    """Look for files without opening them, folder by folder.

    Args:
        images: the image folder.
        relative: paths inside it, each once.

    Returns:
        Boolean columns with the index of `relative`: `missing` (no such file), `folder_missing` (nor its
        folder), `outside` (a link of the user's leads out of `images`).
    """
    states = pd.DataFrame(False, index=relative.index, columns=["missing", "folder_missing", "outside"])
    for folder, paths in relative.groupby(relative.str.rpartition("/")[0]):
        try:
            with os.scandir(images / folder) as entries:
                links = {entry.name: entry.is_symlink() for entry in entries}
        except OSError:
            states.loc[paths.index, ["missing", "folder_missing"]] = True
            continue
        inside = not folder or _stays_inside(images, folder)
        names = paths.str.rpartition("/")[2]
        # Asking again covers file systems that do not tell A.jpg from a.jpg, and links that lead nowhere.
        states.loc[paths.index, "missing"] = [
            links.get(name, True) and not os.path.isfile(images / folder / name) for name in names
        ]
        states.loc[paths.index, "outside"] = [
            not inside or (links.get(name, False) and not _stays_inside(images, path))
            for name, path in zip(names, paths)
        ]
    return states


def decode_pictures(images: Path, relative: list[str], workers: int | None, progress: bool) -> pd.DataFrame:
    """Decode every picture in full, in parallel processes.

    Args:
        images: the image folder.
        relative: paths inside it.
        workers: number of processes; None for one a processor, but fewer than a thousand pictures are then
            decoded in this process.
        progress: show a bar.

    Returns:
        One row per picture, with the paths as index. `fault`: why it cannot be read, a sentence that begins with its
        path; `pixels`: a hash of its size and RGB pixels. One of the two is None.

    Raises:
        ImageError: a decoding process died.
    """
    if workers is None:
        workers = 1 if len(relative) < _WORTH_PROCESSES else os.cpu_count() or 1
    chunks = [relative[start : start + _CHUNK] for start in range(0, len(relative), _CHUNK)]
    rows = []
    bound = {"initializer": end_with, "initargs": (os.getpid(),)}
    jobs = Parallel(workers, return_as="generator", **bound)(delayed(_decode)(images, chunk) for chunk in chunks)
    with progress_bar(len(relative), "decoding", "pictures", shown=progress) as bar:
        try:
            for chunk, found in zip(chunks, jobs):
                rows += found
                bar.update(len(chunk))
        except TerminatedWorkerError:
            raise ImageError(
                f"a process that decoded pictures of {images} died; check again with more memory, or with "
                "workers=1 to see at which picture"
            ) from None
    return pd.DataFrame(rows, index=relative, columns=["fault", "pixels"], dtype=object)


def _decode(images: Path, relative: list[str]) -> list[tuple[str | None, bytes | None]]:
    rows = []
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
    within, across = [], []
    for _, rows in copies.groupby("pixels", sort=False):
        several = rows["split"].nunique() > 1
        shown = [f"{row.image} ({row.split}, identity {row.identity})" for row in rows[:EXAMPLES].itertuples()]
        more = [f"{len(rows) - EXAMPLES:,} more"] if len(rows) > EXAMPLES else []
        (across if several else within).append(" = ".join(shown + more))
    advice = "Keep one of each; where the identities differ, one of them is wrong"
    yield finding("identical pictures within a split", "warning", within, "none", advice)
    yield finding("identical pictures in two splits", "warning", across, "none", advice)


def _stays_inside(images: Path, relative: str) -> bool:
    return Path(os.path.realpath(images / relative)).is_relative_to(os.path.realpath(images))
