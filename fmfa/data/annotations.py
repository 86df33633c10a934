"""Every data set as one pandas table with a row for each caption."""

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import numpy as np
import pandas as pd

from fmfa.data.annotation_files import SPLITS, find_annotation, read_records
from fmfa.data.images import UNSAFE_PATH, unsafe_path
from fmfa.errors import AnnotationError, ConfigError

VALIDATION_IDENTITIES = 200
"""Training identities held out for validation when a data set has none, as many as RSTPReid validates on."""

_FIELDS = {
    "image": ("file_path", "img_path", "image"),
    "identity": ("id", "identity"),
    "split": ("split",),
    "caption": ("captions", "caption"),
}
_ADVICE = {
    "image": "Give each record the path of its picture inside the image folder",
    "identity": "Give each record the number of its person, the same for all pictures of one",
    "split": "Give each record train, val or test; of CUHK-PEDES the owners' reid_raw.json has them",
    "caption": "Give each record a caption, or a list of them",
}
_DERIVED = ("label", "record", "held_out")
_WHOLE = re.compile(r"\s*(\d{1,19})(?:\.0+)?\s*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as one table.

    Attributes:
        name: "CUHK-PEDES", "ICFG-PEDES", "RSTPReid", "SimPEDES-street", "SimPEDES-station", or the user's own.
        images: folder that the paths in the table start from.
        table: one row a caption, the captions of an image adjacent and in file order. Columns: `image` (posix
            path relative to `images`), `identity` (int64, as in the file: what evaluation compares), `label`
            (int64, 0..K-1 over the training identities in ascending order, -1 outside training), `split`
            ("train", "val", "test"), `caption`, `record` (int64, position of the source record in the file,
            from 0), then the file's other fields. When validation identities were held out of train, the
            boolean column `held_out` marks their rows.
        notes: plain sentences on what was decided while reading.
    """

    name: str
    images: Path
    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split, renumbered from 0; AnnotationError when the table has no such split."""
        rows = self.table[self.table["split"] == name]
        if rows.empty:
            found = ", ".join(self.table["split"].unique())
            raise AnnotationError(f"{self.name} has no split {name!r}; it has {found}")
        return rows.reset_index(drop=True)


def read_dataset(
    root: str | Path,
    name: str | None = None,
    *,
    images: str | Path | None = None,
    seed: int = 0,
    validation_identities: int | None = None,
    drop_empty_captions: bool = False,
) -> Dataset:
    """Read CUHK-PEDES, ICFG-PEDES, RSTPReid or one's own pictures into one table.

    Accepted are the files that the owners distribute, the files processed for IVT (an object of splits), and
    a CSV or JSON list with the columns image, identity, split, caption. Only the annotation file is opened:
    whether the pictures exist and can be read is the business of `fmfa.check`.

    Args:
        root: the annotation file, or the folder that holds it.
        name: the data set's name in any spelling; picks the file when `root` holds several, and must agree with what
            the file says; by default what it says.
        images: the image folder; by default `imgs` beside the annotation file.
        seed: decides which identities are held out for validation, and nothing else.
        validation_identities: how many training identities become validation when the file has no validation
            split (ICFG-PEDES has none); 0 for none; by default 200, but at most a fifth of the identities.
        drop_empty_captions: leave rows without a word out, with a note, and not to the check.

    Raises:
        AnnotationError: no such file, several that fit, one of another data set than `name`, or bad content; the
            message names file and record.
        ConfigError: no such `name` (see `canonical_name`), or `validation_identities` is negative or leaves no
            identity to train on.
    """
    file, name = find_annotation(root, name)
    records, file_notes = read_records(file)
    notes = list(file_notes)
    captions = _one_row_a_caption(_standard_fields(records, file, notes), file)
    if drop_empty_captions:
        empty = ~captions["caption"].str.contains(r"\w")
        lost = len(set(captions["image"])) - len(set(captions["image"][~empty]))
        captions = captions[~empty]
        notes.append(f"{empty.sum():,} empty captions were left out, and with them {lost:,} images.")
    table = _images_together(captions, notes)
    table = _hold_out(table, validation_identities, seed, notes)
    table.insert(2, "label", _labels(table))
    folder = Path(images).expanduser() if images is not None else file.parent / "imgs"
    return Dataset(name, folder, table, tuple(notes))


def _standard_fields(records: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    derived = [field for field in _DERIVED if field in records]
    if derived:
        notes.append(f"The file's own {' and '.join(derived)} were replaced by what its records say.")
    fields = {field: _take(records, field, file) for field in _FIELDS}
    fields["image"] = _clean_paths(fields["image"], file)
    fields["identity"] = _whole_numbers(fields["identity"], file)
    fields["split"] = _split_names(fields["split"], file)
    used = {alias for aliases in _FIELDS.values() for alias in aliases} | set(derived)
    extra = records[[field for field in records if field not in used]]
    return pd.DataFrame({**fields, "record": np.arange(len(records))}).join(extra)


def _take(records: pd.DataFrame, field: str, file: Path) -> pd.Series:
    """The one value that each record gives for a field under any of its names."""
    present = [alias for alias in _FIELDS[field] if alias in records]
    names = " or ".join(f"'{alias}'" for alias in _FIELDS[field])
    if not present:
        raise AnnotationError(
            f"{file}: no record has the field {names}; found {', '.join(records)[:200]}. {_ADVICE[field]}"
        )
    given = records[present].notna()
    several = given.sum(axis=1) > 1
    if several.any():
        raise AnnotationError(f"{file}, record {several.idxmax()}: has {' and '.join(present)}; keep one of them")
    values = records[present[0]]
    for alias in present[1:]:
        values = values.where(values.notna(), records[alias])
    if values.isna().any():
        raise AnnotationError(f"{file}, record {values.isna().idxmax()}: the field {names} is missing or null")
    return values


def _first_wrong(values: pd.Series, parsed: Iterable, file: Path, expected: str) -> None:
    wrong = next((i for i, value in enumerate(parsed) if value is None), None)
    if wrong is not None:
        raise AnnotationError(f"{file}, record {wrong}: found {short(values.iloc[wrong])}, expected {expected}")


def _clean_paths(values: pd.Series, file: Path) -> pd.Series:
    _first_wrong(values, (v if isinstance(v, str) else None for v in values), file, "an image path as text")
    unsafe = values.str.contains(UNSAFE_PATH)
    if unsafe.any():
        record, path = unsafe.idxmax(), values[unsafe.idxmax()]
        raise AnnotationError(
            f"{file}, record {record}: the image path {short(path)} {unsafe_path(path)}; "
            "expected a path relative to the image folder, without '..'"
        )
    return values.map(lambda path: posixpath.normpath(path.replace("\\", "/")))


def _whole_numbers(values: pd.Series, file: Path) -> pd.Series:
    def whole(value):
        if isinstance(value, str):
            match = _WHOLE.fullmatch(value)
            value = int(match[1]) if match else None
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        return value if valid else None

    parsed = [whole(value) for value in values]
    _first_wrong(values, parsed, file, "an identity: a whole number from 0 up, as number or text")
    return pd.Series(parsed, dtype="int64")


def _split_names(values: pd.Series, file: Path) -> pd.Series:
    parsed = [SPLITS.get(value.strip().lower()) if isinstance(value, str) else None for value in values]
    _first_wrong(values, parsed, file, "a split name: train, val or test")
    return pd.Series(parsed)


def _one_row_a_caption(records: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Repeat each record for each of its captions; one without any keeps a row, with an empty caption."""

    def listed(value):
        if isinstance(value, str):
            return [value]
        fits = isinstance(value, list) and all(isinstance(caption, str) for caption in value)
        return (value or [""]) if fits else None

    values = records["caption"]
    lists = [listed(value) for value in values]
    _first_wrong(values, lists, file, "a caption, or a list of captions, as text")
    texts = [text for captions in lists for text in captions]
    lengths = np.array([len(captions) for captions in lists])
    rows = np.repeat(np.arange(len(records)), lengths)
    table = records.take(rows).reset_index(drop=True)
    table["caption"] = pd.Series(texts)
    if "processed_tokens" in table:
        # One token list a caption in the published files: each row gets its own.
        within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        paired = [
            isinstance(tokens, list) and list(map(type, tokens)) == [list] * len(captions)
            for tokens, captions in zip(records["processed_tokens"], lists)
        ]
        tokens = zip(table["processed_tokens"], within, rows)
        own = [value[i] if paired[record] else value for value, i, record in tokens]
        table["processed_tokens"] = pd.Series(own, dtype=object)
    return table


def _images_together(table: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    if table.empty:
        raise AnnotationError("no caption is left after dropping the empty ones; expected captions with words")
    codes, _ = pd.factorize(table["image"])
    if (np.diff(codes) < 0).any():
        notes.append("Records of one image stood apart in the file; their captions were brought together.")
        table = table.iloc[np.argsort(codes, kind="stable")]
    return table.reset_index(drop=True)


def _hold_out(table: pd.DataFrame, wanted: int | None, seed: int, notes: list[str]) -> pd.DataFrame:
    if wanted is not None and wanted < 0:
        raise ConfigError(f"validation_identities is {wanted}; expected 0 or more")
    train = table["split"] == "train"
    identities = np.unique(table["identity"][train])
    if wanted == 0 or identities.size == 0 or (table["split"] == "val").any():
        return table
    if wanted is None:
        wanted = min(VALIDATION_IDENTITIES, max(1, identities.size // 5))
        if identities.size == 1:
            notes.append("No validation split, and a single training identity: nothing was held out.")
            return table
    elif wanted >= identities.size:
        raise ConfigError(
            f"validation_identities is {wanted}, but train has {identities.size} identities; hold out fewer"
        )
    chosen = np.random.default_rng(seed).choice(identities, wanted, replace=False)
    held_out = train & table["identity"].isin(chosen)
    notes.append(
        f"The file has no validation split: {wanted:,} of {identities.size:,} training identities "
        f"({held_out.sum():,} captions) were held out for validation with seed {seed}; see column 'held_out'."
    )
    return table.assign(split=table["split"].mask(held_out, "val"), held_out=held_out)


def _labels(table: pd.DataFrame) -> np.ndarray:
    train = (table["split"] == "train").to_numpy()
    identity = table["identity"].to_numpy()
    known = np.unique(identity[train])
    return np.where(train, np.searchsorted(known, identity), -1).astype(np.int64)
